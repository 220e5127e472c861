//go:build linux

package qemu

import (
	"flag"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/vm"
)

var update = flag.Bool("update", false, "write the golden files")

func TestArguments(t *testing.T) {
	t.Parallel()
	base := func(arch string) vm.Config {
		return vm.Config{
			Dir: "/var/lib/machine", Arch: arch, CPUs: 2, MemoryMiB: 512,
			Kernel: "kernel", Initrd: "initramfs", Cmdline: "console=hvc0 quiet",
		}
	}
	full := base("amd64")
	full.Disks = []vm.Disk{{Serial: "image", Path: "/images/a,b \"c\"", ReadOnly: true}, {Serial: "layer", Path: "layer.img"}}
	full.Shares = []vm.Share{{Tag: "work", Path: "/home/me/work"}, {Tag: "ref", Path: "/srv/ref", ReadOnly: true}}
	full.Network, full.MAC = os.Stdin, net.HardwareAddr{0x52, 0x54, 0, 1, 2, 3}
	full.Console, full.Vmlinux = os.Stdin, "vmlinux"
	nat := base("amd64")
	nat.NAT, nat.MAC = true, full.MAC
	restored := base("amd64")
	restored.Restore = "state"
	for name, p := range map[string]plan{
		"amd64-kvm": {config: base("amd64"), accelerator: KVM, vsock: vsockKernel, cid: 4096, fds: descriptors{qmp: 3, vsock: 4}},
		"amd64-tcg": {config: base("amd64"), accelerator: TCG, vsock: vsockUser, fds: descriptors{qmp: 3, vsock: 4}},
		"arm64-tcg": {config: base("arm64"), accelerator: TCG, vsock: vsockUser, fds: descriptors{qmp: 3, vsock: 4}},
		"full":      {config: full, accelerator: TCG, vsock: vsockUser, fds: descriptors{qmp: 3, network: 4, shares: []int{5, 6}, vsock: 7}},
		"nat":       {config: nat, accelerator: KVM, vsock: vsockKernel, cid: 4096, fds: descriptors{qmp: 3, vsock: 4}},
		"restore":   {config: restored, accelerator: KVM, vsock: vsockUser, fds: descriptors{qmp: 3}},
	} {
		golden(t, name, p.arguments())
	}
}

func TestShareArguments(t *testing.T) {
	t.Parallel()
	share := vm.Share{Tag: "work", Path: "/home/me/work"}
	golden(t, "share", shareArgs(share, "namespace", Options{}, 1000, 100))
	share.ReadOnly = true
	golden(t, "share-read-only", shareArgs(share, "none", Options{ShareUID: 1000, ShareGID: 1000}, 0, 0))
}

// golden compares arguments, an option and what belongs to it a line.
func golden(t *testing.T, name string, args []string) {
	t.Helper()
	var got strings.Builder
	for i, arg := range args {
		switch {
		case i == 0:
		case strings.HasPrefix(arg, "-"):
			got.WriteString("\n")
		default:
			got.WriteString(" ")
		}
		got.WriteString(arg)
	}
	got.WriteString("\n")
	file := filepath.Join("testdata", "golden", name)
	if *update {
		if err := os.WriteFile(file, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got.String()); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

func TestRangesAroundAnIDCoverAllOthers(t *testing.T) {
	t.Parallel()
	for _, id := range []uint32{0, 1, 1000, math.MaxUint32 - 2, math.MaxUint32 - 1} {
		total := uint64(1)
		for _, r := range around(id) {
			if r[1] == 0 || r[0] <= id && id < r[0]+r[1] {
				t.Errorf("%d is in %v", id, r)
			}
			total += uint64(r[1])
		}
		if total != math.MaxUint32 {
			t.Errorf("around %d: %d ids", id, total)
		}
	}
}
