// Package qemu is the body of vm.Machine on Linux: QEMU, told what to do over
// QMP, with KVM where that works and by emulation elsewhere.
//
// A machine is one QEMU process and one virtiofsd for each share. Where the
// kernel has no vsock of its own to lend, package vhost is it. The processes get a
// minimal environment, none of this process's descriptors but those meant for
// them, and the machine's folder to work in, so that no socket has a long name.
// If one of them dies the machine is killed; if this process dies, however,
// the kernel kills them (PR_SET_PDEATHSIG).
//
// What it refuses to do:
//
//   - Reboot. A guest that resets its machine has ended it, with an error: a
//     kernel that panics does that too.
//   - Run a machine whose /dev/kvm opens but does not work, or guess: Probe
//     runs a program of a few bytes and looks.
//   - Wait for a QEMU that does not answer. Every command has a deadline, and
//     Kill needs no answer.
package qemu
