/*
 * The guest of the lab's ppc64el hosts: supervisor, real mode, all memory is guest-physical.
 *
 * Entry: r3 is the address of the parameters: first address, end, stride in bytes, and
 * whether to write, 64 bits each. Touches every address once, rings the doorbell, a
 * hypercall that no hypervisor knows (KVM_EXIT_PAPR_HCALL), and begins again, with the
 * parameters read anew.
 */
	.text
	mr	31, 3
epoch:
	ld	4, 0(31)
	ld	5, 8(31)
	ld	6, 16(31)
	ld	7, 24(31)
1:	cmpld	4, 5
	bge	3f
	ld	8, 0(4)
	cmpdi	7, 0
	beq	2f
	std	8, 0(4)
2:	add	4, 4, 6
	b	1b
3:	li	3, 0x7ffc
	sc	1
	b	epoch
