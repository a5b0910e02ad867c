/*
 * The guest of the lab's arm64 hosts: EL1, MMU off, all memory is guest-physical.
 *
 * Entry: x0 is the address of the parameters: first address, end, stride in bytes, and
 * whether to write, 64 bits each. Touches every address once, rings the doorbell, a store to
 * 0, where there is no memory (KVM_EXIT_MMIO), and begins again, with the parameters read anew.
 */
	.text
epoch:
	ldp	x1, x2, [x0]
	ldp	x3, x4, [x0, #16]
1:	cmp	x1, x2
	b.hs	3f
	ldr	x5, [x1]
	cbz	x4, 2f
	str	x5, [x1]
2:	add	x1, x1, x3
	b	1b
3:	mov	x6, xzr
	str	x1, [x6]
	b	epoch
