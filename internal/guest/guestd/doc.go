// Package guestd is the one process of ours inside every sandbox. It starts
// the workload once the agent has configured it, reaps what is left behind, and
// serves the protocol of api/choiros/guest/v1 on the guest channel.
//
// In a container it is process 1, without a capability and as the image's user,
// and needs nothing of the image, not even /proc. In a virtual machine of an
// image's it is process 1, too, and root: it makes the machine (package machine)
// before it serves anything but Hello, and switches it off after the workload. In
// a guest with a system of its own, and in tests, it is an ordinary process that
// makes itself the reaper of all that descends from it. The package refuses to
// log: standard output and error are the workload's, or the machine's console,
// and a line of guestd's own says only why it ends.
//
// Two things have one place each. All children are started and waited for in
// processes.go, because process 1 must wait for any child and os/exec would
// race with that. All output of an exec goes through execution.deliver, so that
// what is read is either with whoever is attached or in the backlog.
package guestd
