/*
 * A 64-bit image in a 32-bit ELF file, as the unit tests of KVM are made: multiboot
 * entry, page tables for the first GiB, long mode, a line, exit value 0x21.
 */
	.section .multiboot, "a"
	.align 4
	.long 0x1BADB002, 0, -0x1BADB002

	.text
	.code32
	.global start
start:
	cli
	mov $directory, %eax
	or $3, %eax
	mov %eax, root
	mov $pages, %eax
	or $3, %eax
	mov %eax, directory
	mov $pages, %edi
	mov $0x83, %eax
1:	mov %eax, (%edi)
	add $0x200000, %eax
	add $8, %edi
	cmp $0x40000083, %eax
	jne 1b
	mov $root, %eax
	mov %eax, %cr3
	mov $0x20, %eax		/* PAE */
	mov %eax, %cr4
	mov $0xc0000080, %ecx	/* EFER.LME */
	mov $0x100, %eax
	xor %edx, %edx
	wrmsr
	mov $0x80000011, %eax
	mov %eax, %cr0
	lgdt gdt_pointer
	ljmp $0x08, $in_long_mode

	.code64
in_long_mode:
	mov $0x10, %eax
	mov %eax, %ss
	mov %eax, %ds
	mov %eax, %es
	lea stack_top(%rip), %rsp
	mov $0x123456789abcdef0, %rax
	push %rax
	lea text(%rip), %rsi
	mov $0x3f8, %edx
2:	lodsb
	test %al, %al
	jz 3f
	out %al, %dx
	jmp 2b
3:	pop %rax
	shr $60, %rax
	add $0x20, %eax
	mov $0xf4, %edx
	out %eax, %dx
4:	hlt
	jmp 4b

	.section .rodata
text:	.asciz "in long mode\n"

	.data
	.align 8
gdt:	.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
	.word 23
	.long gdt, 0

	.bss
	.align 4096
root:	.skip 4096
directory:
	.skip 4096
pages:	.skip 4096
	.skip 4096
stack_top:

	.section .note.GNU-stack, "", @progbits
