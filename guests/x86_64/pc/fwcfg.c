/* Reads fw_cfg: signature, counts, memory, and the user's files (opt/...). */
#include "main.h"

struct file {
	u32 size;
	u16 select, reserved;
	char name[56];
};

static void print_file(const struct file *file)
{
	u32 n = swap32(file->size);
	u8 byte;

	print(file->name);
	show(" bytes", n);
	fw_select((u16)(file->select << 8 | file->select >> 8));
	while (n--) {
		fw_read(&byte, 1);
		put((char)byte);
	}
	put('\n');
}

/* Selecting a file's key moves the read position: the directory is copied first. */
static struct file files[256];

u32 main(u32 magic, struct mb_info *info)
{
	char signature[5] = { 0 };
	u32 count;

	(void)magic;
	(void)info;
	fw_select(0);
	fw_read(signature, 4);
	print(signature);
	show("\nid bit 0", fw_u32(1) & 1);
	show("cpus", (u16)fw_u32(0x05));
	show("max cpus", (u16)fw_u32(0x0f));
	show("ram", fw_u32(0x03));
	show("unknown key", fw_u32(0x3ff0));
	fw_select(0x19);
	fw_read(&count, 4);
	count = swap32(count);
	if (count > 256)
		return 2;
	fw_read(files, count * sizeof(struct file));
	for (u32 i = 0; i < count; i++)
		if (files[i].name[0] == 'o' && files[i].name[1] == 'p' && files[i].name[2] == 't')
			print_file(&files[i]);
	return 0;
}
