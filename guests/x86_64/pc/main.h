/* Frame of a pc guest: its main, and empty handlers unless the guest defines them. */
#include "pc.h"

u32 main(u32 magic, struct mb_info *info);

#ifndef OWN_HANDLER
void handle(u32 vector)
{
	show("unexpected vector", vector);
	out32(0xf4, 0x7f);
}
#endif
#ifndef OWN_AP
void ap_main(u32 index)
{
	(void)index;
}
#endif
