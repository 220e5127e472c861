//go:build linux

// Package vhost is a vsock device for machines of QEMU's on hosts whose kernel
// has none to lend. QEMU shows the guest the device and lets this process do
// its work, by the vhost-user protocol: it hands over the guest's memory, in which
// the rings are, and event descriptors for each ring.
//
//	guest <--- rings in its memory ---> Device <--- socket pairs ---> whoever dials, or accepts
//
// The host's end of a connection is one end of a pair of unix sockets, so that it
// is what a connection of the kernel's is: a descriptor, with deadlines and
// half-closing, that can be passed to another process. Device carries between the
// other end and the guest, within the credit that each side gives the other.
//
// The protocols are those of
// https://qemu-project.gitlab.io/qemu/interop/vhost-user.html and of
// https://docs.oasis-open.org/virtio/virtio/v1.3/virtio-v1.3.html (2.7 split
// virtqueues, 5.10 socket device). Where they leave something open, a
// connection ends as one through Linux's vhost_vsock does.
package vhost
