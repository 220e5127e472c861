# What runTiny runs to see whether an accelerator works, at 0xf0000, where the
# reset vector jumps to: from real mode through protected mode to 64-bit mode with paging, then out to port 0xf4,
# which QEMU's isa-debug-exit ends with status 2*16+1. Made with
#   as -o amd64.o amd64.S && ld -Ttext 0xf0000 --oformat binary -o amd64.bin amd64.o
	.code16
	.globl _start
_start:
	cli
	lgdtl	%cs:(gdtr - 0xf0000)
	mov	%cr0, %eax
	or	$1, %al
	mov	%eax, %cr0
	ljmpl	$8, $protected

	.code32
protected:
	mov	$16, %ax
	mov	%ax, %ds
	mov	%ax, %es
	mov	%ax, %ss
	mov	$0x8000, %esp
	# One page table of three levels at 0x1000 maps the first 2 MiB to themselves.
	xor	%eax, %eax
	mov	$0x1000, %edi
	mov	$0xc00, %ecx
	cld
	rep stosl
	movl	$0x2003, 0x1000
	movl	$0x3003, 0x2000
	movl	$0x83, 0x3000
	mov	$0x1000, %eax
	mov	%eax, %cr3
	mov	%cr4, %eax
	or	$0x20, %eax		# PAE
	mov	%eax, %cr4
	mov	$0xc0000080, %ecx	# EFER
	rdmsr
	or	$0x100, %eax		# LME
	wrmsr
	mov	%cr0, %eax
	or	$0x80000000, %eax	# PG
	mov	%eax, %cr0
	ljmp	$24, $long

	.code64
long:
	xor	%eax, %eax
	cpuid
	mov	$1000000, %rcx
1:	push	%rcx
	pop	%rax
	loop	1b
	mov	$16, %eax
	mov	$0xf4, %dx
	out	%eax, %dx
2:	hlt
	jmp	2b

	.balign 8
gdt:	.quad	0
	.quad	0x00cf9a000000ffff	# code, 32 bits
	.quad	0x00cf92000000ffff	# data
	.quad	0x00af9a000000ffff	# code, 64 bits
gdtr:	.word	. - gdt - 1
	.long	gdt
