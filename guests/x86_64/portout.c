/*
 * portout: write to one port repeatedly, for measuring exits.
 *
 * Ports out: `port`, `count` times, 32 bits each; exit with 0.
 */
#include "guest.h"

PARAM("port=1440;where to write; 1440 (0x5a0) is the doorbell");
PARAM("count=10000;how many times");

enum { PORT, COUNT };

u64 guest_main(u64 vcpu, struct params *params)
{
	if (vcpu)
		return 0;
	for (u64 i = 0; i < params->args[COUNT]; i++)
		out32((unsigned short)params->args[PORT], (u32)i);
	return 0;
}
