/*
 * Entry of the pc guests: a multiboot 1 header, a stack, and main(magic, info).
 *
 * Contract (Multiboot Specification 0.6.96, 3.2): 32-bit protected mode, paging
 * off, eax = 0x2BADB002, ebx = address of the boot information. esp and the
 * segment registers' descriptors are not to be relied upon, so a GDT and a stack
 * come first. main's result goes to the debug-exit port 0xf4.
 *
 * With -DFLAT the header carries its addresses (flag bit 16), so that the bare
 * bytes of the image can be loaded without an ELF header.
 */
#ifdef FLAT
#define FLAGS 0x00010003
#else
#define FLAGS 0x00000003
#endif
#define MAGIC 0x1BADB002

	.section .multiboot, "a"
	.align 4
header:
	.long MAGIC, FLAGS, -(MAGIC + FLAGS)
#ifdef FLAT
	.long header, image_start, image_end, bss_end, start
#endif

	.text
	.code32
	.global start
start:
	cli
	cld
	mov %eax, %esi
	mov $stack_top, %esp
	lgdt gdt_pointer
	ljmp $0x08, $1f
1:	mov $0x10, %ax
	mov %ax, %ds
	mov %ax, %es
	mov %ax, %fs
	mov %ax, %gs
	mov %ax, %ss
	push %ebx
	push %esi
	call main
	mov $0xf4, %dx
	out %eax, %dx
2:	cli
	hlt
	jmp 2b

/*
 * Where a started processor begins: real mode, copied to a page below 1 MiB by
 * start_processors(). It takes a stack by an atomic ticket and calls ap_main(ticket).
 */
	.global trampoline, trampoline_end
	.code16
trampoline:
	cli
	lgdtl %cs:trampoline_gdt - trampoline
	mov $1, %eax
	mov %eax, %cr0
	ljmpl $0x08, $ap_entry
	.align 4
trampoline_gdt:
	.word 23
	.long gdt
trampoline_end:

	.code32
ap_entry:
	mov $0x10, %ax
	mov %ax, %ds
	mov %ax, %es
	mov %ax, %fs
	mov %ax, %gs
	mov %ax, %ss
	mov $1, %eax
	lock xadd %eax, ap_tickets
	inc %eax
	mov %eax, %ecx
	shl $12, %ecx
	lea ap_stacks(%ecx), %esp
	push %eax
	call ap_main
3:	cli
	hlt
	jmp 3b

/* One entry a vector, 16 bytes apart: pushes its number and goes on to handle(vector). */
	.altmacro
	.macro gate n
	.align 16
	push $\n
	jmp interrupted
	.endm
	.align 16
	.global gates
gates:
	.set i, 0
	.rept 256
	gate %i
	.set i, i + 1
	.endr
interrupted:
	pusha
	push 32(%esp)
	call handle
	add $4, %esp
	popa
	add $4, %esp
	/*
	 * As iret, but in pieces: a KVM that shadows page tables emulates level 0, and
	 * its emulator has no iret outside real mode.
	 */
	push 8(%esp)
	popf
	lret $4

	.data
	.align 8
	.global gdt
gdt:	.quad 0
	.quad 0x00cf9b000000ffff	/* 0x08 code */
	.quad 0x00cf93000000ffff	/* 0x10 data */
gdt_pointer:
	.word 23
	.long gdt
	.global ap_tickets
ap_tickets:
	.long 0

	.bss
	.align 16
	.skip 0x4000
stack_top:
	.global ap_stacks
ap_stacks:
	.skip 0x1000 * 17

	.section .note.GNU-stack, "", @progbits
