//go:build linux

package qemu

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
)

// Accelerators: what runs the guest's instructions.
const (
	// Auto is KVM if a guest runs with it, and else TCG.
	Auto = "auto"
	KVM  = "kvm"
	// TCG is emulation.
	TCG = "tcg"
)

// Options say what a machine is run with. The zero value is what is right
// where the programs are installed as a distribution does it.
type Options struct {
	// Paths of the programs; empty: looked for in PATH, then in /usr/libexec
	// and /usr/lib/qemu. QEMU's is that of the guest's architecture.
	QEMU, Virtiofsd string
	// Accelerator is one of the constants; empty: Auto. Who makes many
	// machines asks Probe once and passes on what it said.
	Accelerator string
	// ShareUID and ShareGID are the user and the group inside that own what
	// this process's user and group own in a share outside. Whatever anybody
	// inside makes there is that user's outside.
	ShareUID, ShareGID uint32
}

// MissingError says that a program, or something of the kernel's, is not there.
type MissingError struct {
	// Name of what is missing.
	Name string
	// Cure is what mends it, for people.
	Cure string
}

func (e *MissingError) Error() string { return e.Name + " is not installed" }

// The packages that the programs are in.
const (
	qemuAMD64Cure = "Debian: apt-get install qemu-system-x86; NixOS: the package qemu"
	qemuARM64Cure = "Debian: apt-get install qemu-system-arm; NixOS: the package qemu"
	virtiofsdCure = "Debian: apt-get install virtiofsd; NixOS: the package virtiofsd"
)

var errUnknownArch = errors.New("architecture is not amd64 or arm64")

// qemuPath finds the QEMU for guests of an architecture.
func (o Options) qemuPath(arch string) (string, error) {
	switch arch {
	case "amd64":
		return find(o.QEMU, "qemu-system-x86_64", qemuAMD64Cure)
	case "arm64":
		return find(o.QEMU, "qemu-system-aarch64", qemuARM64Cure)
	}
	return "", fmt.Errorf("%q: %w", arch, errUnknownArch)
}

func (o Options) virtiofsdPath() (string, error) {
	return find(o.Virtiofsd, "virtiofsd", virtiofsdCure)
}

// find is where a program is, as an absolute path.
func find(given, name, cure string) (string, error) {
	if given != "" {
		path, err := exec.LookPath(given)
		if err != nil {
			return "", &MissingError{given, cure}
		}
		return filepath.Abs(path)
	}
	if path, err := exec.LookPath(name); err == nil {
		return filepath.Abs(path)
	}
	for _, dir := range []string{"/usr/libexec", "/usr/lib/qemu"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", &MissingError{name, cure}
}

// kernelVsock opens the kernel's own vsock device for guests.
func kernelVsock() (*os.File, error) { return os.OpenFile("/dev/vhost-vsock", os.O_RDWR, 0) }

// nativeKVM says whether KVM could run guests of that architecture here.
func nativeKVM(arch string) bool { return arch == runtime.GOARCH }
