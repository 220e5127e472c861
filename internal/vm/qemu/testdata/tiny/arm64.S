// What runTiny runs to see whether an accelerator works: PSCI's SYSTEM_OFF.
// Made with
//   aarch64-linux-gnu-as -o arm64.o arm64.S && aarch64-linux-gnu-objcopy -O binary arm64.o arm64.bin
	movz	w0, #0x0008
	movk	w0, #0x8400, lsl #16
	hvc	#0
1:	wfi
	b	1b
