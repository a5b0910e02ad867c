/*
 * Code shared by all tiny guests.
 *
 * Contract: 64-bit mode, privilege level 3, IOPL 3, interrupts off, no IDT: any
 * exception ends the run as a triple fault. Virtual address = guest physical
 * address. At entry rdi = index of the vCPU, rsi = parameter page, rsp = stack.
 *
 * Ports: 0x3f8 serial, transmit; 0x5a0 doorbell, 32 bits, the epoch that just
 * ended; 0x5a4 exit, 32 bits, the status of this vCPU; 0x5a8 free, 32 bits, the
 * gfn of a list of ranges that are free. The run is over when every vCPU has
 * exited; its status is the first non-zero one.
 */
#ifndef GUEST_H
#define GUEST_H

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

#define PAGE_BYTES 4096ul
#define PAGE_WORDS 512ul
#define PORT_SERIAL 0x3f8
#define PORT_DOORBELL 0x5a0
#define PORT_EXIT 0x5a4
#define PORT_FREE 0x5a8

/* The parameter page; see kvmhost/boot/params.py. */
struct result {
	u64 status, gfn, epoch, expected, found, word, touches, spare;
};

struct params {
	u64 magic, n_vcpus, free_start, free_end, mmio_start, reserved[3];
	u64 args[64];
	u8 pad[0x400 - 0x40 - 64 * 8];
	struct result results[32];
};

_Static_assert(__builtin_offsetof(struct params, args) == 0x40, "args");
_Static_assert(__builtin_offsetof(struct params, results) == 0x400, "results");

/*
 * The names, defaults and meanings of args[0], args[1], ...: one string each,
 * "name=default;meaning" or "name=default unit;meaning", kept in the image for the host
 * to read. With the units pages, permille and percent the host takes sizes and shares.
 */
#define PARAM(text) \
	static const char __attribute__((used, section(".kvmhost.params"))) \
	CONCAT(param_, __COUNTER__)[] = text
#define CONCAT(a, b) CONCAT2(a, b)
#define CONCAT2(a, b) a##b

/* Each guest defines this; its return value is the exit status. */
u64 guest_main(u64 vcpu, struct params *params);

static inline void out8(unsigned short port, u8 value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void out32(unsigned short port, u32 value)
{
	__asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

/* Send a buffer to the serial port: one exit for up to a page of bytes. */
static inline void out_string(const char *text, u64 n_bytes)
{
	__asm__ volatile("rep outsb"
			 : "+S"(text), "+c"(n_bytes) : "d"((unsigned short)PORT_SERIAL) : "memory");
}

static inline void doorbell(u64 epoch)
{
	out32(PORT_DOORBELL, (u32)epoch);
}

/*
 * A page of ranges that the guest declares free: the host may reclaim their memory,
 * and they read as zeros from the declaration on. The host fills in how many pages
 * were freed and how many were not: those outside memory, and pinned ones.
 */
#define FREE_RANGES 254

struct free_list {
	u64 n_ranges, dropped_pages, kept_pages, reserved;
	struct {
		u64 gfn, n_pages;
	} ranges[FREE_RANGES];
} __attribute__((aligned(PAGE_BYTES)));

_Static_assert(sizeof(struct free_list) == PAGE_BYTES, "one page");

/* Declare the ranges of a list free: one exit for all of them. */
static inline void declare_free(struct free_list *list)
{
	out32(PORT_FREE, (u32)((u64)list / PAGE_BYTES));
}

/* A bijective mix of 64 bits: the finalizer of SplitMix64 (Steele et al., 2014). */
static inline u64 mix(u64 x)
{
	x += 0x9e3779b97f4a7c15ul;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ul;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebul;
	return x ^ (x >> 31);
}

/* A line of output, assembled and sent in one call. */
struct line {
	u64 used;
	char text[256];
};

static inline void put_text(struct line *line, const char *text)
{
	while (*text && line->used < sizeof(line->text))
		line->text[line->used++] = *text++;
}

static inline void put_hex(struct line *line, u64 value)
{
	int digits = 1;

	while (digits < 16 && value >> (4 * digits))
		digits++;
	put_text(line, "0x");
	while (digits-- && line->used < sizeof(line->text))
		line->text[line->used++] = "0123456789abcdef"[value >> (4 * digits) & 15];
}

/* One vCPU at a time: a run of bytes may leave the guest in several exits. */
static u32 serial_busy __attribute__((unused));

static inline void send(struct line *line)
{
	if (line->used == sizeof(line->text))
		line->used--;
	line->text[line->used++] = '\n';
	while (__atomic_exchange_n(&serial_busy, 1, __ATOMIC_ACQUIRE))
		__asm__ volatile("pause");
	out_string(line->text, line->used);
	__atomic_store_n(&serial_busy, 0, __ATOMIC_RELEASE);
	line->used = 0;
}

#endif
