/* Prints all of the multiboot information: memory, map, command line, modules. */
#include "main.h"

static void modules(struct mb_info *info)
{
	struct mb_module *module = (struct mb_module *)info->mods_addr;

	show("modules", info->mods_count);
	for (u32 i = 0; i < info->mods_count; i++, module++) {
		u32 sum = 0;

		for (u8 *at = (u8 *)module->start; at < (u8 *)module->end; at++)
			sum = sum * 31 + *at;
		show("  start", module->start);
		show("  bytes", module->end - module->start);
		show("  sum", sum);
		print("  string ");
		print((char *)module->cmdline);
		put('\n');
	}
}

u32 main(u32 magic, struct mb_info *info)
{
	show("magic", magic);
	show("info", (u32)info);
	show("flags", info->flags);
	show("mem_lower", info->mem_lower);
	show("mem_upper", info->mem_upper);
	show("boot_device", info->boot_device);
	print("cmdline ");
	print((char *)info->cmdline);
	show("\ncmdline at", info->cmdline);
	print("loader ");
	print((char *)info->loader_name);
	put('\n');
	modules(info);
	for (u32 at = 0; at < info->mmap_length;) {
		struct mb_mmap *entry = (struct mb_mmap *)(info->mmap_addr + at);

		show("map", entry->addr);
		show("  length", entry->len);
		show("  type", entry->type);
		at += entry->size + 4;
	}
	show("mmap at", info->mmap_addr);
	return 0;
}
