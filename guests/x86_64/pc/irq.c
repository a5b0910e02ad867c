/*
 * Device interrupts: the serial port's transmit interrupt in and out of loopback,
 * and the test device's interrupt lines where there is one (argument "testdev").
 */
#define OWN_HANDLER
#include "main.h"

static struct gate idt[256];
static volatile u32 got[256], reasons;

void handle(u32 vector)
{
	got[vector]++;
	if (vector == 0x54) {
		u8 reason = in8(0x3fa);

		reasons = reasons << 8 | reason;
		if (reason == 0xc4 || reason == 0xcc)
			got[0]  = in8(0x3f8);
	}
	eoi();
}

static void route(u32 input, u32 vector)
{
	write32(0xfec00000, 0x11 + 2 * input);
	write32(0xfec00010, apic_id() << 24);
	write32(0xfec00000, 0x10 + 2 * input);
	write32(0xfec00010, vector);
}

static void serial(void)
{
	u8 divisor, msr, looped;

	out8(0x3ff, 0x5a);
	show("scratch", in8(0x3ff));
	out8(0x3fb, 0x83);
	out8(0x3f8, 1);
	out8(0x3f9, 0);
	divisor = in8(0x3f8);
	out8(0x3fb, 3);
	show("divisor", divisor);
	show("lcr", in8(0x3fb));
	show("iir before fifo", in8(0x3fa));
	out8(0x3fa, 0xc7);
	show("iir with fifo", in8(0x3fa));
	show("msr", in8(0x3fe) & 0xf0);
	out8(0x3fc, 0x1b);	/* loopback with DTR, RTS, OUT2 */
	msr = in8(0x3fe) & 0xf0;
	out8(0x3f8, 'x');
	while (!(in8(0x3fd) & 1))
		pause();
	looped = in8(0x3f8);
	out8(0x3fc, 0x0b);
	show("msr in loopback", msr);
	show("looped", looped);
	show("msr back", in8(0x3fe) & 0xf0);
	in8(0x3fe);
	in8(0x3fa);
	route(4, 0x54);
	out8(0x3f9, 2);		/* transmitter empty */
	while (!got[0x54])
		sti_hlt();
	cli();
	out8(0x3f9, 0);
	show("transmit interrupt, reason", reasons);
}

static void lines(void)
{
	route(10, 0x55);
	sti();
	out32(0x2000 + 10, 1);
	out32(0x2000 + 10, 0);
	while (!got[0x55])
		pause();
	cli();
	show("line 10", got[0x55]);
	out32(0xe0, 0x12345678);
	show("echo port", in32(0xe0));
	write32(0xff000010, 0xcafe);
	show("echo memory", read32(0xff000010));
}

u32 main(u32 magic, struct mb_info *info)
{
	const char *at = (const char *)info->cmdline;

	(void)magic;
	load_idt(idt);
	enable_apic();
	out8(0x21, 0xff);
	out8(0xa1, 0xff);
	serial();
	while (*at)
		at++;
	if (at[-1] == 'v')
		lines();
	return 0;
}
