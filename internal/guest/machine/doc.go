// Package machine makes a virtual machine what its shim says that it is to
// become: its modules, disks, shares, root and network, and in the end its
// switching off. It is what guestd does before, and after, there is a workload
// where it is the first process of a machine, and the part of that which is left
// where it is a service of a system that has a root of its own.
//
// It formats disks only if they are blank, mounts nothing at a path that the
// image leads elsewhere unseen, and starts nothing. All of it is done by one
// goroutine, before anything else runs in the machine, but for what keeps an
// address that a server gives (Made.KeepLease).
package machine
