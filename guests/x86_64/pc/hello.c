/* Prints a line and exits through the debug port with 0: process status 1. */
#include "main.h"

u32 main(u32 magic, struct mb_info *info)
{
	(void)info;
	print(magic == 0x2BADB002 ? "hello from a multiboot image\n" : "wrong magic\n");
	return magic != 0x2BADB002;
}
