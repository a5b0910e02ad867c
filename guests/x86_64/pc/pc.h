/*
 * Code shared by the pc guests. They run on any PC that boots multiboot 1 images
 * and has a serial port at 0x3f8 and a debug-exit port at 0xf4. Source files end in
 * their main(magic, info); its result is written to 0xf4.
 */
#ifndef PC_H
#define PC_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

/* Multiboot Specification 0.6.96, 3.3. */
struct mb_info {
	u32 flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4];
	u32 mmap_length, mmap_addr, drives_length, drives_addr, config_table, loader_name;
};
struct mb_module {
	u32 start, end, cmdline, reserved;
};
struct mb_mmap {
	u32 size;
	u64 addr, len;
	u32 type;
} __attribute__((packed));

static inline void out8(u16 port, u8 v) { asm volatile("outb %0, %1" : : "a"(v), "Nd"(port)); }
static inline void out16(u16 port, u16 v) { asm volatile("outw %0, %1" : : "a"(v), "Nd"(port)); }
static inline void out32(u16 port, u32 v) { asm volatile("outl %0, %1" : : "a"(v), "Nd"(port)); }
static inline u8 in8(u16 port) { u8 v; asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u16 in16(u16 port) { u16 v; asm volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 in32(u16 port) { u32 v; asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }
/* Low addresses, which compilers take for null pointers. */
static inline void *low(u32 at) { void *p; asm("" : "=r"(p) : "0"(at)); return p; }
static inline u32 read32(u32 at) { return *(volatile u32 *)at; }
static inline void write32(u32 at, u32 v) { *(volatile u32 *)at = v; }
static inline u64 rdmsr(u32 msr) { u64 v; asm volatile("rdmsr" : "=A"(v) : "c"(msr)); return v; }
static inline void wrmsr(u32 msr, u64 v) { asm volatile("wrmsr" : : "A"(v), "c"(msr)); }
static inline u64 rdtsc(void) { u64 v; asm volatile("rdtsc" : "=A"(v)); return v; }
static inline void cpuid(u32 leaf, u32 sub, u32 r[4])
{
	asm volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(sub));
}
static inline void cli(void) { asm volatile("cli" : : : "memory"); }
static inline void sti(void) { asm volatile("sti; nop" : : : "memory"); }
static inline void sti_hlt(void) { asm volatile("sti; hlt" : : : "memory"); }
static inline void pause(void) { asm volatile("pause" : : : "memory"); }

static inline void put(char c)
{
	while (!(in8(0x3fd) & 0x20))
		;
	out8(0x3f8, (u8)c);
}
static inline void print(const char *text)
{
	while (*text)
		put(*text++);
}
static inline void hex(u64 value)
{
	int shift = 60;

	print("0x");
	while (shift && !((value >> shift) & 15))
		shift -= 4;
	for (; shift >= 0; shift -= 4)
		put("0123456789abcdef"[(value >> shift) & 15]);
}
static inline void show(const char *name, u64 value)
{
	print(name);
	put(' ');
	hex(value);
	put('\n');
}

/* fw_cfg through its ports (docs/specs/fw_cfg of the firmware interface). */
static inline void fw_select(u16 key) { out16(0x510, key); }
static inline void fw_read(void *to, u32 n)
{
	for (u8 *at = to; n; n--)
		*at++ = in8(0x511);
}
static inline u32 fw_u32(u16 key)
{
	u32 v = 0;

	fw_select(key);
	fw_read(&v, 4);
	return v;
}
static inline u32 swap32(u32 v) { return __builtin_bswap32(v); }
static inline u16 cpu_count(void) { return (u16)fw_u32(0x05); }

/* Interrupts: the image defines handle() if it uses any. */
struct gate {
	u16 low, selector, flags, high;
} __attribute__((packed));
extern u8 gates[], trampoline[], trampoline_end[];
extern volatile u32 ap_tickets;
void handle(u32 vector);
void ap_main(u32 index);

static inline void lidt(struct gate idt[256])
{
	struct { u16 limit; u32 base; } __attribute__((packed)) pointer = {
		256 * sizeof(*idt) - 1, (u32)idt };

	asm volatile("lidt %0" : : "m"(pointer));
}
static inline void load_idt(struct gate idt[256])
{
	for (u32 i = 0; i < 256; i++) {
		u32 at = (u32)gates + 16 * i;

		idt[i] = (struct gate){ (u16)at, 0x08, 0x8e00, (u16)(at >> 16) };
	}
	lidt(idt);
}

#define APIC 0xfee00000u
#define APIC_ID 0x20
#define APIC_EOI 0xb0
#define APIC_SVR 0xf0
#define APIC_ICR 0x300
#define APIC_ICR2 0x310
#define APIC_LVT_TIMER 0x320
#define APIC_TIMER_INITIAL 0x380
#define APIC_TIMER_CURRENT 0x390
#define APIC_TIMER_DIVIDE 0x3e0

static inline void enable_apic(void) { write32(APIC + APIC_SVR, 0x1ff); }
static inline void eoi(void) { write32(APIC + APIC_EOI, 0); }
static inline u32 apic_id(void) { return read32(APIC + APIC_ID) >> 24; }
static inline void ipi(u32 id, u32 command)
{
	write32(APIC + APIC_ICR2, id << 24);
	write32(APIC + APIC_ICR, command);
	while (read32(APIC + APIC_ICR) & 0x1000)
		pause();
}

/* Start every other processor: INIT and SIPI, as in Intel SDM vol. 3A, 9.4.4. */
static inline void start_processors(u32 count)
{
	volatile u8 *to = (volatile u8 *)0x8000;

	for (u32 i = 0; i < (u32)(trampoline_end - trampoline); i++)
		to[i] = trampoline[i];
	enable_apic();
	write32(APIC + APIC_ICR, 0xc4500);	/* INIT, all but self */
	write32(APIC + APIC_ICR, 0xc4608);	/* SIPI to 0x8000, all but self */
	while (ap_tickets < count - 1)
		pause();
}
#endif
