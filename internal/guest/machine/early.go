//go:build linux

package machine

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// Initramfs is what the kernel started guestd from.
type Initramfs struct {
	root *os.Root
}

// kernelFS is a file system of the kernel's own, or one in memory.
type kernelFS struct {
	target, kind string
	flags        uintptr
	data         string
}

const noFiles = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// early are those that are needed to find anything out; they move along to the
// root that is made. late are mounted there.
var (
	early = []kernelFS{
		{"/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
		{"/sys", "sysfs", noFiles, ""},
		{"/proc", "proc", noFiles, ""},
	}
	late = []kernelFS{
		{"/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"},
		{"/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"/dev/mqueue", "mqueue", noFiles, ""},
		{"/sys/fs/cgroup", "cgroup2", noFiles, "nsdelegate,memory_recursiveprot"},
	}
)

// Begin is the first thing that the first process does.
func Begin() (*Initramfs, error) {
	for _, fs := range early {
		if err := fs.mount(); err != nil {
			return nil, err
		}
	}
	root, err := os.OpenRoot("/")
	if err != nil {
		return nil, err
	}
	return &Initramfs{root}, nil
}

func (fs kernelFS) mount() error {
	if err := os.MkdirAll(fs.target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(fs.kind, fs.target, fs.kind, fs.flags, fs.data); err != nil {
		return fmt.Errorf("mount %s: %w", fs.target, err)
	}
	return nil
}

// Stages of loading modules, by what needs them; see modules/order in the kit.
const (
	StageChannel = "channel" // the connection to the host
	stageRoot    = "root"    // what this package does for every machine
	stageRosetta = "rosetta" // what it does for one with Rosetta
	StageLater   = "later"   // all that can wait
)

// LoadModules loads the modules of a stage, in their order. That one cannot be
// loaded is an error once the others are: what needs it will say more.
func (i *Initramfs) LoadModules(stage string) error {
	order, err := i.root.ReadFile("modules/order")
	if err != nil {
		return err
	}
	var failed error
	for line := range strings.Lines(string(order)) {
		if of, file, ok := strings.Cut(strings.TrimSpace(line), " "); ok && of == stage {
			failed = errors.Join(failed, i.load(file))
		}
	}
	return failed
}

func (i *Initramfs) load(name string) error {
	file, err := i.root.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := unix.FinitModule(int(file.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", name, err)
	}
	return nil
}

// Free gives back the memory of what is not needed again.
func (i *Initramfs) Free() {
	for _, name := range []string{"modules", "init"} {
		_ = i.root.RemoveAll(name) // then it stays
	}
	_ = i.root.Close()
}

// HostPort is the host's vsock port that stands for port. Where vsock is the
// host kernel's its ports are shared by all guests, and each has its own at the
// distance of its CID.
func HostPort(port uint32) (uint32, error) {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil || !slices.Contains(strings.Fields(string(cmdline)), "choiros.hostports=cid") {
		return port, err
	}
	cid, err := vsock.ContextID()
	return port + cid, err
}

// OOMKills is how many processes the kernel has killed for want of memory since
// the machine was switched on.
func OOMKills() uint64 {
	text, err := os.ReadFile("/proc/vmstat")
	if err != nil {
		return 0
	}
	return ParseOOMKills(string(text))
}
