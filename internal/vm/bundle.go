package vm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/choiros/agent/internal/sandbox"
)

// bundleFile is what a folder with something that boots has in it.
const bundleFile = "guest.json"

// maxBundleFile bounds what is read of it.
const maxBundleFile = 1 << 20

// bundle is something that boots: the guest kit, or a guest of somebody else's.
// docs/guest-kit.md says what the fields mean. Paths are absolute once read.
type bundle struct {
	Arch          string       `json:"arch"`
	Kernel        string       `json:"kernel"`
	Vmlinux       string       `json:"vmlinux,omitempty"`
	Initrd        string       `json:"initrd"`
	Cmdline       string       `json:"cmdline"`
	KernelVersion string       `json:"kernel_version"`
	Disks         []bundleDisk `json:"disks"`
}

// bundleDisk is a disk of a bundle's.
type bundleDisk struct {
	// File in the bundle: a raw image.
	File string `json:"file"`
	// Serial by which the guest knows it.
	Serial string `json:"serial"`
	// Writable gives each sandbox a copy of its own.
	Writable bool `json:"writable"`
}

// readBundle reads the bundle in a folder and sees that its files are there.
func readBundle(dir, arch string) (bundle, error) {
	var b bundle
	file, err := os.Open(filepath.Join(dir, bundleFile))
	if err != nil {
		return b, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxBundleFile))
	if err != nil {
		return b, err
	}
	if err := json.NewDecoder(bytes.NewReader(data)).Decode(&b); err != nil {
		return b, fmt.Errorf("%s: %w", file.Name(), err)
	}
	if b.Arch != arch {
		return b, fmt.Errorf("%s: it is for %s, and guests here are %s", file.Name(), b.Arch, arch)
	}
	if b.Kernel == "" {
		return b, fmt.Errorf("%s: kernel: it names none", file.Name())
	}
	names := []*string{&b.Kernel}
	for _, optional := range []*string{&b.Vmlinux, &b.Initrd} {
		if *optional != "" {
			names = append(names, optional)
		}
	}
	for i := range b.Disks {
		names = append(names, &b.Disks[i].File)
	}
	for _, name := range names {
		if !filepath.IsLocal(*name) {
			return b, fmt.Errorf("%s: %q leads out of its folder", file.Name(), *name)
		}
		*name = filepath.Join(dir, *name)
		info, err := os.Stat(*name)
		if err != nil {
			return b, err
		}
		if !info.Mode().IsRegular() {
			return b, fmt.Errorf("%s is not a regular file", *name)
		}
	}
	return b, nil
}

// kit reads the guest kit, which images are booted with.
func (d *Driver) kit() (bundle, error) {
	kit, err := readBundle(d.cfg.Kit, d.cfg.Arch)
	if err == nil && kit.Initrd == "" {
		err = errors.New("it has no initrd")
	}
	if err == nil {
		return kit, nil
	}
	cure := "build it with make guest-kit, or name its folder with vm.guest_kit"
	if !errors.Is(err, fs.ErrNotExist) {
		cure = "build it anew with make guest-kit"
	}
	return bundle{}, &sandbox.UnavailableError{Err: fmt.Errorf("no guest kit: %w", err), Cure: cure}
}
