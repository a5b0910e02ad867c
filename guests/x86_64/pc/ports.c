/* Devices that small kernels probe: clock, memory size, PCI, holes, speaker and reset port. */
#include "main.h"

static u8 cmos(u8 index)
{
	out8(0x70, index);
	return in8(0x71);
}

u32 main(u32 magic, struct mb_info *info)
{
	u8 second;

	(void)magic;
	(void)info;
	show("extended kib", (u32)(cmos(0x31) << 8 | cmos(0x30)));
	show("above 16 mib", (u32)(cmos(0x35) << 8 | cmos(0x34)));
	show("status b", cmos(0x0b));
	show("status d", cmos(0x0d));
	show("century", cmos(0x32));
	second = cmos(0);
	while (cmos(0) == second)
		;
	print("the clock runs\n");
	out8(0x80, 0x55);
	show("free port", in32(0x1234));
	show("free memory", read32(0xfd123450));
	show("keyboard status", in8(0x64) & 2);
	out8(0x61, in8(0x61) | 1);
	show("fast a20", in8(0x92) & 2);
	out8(0x64, 0xfe);
	for (;;)
		pause();
}
