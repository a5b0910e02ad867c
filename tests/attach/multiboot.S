/*
 * A guest for any VMM that loads multiboot images: touches pages as the serial port tells.
 *
 * Entry: 32-bit protected mode, paging off, flat segments, by the multiboot header's own
 * addresses (no ELF). For each byte 'a' + p that arrives at COM1 it takes the pages
 *     4096 + 7 * i + p,  i = 0 .. 255
 * reads one word of each if p is even, writes it if p is odd, and sends the byte back.
 * Expected exits: none; it polls for ever. Privilege level 0, so not for a nested KVM that
 * emulates that level unless the VMM is patient.
 */
	.set	BASE, 0x100000
	.set	COM1, 0x3f8
	.set	STRIDE, 7 * 4096

	.code32
	.text
	.globl _start
_start:
header:
	.long	0x1badb002		/* magic */
	.long	0x00010000		/* flags: the addresses below are valid */
	.long	-(0x1badb002 + 0x00010000)
	.long	BASE			/* where this header goes */
	.long	BASE			/* load from, up to, end of bss, entry */
	.long	BASE + (end - header)
	.long	BASE + (end - header)
	.long	BASE + (entry - header)

entry:
	cli
wait:
	movw	$(COM1 + 5), %dx
	inb	%dx, %al
	testb	$1, %al			/* a byte is there */
	jz	wait
	movw	$COM1, %dx
	inb	%dx, %al
	movzbl	%al, %ebx
	subl	$'a', %ebx
	movl	%ebx, %esi
	shll	$12, %esi
	addl	$(4096 << 12), %esi	/* first page of this phase */
	movl	$256, %ecx
	testl	$1, %ebx
	jnz	write
read:
	movl	(%esi), %edi
	addl	$STRIDE, %esi
	loop	read
	jmp	answer
write:
	movl	%ecx, (%esi)
	addl	$STRIDE, %esi
	loop	write
answer:
	outb	%al, %dx
	jmp	wait
end:
