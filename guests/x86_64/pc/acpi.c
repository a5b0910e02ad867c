/* Finds the ACPI tables, checks their sums, lists processors, and powers off (S5). */
#include "main.h"

struct table {
	char signature[4];
	u32 length;
	u8 revision, sum, oem[18];
	u32 creator[2];
} __attribute__((packed));

static u8 sum(const void *from, u32 n)
{
	u8 total = 0;

	for (const u8 *at = from; n--;)
		total += *at++;
	return total;
}

static int is(const void *at, const char *text, u32 n)
{
	for (const char *p = at; n--; p++, text++)
		if (*p != *text)
			return 0;
	return 1;
}

static void madt(const struct table *table)
{
	const u8 *at = (const u8 *)table + 44, *end = (const u8 *)table + table->length;
	u32 cpus = 0, ioapics = 0, overrides = 0;

	show("lapic at", *(u32 *)((u8 *)table + 36));
	for (; at < end; at += at[1]) {
		cpus += at[0] == 0 && (at[4] & 1);
		ioapics += at[0] == 1;
		overrides += at[0] == 2;
	}
	show("processors", cpus);
	show("i/o apics", ioapics);
	show("has overrides", overrides > 0);
}

static u8 s5_type(const struct table *dsdt)
{
	const u8 *at = (const u8 *)dsdt, *end = at + dsdt->length - 8;

	for (; at < end; at++)
		if (is(at, "_S5_", 4)) /* NameOp name PackageOp length count [BytePrefix] value */
			return at[7] == 0x0a ? at[8] : at[7];
	return 0xff;
}

u32 main(u32 magic, struct mb_info *info)
{
	const struct table *rsdt = 0, *dsdt = 0;
	u16 pm1a = 0, timer = 0;

	(void)magic;
	(void)info;
	for (u32 at = 0xe0000; at < 0x100000 && !rsdt; at += 16)
		if (is((void *)at, "RSD PTR ", 8) && !sum((void *)at, 20))
			rsdt = (struct table *)*(u32 *)(at + 16);
	if (!rsdt || !is(rsdt, "RSDT", 4))
		return 2;
	show("rsdt sum", sum(rsdt, rsdt->length));
	for (u32 *entry = (u32 *)(rsdt + 1); (u8 *)entry < (u8 *)rsdt + rsdt->length; entry++) {
		const struct table *table = (struct table *)*entry;
		const u8 *raw = (const u8 *)table;

		if (sum(table, table->length))
			return 3;
		if (is(table, "APIC", 4))
			madt(table);
		if (is(table, "FACP", 4)) {
			dsdt = (struct table *)*(u32 *)(raw + 40);
			pm1a = (u16) *(u32 *)(raw + 64);
			timer = (u16) *(u32 *)(raw + 76);
		}
	}
	if (!dsdt || sum(dsdt, dsdt->length))
		return 4;
	show("pm timer at", timer);
	show("pm1a control at", pm1a);
	u32 first = in32(timer), second;
	do
		second = in32(timer);
	while (second == first);
	show("timer above 24 bits", second >> 24);
	u8 type = s5_type(dsdt);
	if (type == 0xff)
		return 5;
	print("power off\n");
	out16(pm1a, 0x2000 | type << 10);
	for (;;)
		pause();
}
