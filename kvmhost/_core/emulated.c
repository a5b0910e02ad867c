#include "emulated.h"

#include <stdbool.h>
#include <string.h>

#define UNDEFINED_OPCODE 6	/* #UD */

static void stop(void *uc, struct kh_emu *emu, int reason, uint64_t address, uint32_t size)
{
	/* Only the first one counts: a block may run on after a stop inside it. */
	if (emu->reason == KH_EMU_NONE) {
		emu->reason = reason;
		emu->address = address;
		emu->size = size;
	}
	emu->stop(uc);
}

void kh_emu_attend(struct kh_emu *emu)
{
	__atomic_store_n(&emu->attention, 1, __ATOMIC_RELEASE);
}

/* Test and set whether a block has been scanned. */
static bool seen_before(struct kh_emu *emu, uint64_t address)
{
	uint64_t *seen = emu->seen, key = address + 1, i = address;

	for (; seen[i % KH_EMU_BLOCKS]; i++)
		if (seen[i % KH_EMU_BLOCKS] == key)
			return true;
	if (emu->n_seen++ == KH_EMU_BLOCKS * 3 / 4) {
		/* Scanning a block twice is harmless; a full table is not. */
		memset(seen, 0, sizeof(emu->seen));
		emu->n_seen = 1;
		i = address;
	}
	seen[i % KH_EMU_BLOCKS] = key;
	return false;
}

/*
 * Before every block, including the first one of a run. So a request that arrives
 * while uc_emu_start sets up, which would forget a uc_emu_stop, is not lost. A stop
 * here ends the run before the block's first instruction.
 */
static void on_block(void *uc, uint64_t address, uint32_t size, void *user)
{
	struct kh_emu *emu = user;

	if (__builtin_expect(emu->stepping, 0))
		return;
	if (__builtin_expect(__atomic_load_n(&emu->attention, __ATOMIC_ACQUIRE), 0))
		stop(uc, emu, KH_EMU_ATTENTION, address, size);
	else if (__builtin_expect(!seen_before(emu, address), 0))
		stop(uc, emu, KH_EMU_NEW_BLOCK, address, size);
}

/* Before what follows a string port instruction. */
static void on_after(void *uc, uint64_t address, uint32_t size, void *user)
{
	struct kh_emu *emu = user;

	(void)size;
	if (emu->stepping && address != emu->address)
		emu->stop(uc);
}

/* Before a port instruction. */
static void on_port(void *uc, uint64_t address, uint32_t size, void *user)
{
	struct kh_emu *emu = user;

	if (!emu->stepping)
		stop(uc, emu, KH_EMU_PORT, address, size);
	else if (address != emu->address || emu->stepping == KH_EMU_STEP_DONE)
		emu->stop(uc);
}

/*
 * The data of a string instruction is transferred one access at a time. The
 * emulation cannot stop here, because the registers are not up to date: it stops at
 * the next repetition or at the next instruction.
 */
static void on_out(void *uc, uint32_t port, int size, uint32_t value, void *user)
{
	struct kh_emu *emu = user;

	if (!emu->stepping) {
		stop(uc, emu, KH_EMU_UNFORESEEN, port, size);
		return;
	}
	memcpy(emu->data + emu->used, &value, size);
	emu->used += size;
	if (emu->used + size > KH_EMU_DATA)
		emu->stepping = KH_EMU_STEP_DONE;
}

static uint32_t on_in(void *uc, uint32_t port, int size, void *user)
{
	struct kh_emu *emu = user;
	uint32_t value = ~0u;

	if (!emu->stepping) {
		stop(uc, emu, KH_EMU_UNFORESEEN, port, size);
		return value;
	}
	if (emu->done + size <= emu->used)
		memcpy(&value, emu->data + emu->done, size);
	emu->done += size;
	if (emu->done + size > emu->used)
		emu->stepping = KH_EMU_STEP_DONE;
	return value;
}

static void on_interrupt(void *uc, uint32_t vector, void *user)
{
	stop(uc, user, KH_EMU_EXCEPTION, vector, 0);
}

static bool on_undefined(void *uc, void *user)
{
	stop(uc, user, KH_EMU_EXCEPTION, UNDEFINED_OPCODE, 0);
	return true;
}

/* EFER.SCE and SYSENTER_CS are clear: both instructions fault. */
static void on_syscall(void *uc, void *user)
{
	stop(uc, user, KH_EMU_EXCEPTION, UNDEFINED_OPCODE, 0);
}

static bool on_outside(void *uc, int type, uint64_t gpa, int size, int64_t value, void *user)
{
	struct kh_emu *emu = user;

	if (emu->reason == KH_EMU_NONE) {
		emu->type = type;
		emu->value = value;
	}
	stop(uc, emu, KH_EMU_OUTSIDE, gpa, size);
	/* Not handled: the instruction ends without effect. */
	return false;
}

static bool on_protected(void *uc, int type, uint64_t gpa, int size, int64_t value, void *user)
{
	struct kh_emu *emu = user;

	(void)value;
	if (emu->reason == KH_EMU_NONE)
		emu->type = type;
	stop(uc, emu, KH_EMU_PROTECTED, gpa, size);
	/* Not handled: the instruction ends without effect. */
	return false;
}

uint64_t kh_emu_hook(int which)
{
	switch (which) {
	case KH_EMU_HOOK_BLOCK:
		return (uintptr_t)on_block;
	case KH_EMU_HOOK_PORT:
		return (uintptr_t)on_port;
	case KH_EMU_HOOK_AFTER:
		return (uintptr_t)on_after;
	case KH_EMU_HOOK_OUT:
		return (uintptr_t)on_out;
	case KH_EMU_HOOK_IN:
		return (uintptr_t)on_in;
	case KH_EMU_HOOK_INTERRUPT:
		return (uintptr_t)on_interrupt;
	case KH_EMU_HOOK_UNDEFINED:
		return (uintptr_t)on_undefined;
	case KH_EMU_HOOK_SYSCALL:
		return (uintptr_t)on_syscall;
	case KH_EMU_HOOK_OUTSIDE:
		return (uintptr_t)on_outside;
	case KH_EMU_HOOK_PROTECTED:
		return (uintptr_t)on_protected;
	}
	return 0;
}
