package vz

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/choiros/agent/internal/vm"
)

// Options say what vm.Config does not.
type Options struct {
	// Home is a folder that is kept for as long as the sandbox is: a machine
	// has its identifier there, and the variables of its firmware.
	Home string
}

// Names of what a machine has in Options.Home.
const (
	identifierFile = "machine-identifier"
	variablesFile  = "efi-variables"
)

// mostPageKiB is the size of the largest pages that Apple silicon has: of the
// granules of arm64 it lacks that of 64 KiB.
const mostPageKiB = 16

var (
	serialForm = regexp.MustCompile(`^[a-z0-9-]{1,20}$`)
	tagForm    = regexp.MustCompile(`^[a-z0-9-]{1,35}$`)
)

// draw makes a blueprint of a configuration. It refuses what cannot be a
// machine, or not here, and looks whether all files are there; it makes the
// machine's identifier if there is none yet.
func draw(f framework, c vm.Config, options Options) (blueprint, error) {
	b := blueprint{Network: c.Network, NAT: c.NAT, MAC: c.MAC, Console: c.Console}
	switch {
	case c.Dir == "" || options.Home == "":
		return b, errors.New("no folder for the machine")
	case c.Network != nil && c.NAT:
		return b, errors.New("two networks, and one network device")
	case (c.Network != nil || c.NAT) && (len(c.MAC) != 6 || c.MAC[0]&1 != 0):
		return b, fmt.Errorf("%q is no address of an Ethernet device", c.MAC)
	}
	if err := checkVersion(f, leastMajor); err != nil {
		return b, err
	}
	for _, step := range []func(framework, vm.Config, Options) error{b.setArch, b.setSize, b.setBoot, b.setDisks, b.setShares} {
		if err := step(f, c, options); err != nil {
			return b, err
		}
	}
	if c.Restore != "" {
		if err := checkSavedStates(f); err != nil {
			return b, fmt.Errorf("restore: %w: %w", vm.ErrCannotSave, err)
		}
		if err := isFile(c, "state to restore", c.Restore); err != nil {
			return b, err
		}
	}
	var err error
	b.MachineIdentifier, err = identifier(f, filepath.Join(options.Home, identifierFile))
	return b, err
}

// setArch refuses a machine of another architecture than this Mac's.
func (b *blueprint) setArch(f framework, c vm.Config, _ Options) error {
	host := f.GOARCH()
	if c.Arch != host {
		if c.Arch == "amd64" && host == "arm64" {
			problem := &HostError{
				Problem: "an x86-64 machine cannot run on Apple silicon",
				Cure:    "use arm64; images for x86-64 run in an arm64 machine that has Rosetta",
			}
			if err := checkRosetta(f); err != nil {
				return errors.Join(problem, err)
			}
			return problem
		}
		return &HostError{Problem: fmt.Sprintf("a machine for %s cannot run on this Mac", c.Arch), Cure: "use " + host}
	}
	if !c.Rosetta {
		return nil
	}
	b.RosettaTag = vm.RosettaTag
	return checkRosetta(f)
}

// setSize refuses more processors or memory than there can be, and takes what
// is too little up to the least.
func (b *blueprint) setSize(f framework, c vm.Config, _ Options) error {
	if c.CPUs < 1 || c.MemoryMiB < 1 {
		return fmt.Errorf("%d processors and %d MiB of memory: too little", c.CPUs, c.MemoryMiB)
	}
	most, mostMemory := f.VirtualMachineConfigurationMaximumAllowedCPUCount(), f.VirtualMachineConfigurationMaximumAllowedMemorySize()
	b.CPUs = max(uint(c.CPUs), f.VirtualMachineConfigurationMinimumAllowedCPUCount())
	b.MemorySize = max(uint64(c.MemoryMiB)<<20, f.VirtualMachineConfigurationMinimumAllowedMemorySize())
	if b.CPUs > most {
		return &HostError{
			Problem: fmt.Sprintf("%d processors are more than a virtual machine can have on this Mac", c.CPUs),
			Cure:    fmt.Sprintf("give it %d or fewer", most),
		}
	}
	if b.MemorySize > mostMemory {
		return &HostError{
			Problem: fmt.Sprintf("%d MiB of memory are more than a virtual machine can have on this Mac", c.MemoryMiB),
			Cure:    fmt.Sprintf("give it %d or less", mostMemory>>20),
		}
	}
	return nil
}

// setBoot chooses what boots: a kernel, or without one EFI.
func (b *blueprint) setBoot(_ framework, c vm.Config, options Options) error {
	if c.Kernel == "" {
		if c.Initrd != "" || c.Cmdline != "" {
			return errors.New("an initrd or a command line, and no kernel")
		}
		b.EFIVariableStore = absolute(filepath.Join(options.Home, variablesFile))
		_, err := os.Stat(b.EFIVariableStore)
		b.CreateEFIVariableStore = errors.Is(err, fs.ErrNotExist)
		return nil
	}
	if strings.ContainsRune(c.Cmdline, 0) {
		return errors.New("the kernel command line has a zero byte")
	}
	if err := isFile(c, "kernel", c.Kernel); err != nil {
		return err
	}
	b.Kernel, b.CommandLine = inDir(c, c.Kernel), c.Cmdline
	switch kernel, err := vm.ReadKernel(b.Kernel, c.Arch); {
	case err != nil:
		return err
	case kernel.PageKiB > mostPageKiB:
		return &HostError{
			Problem: fmt.Sprintf("the kernel %s has pages of %d KiB, and Apple silicon none above %d", b.Kernel, kernel.PageKiB, mostPageKiB),
			Cure:    "take one that was built with CONFIG_ARM64_4K_PAGES or CONFIG_ARM64_16K_PAGES",
		}
	}
	if c.Initrd == "" {
		return nil
	}
	b.Initrd = inDir(c, c.Initrd)
	return isFile(c, "initrd", c.Initrd)
}

// setDisks adds the disks. Writes go through the host's page cache, and reach
// the Mac's disk with fsync(2) at the guest's flushes; so do reads. What the
// framework would choose itself (automatic) has corrupted the file systems of
// Linux guests:
//   - github.com/utmapp/UTM/issues/4840, and what came of it in pull request 5919
//   - github.com/lima-vm/lima/issues/1957, pull request 2026
//   - github.com/crc-org/vfkit/pull/76
//   - github.com/apple/containerization/pull/576
//
// fsync leaves what was flushed in the disk's own cache (see fsync(2) of
// Darwin), where a panic of the Mac does not reach it, but a power cut does.
func (b *blueprint) setDisks(_ framework, c vm.Config, _ Options) error {
	seen := map[string]bool{}
	for _, disk := range c.Disks {
		if !serialForm.MatchString(disk.Serial) || seen[disk.Serial] {
			return fmt.Errorf("disk serial %q: not 1 to 20 of a-z, 0-9 and -, or not unique", disk.Serial)
		}
		seen[disk.Serial] = true
		if err := isFile(c, "disk "+disk.Serial, disk.Path); err != nil {
			return err
		}
		b.Disks = append(b.Disks, blockDevice{
			Identifier: disk.Serial, Path: inDir(c, disk.Path), ReadOnly: disk.ReadOnly,
			CachingMode: cached, SyncMode: syncFsync,
		})
	}
	return checkLocks(c)
}

func (b *blueprint) setShares(_ framework, c vm.Config, _ Options) error {
	seen := map[string]bool{b.RosettaTag: true}
	for _, share := range c.Shares {
		if !tagForm.MatchString(share.Tag) || seen[share.Tag] {
			return fmt.Errorf("share tag %q: not 1 to 35 of a-z, 0-9 and -, or not unique", share.Tag)
		}
		seen[share.Tag] = true
		path := inDir(c, share.Path)
		info, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("share %s: the folder %s is gone; make it again, or make the sandbox anew without it: %w", share.Tag, path, fs.ErrNotExist)
		}
		if err == nil && !info.IsDir() {
			err = fmt.Errorf("%s is not a folder", path)
		}
		if err != nil {
			return fmt.Errorf("share %s: %w", share.Tag, err)
		}
		b.Shares = append(b.Shares, directoryShare{Tag: share.Tag, Path: path, ReadOnly: share.ReadOnly})
	}
	return nil
}

// identifier is what tells the machine apart, which is in a file and stays the
// same: a state can be restored by a machine with the same one alone, see
// github.com/cirruslabs/tart/pull/1297.
func identifier(f framework, path string) ([]byte, error) {
	known, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("machine identifier: %w", err)
	}
	if len(known) > 0 {
		return known, nil
	}
	made, err := f.NewGenericMachineIdentifier()
	if err == nil && len(made) == 0 {
		err = errors.New("macOS made an empty one")
	}
	if err == nil {
		// Whole or not at all, however this ends.
		if err = os.WriteFile(path+".new", made, 0o600); err == nil {
			err = os.Rename(path+".new", path)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("machine identifier: %w", said(err))
	}
	return made, nil
}

// inDir is a path of the configuration's, absolute: the framework has the files
// opened by another process.
func inDir(c vm.Config, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return absolute(filepath.Join(c.Dir, path))
}

// absolute is a path as it is from here, if that can be said.
func absolute(path string) string {
	if whole, err := filepath.Abs(path); err == nil {
		return whole
	}
	return path
}

func isFile(c vm.Config, what, path string) error {
	info, err := os.Stat(inDir(c, path))
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}
