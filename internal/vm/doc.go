// Package vm is the driver that runs sandboxes as virtual machines.
//
// Each machine has a shim, a process of its own (package shim), which owns all
// whose life is the machine's: the hypervisor (a Machine, of which the package
// knows no more than that), its network, the connections of its vsock, its
// console and its log. An agent that dies, or is replaced, touches no machine;
// a shim that dies takes its machine with it. What a sandbox is lies in a folder
// of the driver's: a driver that was opened a moment ago finds it all there.
//
// A machine is started from an OCI image, which becomes a read-only file system
// shared by all machines of that image with a writable layer of each one's own,
// booted with the guest kit: a kernel and guestd. Or it is started from a
// bundle, a folder with a kernel and disks of somebody else's in which guestd
// is a service.
//
// What it refuses to do:
//
//   - Put anything secret on a kernel's command line, in an initramfs, or on a
//     disk: what guestd is to know goes over vsock.
//   - Reach guestd by a network, or publish ports: what a sandbox serves is
//     reached over the guest channel.
//   - Let a machine reach the host's loopback, the host's own addresses, a
//     cloud's metadata service, or another machine.
//   - Accept a limit that this host would not enforce.
package vm
