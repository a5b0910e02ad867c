/*
 * own_guest: add up the numbers from 1 to n, print the sum, and exit with it.
 *
 * Build and run:
 *
 *     $ kvmhost guests build own_guest.c
 *     $ kvmhost run ./own_guest.elf --param n=10
 *     sum 0x37
 *     $ echo $?
 *     55
 *
 * Ports out: serial, exit. What guest.h offers is in docs/guests.md; kvmhost guests PATH
 * shows this comment and the parameters.
 */
#include "guest.h"

PARAM("n=4;the last number that is added");

u64 guest_main(u64 vcpu, struct params *params)
{
	struct line line = { 0 };
	u64 sum = 0;

	if (vcpu > 0)
		return 0;
	for (u64 i = 1; i <= params->args[0]; i++)
		sum += i;
	put_text(&line, "sum ");
	put_hex(&line, sum);
	send(&line);
	return sum;
}
