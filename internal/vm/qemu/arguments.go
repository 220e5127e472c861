//go:build linux

package qemu

import (
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/choiros/agent/internal/vm"
)

// The ways of vsock to a guest.
type vsockKind int

const (
	// vsockKernel is /dev/vhost-vsock.
	vsockKernel vsockKind = iota + 1
	// vsockUser is package vhost.
	vsockUser
)

// userCID is the guest's address where package vhost is its device, which
// serves one guest: no two meet.
const userCID = 3

// What is named in QMP too.
const (
	vsockDevice  = "vsock0"
	vsockChardev = "vsockchr0"
	vsockPort    = "port0" // the one slot that a device can be unplugged from
	memoryID     = "mem"
)

// descriptors are the numbers of what QEMU inherits; 0: none.
type descriptors struct {
	qmp     int
	network int
	// vsock is /dev/vhost-vsock, or a connection to package vhost.
	vsock int
	// shares are connections to virtiofsd, one for each share.
	shares []int
}

// plan is all that QEMU's arguments are made of.
type plan struct {
	config      vm.Config
	accelerator string
	vsock       vsockKind
	cid         uint32
	fds         descriptors
}

// emulatedWords are for a guest's kernel that has an emulated processor. That has
// none of the faults of real ones, and what guards against them is slow: page
// tables of the kernel's own empty the TLB twice in each system call. And a
// kernel panics if a timer does not interrupt it within some loops of its own,
// which on a host that is busy is no sign of a broken timer.
func emulatedWords(arch string) string {
	if arch == "amd64" {
		return " mitigations=off no_timer_check"
	}
	return " mitigations=off"
}

// machineArgs are what machines of an architecture have in common.
//
// Measured under TCG, from power on to process 1, q35, pc and a q35 with a
// root port do not differ; microvm finds no clock to measure the processor's
// with, and hangs. The processor that TCG emulates is an old one: what newer
// ones add (five-level page tables, protection keys, AVX) costs emulation time.
// Not so its random numbers: a kernel that QEMU boots by PVH is given no seed,
// and without any it waits for the jitter of an emulated clock, now and then
// for minutes.
//
// TCG has one thread for all processors: with one for each, a machine of two
// now and then (one boot in about twenty) dies of the assertion in QEMU's
// iotlb_to_section, or hangs, while its devices are mapped
// (gitlab.com/qemu-project/qemu/-/issues/1921, not mended in 10.0).
func machineArgs(arch, accelerator string) []string {
	machine, cpu := "q35,usb=off,vmport=off,smbus=off,sata=off,hpet=off,graphics=off", "Nehalem,+rdrand"
	if arch == "arm64" {
		machine, cpu = "virt,gic-version=3", "cortex-a72"
		if accelerator == KVM {
			machine = "virt,gic-version=host"
		}
	}
	accel := "tcg,thread=single"
	if accelerator == KVM {
		accel, cpu = "kvm", "host"
	}
	return []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", machine, "-accel", accel, "-cpu", cpu,
	}
}

// arguments are QEMU's. It starts stopped, and, if a state is to be restored,
// waits to be told where that is.
func (p plan) arguments() []string {
	c := p.config
	args := append(machineArgs(c.Arch, p.accelerator), "-S",
		"-smp", strconv.Itoa(c.CPUs), "-m", fmt.Sprintf("%dM", c.MemoryMiB))
	if p.vsock == vsockUser || len(c.Shares) > 0 {
		// These devices are in other processes, which map the guest's memory.
		args = append(args, "-machine", "memory-backend="+memoryID,
			"-object", fmt.Sprintf("memory-backend-memfd,id=%s,size=%dM,share=on", memoryID, c.MemoryMiB))
	}
	args = append(args, "-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", p.fds.qmp), "-mon", "chardev=qmp,mode=control",
		"-kernel", kernelOf(c), "-append", c.Cmdline)
	if c.Initrd != "" {
		args = append(args, "-initrd", c.Initrd)
	}
	args = append(args, p.console()...)
	for i, disk := range c.Disks {
		args = append(args, diskArgs(i, disk)...)
	}
	if c.Network != nil || c.NAT {
		backend := "user,id=net0" // QEMU's own, which has a DHCP server
		if c.Network != nil {
			backend = fmt.Sprintf("dgram,id=net0,local.type=fd,local.str=%d", p.fds.network)
		}
		args = append(args, "-netdev", backend,
			"-device", fmt.Sprintf("virtio-net-pci,disable-legacy=on,netdev=net0,mac=%s,romfile=", c.MAC))
	}
	args = append(args,
		"-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-pci,disable-legacy=on,rng=rng0",
		"-device", "virtio-balloon-pci,disable-legacy=on,free-page-reporting=on",
		"-device", "pcie-root-port,id="+vsockPort+",chassis=1")
	args = append(args, p.vsockArgs()...)
	for i, share := range c.Shares {
		args = append(args, "-chardev", fmt.Sprintf("socket,id=fs%d,fd=%d", i, p.fds.shares[i]),
			"-device", fmt.Sprintf("vhost-user-fs-pci,chardev=fs%d,tag=%s,queue-size=1024", i, share.Tag))
	}
	if c.Restore != "" {
		args = append(args, "-incoming", "defer")
	}
	return args
}

// console connects the first console to standard input and output, which may
// be any kind of file.
func (p plan) console() []string {
	backend := "null,id=con0"
	if p.config.Console != nil {
		backend = "stdio,id=con0,signal=off"
	}
	return []string{
		"-device", "virtio-serial-pci,disable-legacy=on,max_ports=1", "-chardev", backend,
		"-device", "virtconsole,chardev=con0",
	}
}

// vsockArgs are the vsock device. One that is in another process cannot be
// saved with the machine's state, so a machine that restores one has none until
// that is done.
func (p plan) vsockArgs() []string {
	switch {
	case p.vsock == vsockKernel:
		return []string{"-device", fmt.Sprintf("vhost-vsock-pci,disable-legacy=on,guest-cid=%d,vhostfd=%d,bus=%s", p.cid, p.fds.vsock, vsockPort)}
	case p.config.Restore == "":
		return []string{
			"-chardev", fmt.Sprintf("socket,id=%s,fd=%d", vsockChardev, p.fds.vsock),
			"-device", fmt.Sprintf("vhost-user-vsock-pci,id=%s,chardev=%s,bus=%s", vsockDevice, vsockChardev, vsockPort),
		}
	}
	return nil
}

// blockdev is QAPI's BlockdevOptions, as far as it is used here.
type blockdev struct {
	NodeName string    `json:"node-name,omitempty"`
	Driver   string    `json:"driver"`
	ReadOnly bool      `json:"read-only"`
	Discard  string    `json:"discard"`
	Filename string    `json:"filename,omitempty"`
	Locking  string    `json:"locking,omitempty"`
	AIO      string    `json:"aio,omitempty"`
	File     *blockdev `json:"file,omitempty"`
}

// diskArgs are a disk. Its format is never guessed from what a guest wrote
// there. Writes go through the host's page cache and reach the disk at the
// guest's flushes; what the guest discards becomes a hole.
func diskArgs(i int, disk vm.Disk) []string {
	node := fmt.Sprintf("disk%d", i)
	options, err := json.Marshal(blockdev{
		NodeName: node, Driver: "raw", ReadOnly: disk.ReadOnly, Discard: "unmap",
		File: &blockdev{
			Driver: "file", ReadOnly: disk.ReadOnly, Discard: "unmap",
			Filename: disk.Path, Locking: "on", AIO: "threads",
		},
	})
	if err != nil {
		panic(err) // strings and booleans can be encoded
	}
	return []string{
		"-blockdev", string(options),
		"-device", fmt.Sprintf("virtio-blk-pci,disable-legacy=on,drive=%s,serial=%s", node, disk.Serial),
	}
}
