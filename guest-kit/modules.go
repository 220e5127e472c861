package main

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os/exec"
	"strings"
)

// stages are the modules that guestd loads, in this order and by when they are
// needed: for the connection to the host, before it does anything for it, before
// that too but only if programs for another architecture are to run, and once
// the workload runs. Their dependencies come before them.
var stages = []struct {
	name    string
	modules []string
}{
	{"channel", []string{"vmw_vsock_virtio_transport"}},
	{"root", []string{"virtio_blk", "erofs", "overlay", "virtio_net", "tcp_diag", "udp_diag"}},
	{"rosetta", []string{"binfmt_misc"}},
	{"later", []string{"virtio_rng", "virtio_balloon", "tun"}},
}

// module is one that goes into the initramfs.
type module struct {
	name, stage string
	object      []byte
}

// selectModules returns what is to be loaded, in order.
func selectModules(ctx context.Context, packed map[string][]byte) ([]module, error) {
	var selected []module
	seen := map[string]bool{}
	var add func(name, stage string) error
	add = func(name, stage string) error {
		if seen[name] {
			return nil
		}
		seen[name] = true
		if packed[name] == nil {
			return fmt.Errorf("module %s is not in the kernel's package", name)
		}
		object, err := unxz(ctx, packed[name])
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		needs, err := dependencies(object)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		for _, need := range needs {
			if err := add(need, stage); err != nil {
				return fmt.Errorf("%w, and %s needs it", err, name)
			}
		}
		selected = append(selected, module{name, stage, unsigned(object)})
		return nil
	}
	for _, stage := range stages {
		for _, name := range stage.modules {
			if err := add(name, stage.name); err != nil {
				return nil, err
			}
		}
	}
	return selected, nil
}

// dependencies are those that a module says it has; depmod would read the same.
func dependencies(object []byte) ([]string, error) {
	file, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		return nil, err
	}
	section := file.Section(".modinfo")
	if section == nil {
		return nil, errors.New("it has no .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	var needs []string
	for field := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			for name := range strings.SplitSeq(list, ",") {
				needs = append(needs, moduleName(name))
			}
		}
	}
	return needs, nil
}

// unxz unpacks a module. The kernel could, too, and would take longer over it
// at every boot.
func unxz(ctx context.Context, packed []byte) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "xz", "--decompress", "--stdout")
	cmd.Stdin = bytes.NewReader(packed)
	object, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("xz: %w", err)
	}
	return object, nil
}

// signed ends a module that is signed (linux/module_signature.h). Before it are
// 12 bytes of what kind the signature is, with its length at the end of them,
// and before those is the signature.
var signed = []byte("~Module signature appended~\n")

// unsigned is a module without its signature, which the kernel would check at
// every boot: half a second for all of them where it is emulated. They are as
// trusted as guestd beside them, and as the kernel, which nobody checks either.
func unsigned(object []byte) []byte {
	const about = 12
	rest, found := bytes.CutSuffix(object, signed)
	if !found || len(rest) < about {
		return object
	}
	length := binary.BigEndian.Uint32(rest[len(rest)-4:])
	rest = rest[:len(rest)-about]
	if uint64(length) > uint64(len(rest)) {
		return object
	}
	return rest[:len(rest)-int(length)]
}
