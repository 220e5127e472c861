package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"unicode"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/shim"
)

// bundleFile is what a folder with something that boots has in it.
const bundleFile = "guest.json"

const (
	// maxBundleFile bounds what is read of it, in bytes.
	maxBundleFile = 1 << 20
	// maxCmdline is the longest command line. Kernels read 2048 bytes and drop
	// the rest without a word, and the last of it is the driver's.
	maxCmdline = 1920
	// maxBundleDisks is how many disks of a bundle's there can be, beside the
	// devices that a machine has anyway.
	maxBundleDisks = 16
)

var (
	serialForm = regexp.MustCompile(`^[a-z0-9-]{1,20}$`)
	dataSerial = regexp.MustCompile(`^data[0-9]+$`) // see plan.mount
)

// bundle is something that boots: the guest kit, or a guest of somebody else's.
// docs/guest-kit.md says what the fields mean. Paths are absolute once read.
type bundle struct {
	Arch string `json:"arch"`
	// Kernel is empty if a firmware boots the disks.
	Kernel        string       `json:"kernel"`
	Vmlinux       string       `json:"vmlinux,omitempty"`
	Initrd        string       `json:"initrd"`
	Cmdline       string       `json:"cmdline"`
	KernelVersion string       `json:"kernel_version"`
	Disks         []bundleDisk `json:"disks"`
	Modules       []string     `json:"modules,omitempty"`
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

// copyName is the file in a box that a writable disk of a bundle's is copied to.
// A serial is one of a kind, and nothing else in a box is called that.
func (d bundleDisk) copyName() string { return "disk-" + d.Serial + ".img" }

// path is the file that a sandbox's machine has for it.
func (d bundleDisk) path(b shim.Box) string {
	if d.Writable {
		return b.Path(d.copyName())
	}
	return d.File
}

// readBundle reads the bundle in a folder and sees that its files are there.
// They may be links to where they are: whoever makes a bundle may have its
// machines read what the agent's user can.
func readBundle(dir, arch string) (bundle, error) {
	var b bundle
	file := filepath.Join(dir, bundleFile)
	text, err := readSmall(file)
	if err != nil {
		return b, err
	}
	if err := json.Unmarshal(text, &b); err != nil {
		return b, fmt.Errorf("%s: %w", file, err)
	}
	if err := b.check(arch); err != nil {
		return b, fmt.Errorf("%s: %w", file, err)
	}
	for _, field := range b.files() {
		if *field.file, err = inBundle(dir, *field.file); err != nil {
			return b, fmt.Errorf("%s: %s: %w", file, field.name, err)
		}
	}
	if b.Kernel == "" {
		return b, nil
	}
	_, err = ReadKernel(b.Kernel, b.Arch)
	return b, err
}

// readSmall reads the file that describes a bundle, whatever is in its place.
func readSmall(path string) ([]byte, error) {
	// Opened so, a FIFO that nobody writes to does not hold who opens it.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", path)
	case info.Size() > maxBundleFile:
		return nil, fmt.Errorf("%s is longer than %d bytes", path, maxBundleFile)
	}
	return io.ReadAll(io.LimitReader(file, maxBundleFile))
}

// check refuses what no machine is made from.
func (b bundle) check(arch string) error {
	switch {
	case b.Arch != arch:
		return fmt.Errorf("arch: it is for %q, and guests here are %s", b.Arch, arch)
	case b.Kernel == "" && b.Vmlinux+b.Initrd+b.Cmdline != "":
		return errors.New("kernel: it names none, to which its vmlinux, initrd or cmdline could belong")
	case b.Kernel == "" && len(b.Disks) == 0:
		return errors.New("kernel: it names none, and no disks that a firmware could boot")
	case strings.ContainsFunc(b.Cmdline, unicode.IsControl):
		return errors.New("cmdline: it has control characters")
	case len(b.Cmdline) > maxCmdline:
		return fmt.Errorf("cmdline: it is longer than %d bytes, of what a kernel reads", maxCmdline)
	case len(b.Disks) > maxBundleDisks:
		return fmt.Errorf("disks: %d are more than %d", len(b.Disks), maxBundleDisks)
	}
	seen := map[string]bool{}
	for i, disk := range b.Disks {
		field := fmt.Sprintf("disks[%d]", i)
		switch {
		case disk.File == "":
			return fmt.Errorf("%s.file: it names none", field)
		case !serialForm.MatchString(disk.Serial):
			return fmt.Errorf("%s.serial: %q is not 1 to 20 of a-z, 0-9 and -", field, disk.Serial)
		case dataSerial.MatchString(disk.Serial):
			return fmt.Errorf("%s.serial: %s is one of the sandbox's own disks", field, disk.Serial)
		case seen[disk.Serial]:
			return fmt.Errorf("%s.serial: %s is another disk's, too", field, disk.Serial)
		}
		seen[disk.Serial] = true
	}
	return nil
}

// bundleField is where a bundle names a file.
type bundleField struct {
	name string
	file *string
}

// files are the fields that name files, but for those that need not and do not.
func (b *bundle) files() []bundleField {
	var fields []bundleField
	for _, optional := range []bundleField{{"kernel", &b.Kernel}, {"vmlinux", &b.Vmlinux}, {"initrd", &b.Initrd}} {
		if *optional.file != "" {
			fields = append(fields, optional)
		}
	}
	for i := range b.Disks {
		fields = append(fields, bundleField{fmt.Sprintf("disks[%d].file", i), &b.Disks[i].File})
	}
	return fields
}

// inBundle is the absolute path of a file that a bundle names.
func inBundle(dir, name string) (string, error) {
	if !filepath.IsLocal(name) {
		return "", fmt.Errorf("%q leads out of its folder", name)
	}
	path := filepath.Join(dir, name)
	info, err := os.Stat(path)
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	return path, err
}

// kit reads the guest kit, which images are booted with.
func (d *Driver) kit() (bundle, error) {
	kit, err := readBundle(d.cfg.Kit, d.cfg.Arch)
	if err == nil && (kit.Kernel == "" || kit.Initrd == "") {
		err = errors.New("it has no kernel or no initrd")
	}
	if err == nil {
		return kit, nil
	}
	cure := "agentctl guest-kit install, with that of a release; or build it with make guest-kit, or name its folder with vm.guest_kit"
	if !errors.Is(err, fs.ErrNotExist) {
		cure = "agentctl guest-kit install, with that of a release, or build it anew with make guest-kit"
	}
	return bundle{}, &sandbox.UnavailableError{Err: fmt.Errorf("no guest kit: %w", err), Cure: cure}
}
