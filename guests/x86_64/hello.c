/*
 * hello: print a line and exit with status 0.
 *
 * Ports out: serial, exit. Expected exits: one run of bytes at the serial port
 * and one exit for each vCPU.
 */
#include "guest.h"

PARAM("status=0;exit status");

u64 guest_main(u64 vcpu, struct params *params)
{
	struct line line = { 0 };

	put_text(&line, "hello from vCPU ");
	put_hex(&line, vcpu);
	put_text(&line, " of ");
	put_hex(&line, params->n_vcpus);
	send(&line);
	return params->args[0];
}
