/* Sends back each received line, read by interrupt; ends at an empty line. */
#define OWN_HANDLER
#include "main.h"

static struct gate idt[256];
static volatile char line[256];
static volatile u32 used, done;

void handle(u32 vector)
{
	if (vector == 0x54)
		while (!done && ((in8(0x3fa) & 0xf) == 4 || (in8(0x3fd) & 1))) {
			char c = (char)in8(0x3f8);

			if (c == '\n')
				done = 1;
			else if (used < 255)
				line[used++] = c;
		}
	/* The next line waits in the FIFO until main has taken this one. */
	if (done)
		out8(0x3f9, 0);
	eoi();
}

u32 main(u32 magic, struct mb_info *info)
{
	(void)magic;
	(void)info;
	load_idt(idt);
	enable_apic();
	out8(0x21, 0xff);
	out8(0xa1, 0xff);
	write32(0xfec00000, 0x11 + 8);
	write32(0xfec00010, apic_id() << 24);
	write32(0xfec00000, 0x10 + 8);
	write32(0xfec00010, 0x8054);	/* level: remaining FIFO data interrupts again */
	out8(0x3fa, 7);
	out8(0x3fc, 0xb);
	print("ready\n");
	for (;;) {
		used = done = 0;
		out8(0x3f9, 1);
		while (!done)
			sti_hlt();
		cli();
		out8(0x3f9, 0);
		line[used] = 0;
		print("got ");
		print((char *)line);
		put('\n');
		if (!used)
			return 0;
	}
}
