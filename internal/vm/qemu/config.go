//go:build linux

package qemu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/choiros/agent/internal/vm"
)

var (
	serialForm = regexp.MustCompile(`^[a-z0-9-]{1,20}$`)
	tagForm    = regexp.MustCompile(`^[a-z0-9-]{1,35}$`)
)

// check refuses what cannot be a machine before anything is touched, and looks
// whether all its files are there.
func check(c vm.Config) error {
	switch {
	case c.Dir == "":
		return errors.New("no folder for the machine")
	case c.CPUs < 1 || c.CPUs > 255:
		return fmt.Errorf("%d processors: not from 1 to 255", c.CPUs)
	case c.Rosetta:
		return errors.New("an image for amd64 cannot run in this machine: QEMU has no Rosetta; use an image for " + c.Arch)
	case c.MemoryMiB < 32:
		return fmt.Errorf("%d MiB of memory: less than 32", c.MemoryMiB)
	case strings.ContainsRune(c.Cmdline, 0):
		return errors.New("the kernel command line has a zero byte")
	case c.Network != nil && c.NAT:
		return errors.New("two networks, and one network device")
	case (c.Network != nil || c.NAT) && (len(c.MAC) != 6 || c.MAC[0]&1 != 0):
		return fmt.Errorf("%q is no address of an Ethernet device", c.MAC)
	}
	seen := map[string]bool{}
	for _, disk := range c.Disks {
		if !serialForm.MatchString(disk.Serial) || seen[disk.Serial] {
			return fmt.Errorf("disk serial %q: not 1 to 20 of a-z, 0-9 and -, or not unique", disk.Serial)
		}
		seen[disk.Serial] = true
		if err := readable(c, "disk "+disk.Serial, disk.Path); err != nil {
			return err
		}
	}
	clear(seen)
	for _, share := range c.Shares {
		if !tagForm.MatchString(share.Tag) || seen[share.Tag] {
			return fmt.Errorf("share tag %q: not 1 to 35 of a-z, 0-9 and -, or not unique", share.Tag)
		}
		seen[share.Tag] = true
		info, err := os.Stat(inDir(c, share.Path))
		if err == nil && !info.IsDir() {
			err = fmt.Errorf("%s is not a folder", share.Path)
		}
		if err != nil {
			return fmt.Errorf("share %s: %w", share.Tag, err)
		}
	}
	if c.Initrd != "" {
		if err := readable(c, "initrd", c.Initrd); err != nil {
			return err
		}
	}
	if c.Restore != "" {
		if err := readable(c, "state to restore", c.Restore); err != nil {
			return err
		}
	}
	return checkKernel(c)
}

// inDir is a path of the configuration's as this process names it.
func inDir(c vm.Config, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(c.Dir, path)
}

func readable(c vm.Config, what, path string) error {
	file, err := os.Open(inDir(c, path))
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return file.Close()
}
