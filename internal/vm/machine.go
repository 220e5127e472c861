package vm

import (
	"context"
	"errors"
	"net"
	"os"
)

// ErrNoListener is wrapped by Machine.Dial's error where nothing listens at
// that port inside, or the machine does not run.
var ErrNoListener = errors.New("nothing listens there")

// ErrCannotSave is wrapped by the errors of a machine whose state cannot be
// saved, or of a state that does not fit the machine.
var ErrCannotSave = errors.New("the machine's state cannot be saved")

// Machine is one virtual machine, from power on to power off, and all that is
// needed for it on the host: whoever makes one closes it, and with it goes
// every process, socket and descriptor that it brought. It never outlives the
// process that made it, however that ends.
//
// Its methods are what both Virtualization.framework (through vz) and QEMU can
// do, in the terms of the former. They are safe for concurrent use.
type Machine interface {
	// Start switches it on, or goes on from Config.Restore, and returns once
	// its processors run. It is called once.
	Start(ctx context.Context) error

	// PressPower presses the power button. What the guest makes of it shows
	// in Done, or does not.
	PressPower(ctx context.Context) error

	// Kill cuts the power. Of a machine that has ended it succeeds.
	Kill() error

	// Pause stops its processors, Resume lets them go on. Of a machine that
	// is paused already, or runs, they succeed.
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error

	// Save writes the state of a paused machine, its memory above all, to a
	// file that is not there yet. Disks are no part of it. The memory holds
	// secrets, so the file is sealed, and key opens it; it is empty where the
	// hypervisor seals with a key that never leaves the host, as
	// Virtualization.framework does. On an error there is no file, and the
	// machine is paused as before.
	Save(ctx context.Context, path string) (key []byte, err error)

	// Dial opens a byte stream to a vsock port inside. The caller closes the
	// connection, which has CloseWrite and is a syscall.Conn, so that it can
	// be passed to another process; ctx ends only the dialling.
	Dial(ctx context.Context, port uint32) (net.Conn, error)

	// Listen accepts what the guest connects to a vsock port of the host's.
	// It is called before Start. The listener ends with the machine.
	Listen(port uint32) (net.Listener, error)

	// Done is closed once the machine has ended, and nothing of it runs.
	Done() <-chan struct{}

	// Err says, once Done is closed, why the machine ended: nil if the guest
	// switched it off or Kill did.
	Err() error

	// Close kills the machine if it runs, and releases all that is its.
	Close() error
}

// Staller is a Machine that halts, and does not fail its guest, while the host
// has no room for what is written to a disk. It goes on by itself.
type Staller interface {
	// Stalled is sent true when it halts for that, and false when it goes on.
	Stalled() <-chan bool
}

// Rebooter is a Machine that does not end when its guest resets it, on purpose
// or by a panic: the guest is booted anew in its place, and nothing tells.
type Rebooter interface {
	// SourcePort is the guest's own port of a connection that Listen's listener
	// has accepted. The guest's kernel gives those below 1024 to processes with
	// CAP_NET_BIND_SERVICE alone.
	SourcePort(conn net.Conn) uint32
}

// Config is what a Machine is made of. Paths may be relative to Dir.
type Config struct {
	// Dir is a folder of this machine's alone, mode 0700: for sockets and
	// whatever else the body needs. What it makes there, Close removes.
	Dir string
	// Arch is GOARCH of the guest: amd64 or arm64.
	Arch      string
	CPUs      int
	MemoryMiB int

	// Kernel is uncompressed for arm64 (an Image), a bzImage for amd64; empty,
	// as are Initrd and Cmdline then: a firmware boots the disks.
	Kernel, Initrd, Cmdline string
	// Vmlinux is the same kernel as an ELF file with an entry for PVH, for
	// amd64; empty: there is none. A body that can starts it in Kernel's stead,
	// which saves the guest the unpacking, a third of its way to process 1
	// where it is emulated.
	Vmlinux string

	// Disks are virtio block devices, in this order.
	Disks  []Disk
	Shares []Share
	// Rosetta gives a machine for arm64 one share more, with the tag RosettaTag,
	// in which the program rosetta runs programs for amd64. A body that has none
	// refuses it.
	Rosetta bool
	// ShareUID and ShareGID are whom inside what this process's user has in
	// shares belongs to, where that can be chosen; all that anybody inside
	// makes there is that user's outside.
	ShareUID, ShareGID uint32

	// Network is one end of a pair of datagram sockets that carry Ethernet
	// frames, one each; nil: no network device. The machine takes it over.
	Network *os.File
	// NAT, with Network nil, gives it a network device on the host's own NAT:
	// there a DHCP server gives addresses, and no egress policy holds.
	NAT bool
	// MAC is the network device's.
	MAC net.HardwareAddr

	// Console is what the guest's first console (hvc0) is connected to, for
	// reading and writing; nil: to nothing. It stays the caller's.
	Console *os.File

	// Restore is a file that Save wrote, RestoreKey its key; empty: a cold boot.
	Restore    string
	RestoreKey []byte
}

// Disk is a block device.
type Disk struct {
	// Serial tells it apart inside; at most 20 bytes of [a-z0-9-].
	Serial string
	// Path of a raw image. A writable one is locked against another machine.
	Path     string
	ReadOnly bool
}

// Share is a folder of the host, shown by virtiofs.
type Share struct {
	// Tag tells it apart inside; at most 35 bytes of [a-z0-9-].
	Tag  string
	Path string
	// ReadOnly is honoured on the host's side, whatever the guest mounts.
	ReadOnly bool
}
