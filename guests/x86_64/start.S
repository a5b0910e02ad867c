/* Entry of every tiny guest: call guest_main(rdi, rsi), send what it returns. */
	.section .text.start, "ax"
	.globl _start
_start:
	call	guest_main
	movl	$0x5a4, %edx
	outl	%eax, %dx
	/* The host does not come back here. */
	ud2

	.section .note.GNU-stack, "", @progbits
