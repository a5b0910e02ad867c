/*
 * Ends with a failure selected by the last letter of the command line: h halts
 * forever, t causes a triple fault, p runs an instruction that some KVMs cannot
 * emulate.
 */
#include "main.h"

u32 main(u32 magic, struct mb_info *info)
{
	const char *at = (const char *)info->cmdline;
	u32 value = magic;

	while (*at)
		at++;
	if (at[-1] == 't') {
		asm volatile("lidt %0; ud2" : : "m"(*(u64 *)(u32[2]){ 0, 0 }));
	} else if (at[-1] == 'p') {
		asm volatile("popcnt %0, %0" : "+r"(value));
		show("ones", value);
	} else {
		asm volatile("cli; hlt");
	}
	return 0;
}
