/* The processor as an image sees it: CPUID, and what firmware leaves in the MSRs. */
#include "main.h"

static const u32 leaves[] = {
	0x0, 0x1, 0x5, 0x6, 0x7, 0x80000000, 0x80000001, 0x80000002, 0x80000003,
	0x80000004, 0x80000005, 0x80000006, 0x80000007, 0x80000008, 0x8000000a, 0x40000001,
};
/* Memory types, machine checks, microcode revision. */
static const u32 msrs[] = {
	0x2ff, 0x200, 0x201, 0x202, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26f,
	0xfe, 0x277, 0x179, 0x17a, 0x400, 0x8b,
};

u32 main(u32 magic, struct mb_info *info)
{
	static const char *const names[] = { "  eax", "  ebx", "  ecx", "  edx" };
	u32 r[4];

	(void)magic;
	(void)info;
	for (u32 i = 0; i < sizeof(leaves) / sizeof(*leaves); i++) {
		cpuid(leaves[i], 0, r);
		show("leaf", leaves[i]);
		for (u32 k = 0; k < 4; k++)
			show(names[k], r[k]);
	}
	for (u32 i = 0; i < sizeof(msrs) / sizeof(*msrs); i++) {
		show("msr", msrs[i]);
		show("  value", rdmsr(msrs[i]));
	}
	out8(0x70, 0x0c);
	show("the clock has moved", in8(0x71));
	show("acpi mode", in16(0x604));
	show("keyboard status", in8(0x64));
	return 0;
}
