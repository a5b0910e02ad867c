/*
 * Hooks that Unicorn calls while it runs guest code for the emulated engine, in C
 * because one of them runs before every block. Python loads Unicorn's library; the
 * one function of it that is needed here is passed as a pointer.
 */
#ifndef KVMHOST_EMULATED_H
#define KVMHOST_EMULATED_H

#include "compat.h"

#define KH_EMU_BLOCKS 4096
#define KH_EMU_DATA 4096

/* Why a hook stopped the emulation. */
#define KH_EMU_NONE 0
#define KH_EMU_ATTENTION 1	/* the vCPU's thread is requested: a kick, a flush */
#define KH_EMU_NEW_BLOCK 2	/* a block that has not been scanned yet */
#define KH_EMU_PORT 3		/* before an instruction that reads or writes a port */
#define KH_EMU_UNFORESEEN 4	/* a port instruction that the scan did not find */
#define KH_EMU_EXCEPTION 5	/* address is the vector */
#define KH_EMU_OUTSIDE 6	/* an access outside guest memory; type as in Unicorn */
#define KH_EMU_PROTECTED 7	/* an access that the mapping does not permit; type as well */

#define KH_EMU_STEP_NO 0
#define KH_EMU_STEP_RUNS 1
#define KH_EMU_STEP_DONE 2	/* no data left, or no room */

/* Which hook; see kh_emu_hook. */
#define KH_EMU_HOOK_BLOCK 0
#define KH_EMU_HOOK_PORT 1
#define KH_EMU_HOOK_OUT 2
#define KH_EMU_HOOK_IN 3
#define KH_EMU_HOOK_INTERRUPT 4
#define KH_EMU_HOOK_UNDEFINED 5
#define KH_EMU_HOOK_SYSCALL 6
#define KH_EMU_HOOK_OUTSIDE 7
#define KH_EMU_HOOK_AFTER 8
#define KH_EMU_HOOK_PROTECTED 9

typedef int (*kh_emu_stop_fn)(void *uc);

struct kh_emu {
	kh_emu_stop_fn stop;	/* uc_emu_stop; called by hooks only */
	int attention;
	int stepping;		/* KH_EMU_STEP_*: stop only at the end of one instruction */
	int reason;		/* KH_EMU_*: the first stop of a run */
	int type;		/* of an access outside memory */
	uint32_t size;		/* in bytes: of the block, the instruction or the access */
	uint64_t address;	/* of the block or the instruction; gpa of the access */
	uint64_t value;		/* that was written outside memory */
	uint32_t used;		/* bytes of data; of these done by string reads */
	uint32_t done;
	uint8_t data[KH_EMU_DATA];	/* of string port instructions */
	uint32_t n_seen;
	uint64_t seen[KH_EMU_BLOCKS];	/* hash of start + 1 of blocks looked through */
};

/* Request the vCPU's thread; the emulation stops before its next block. Any thread. */
void kh_emu_attend(struct kh_emu *emu);

/* The address of a hook, for uc_hook_add; 0 for none. Its user data is a struct kh_emu. */
uint64_t kh_emu_hook(int which);

#endif
