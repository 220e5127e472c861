// Package vmtest runs real virtual machines for tests, emulated, so that they
// are the same wherever they run.
package vmtest

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mdlayher/vsock"

	imagestore "github.com/choiros/agent/internal/image"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest"
	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/qemu"
	"github.com/choiros/agent/internal/vm/qemu/vhost"
	"github.com/choiros/agent/test/image"
)

// shimFlag makes a test binary a shim.
const shimFlag = "-vm-shim"

// rebootingFlag makes it the shim of a machine that its guest can restart.
const rebootingFlag = "-vm-shim-rebooting"

// Main takes over if this process was started as a shim, and exits: of one whose
// environment names a translator (image.TranslatorEnv) machines have that for
// Rosetta. Else it
// has twice as many tests run at once as there are processors, since those of
// machines often wait. Call it in TestMain, before anything else.
func Main() {
	if len(os.Args) > 1 && os.Args[1] == shimFlag {
		os.Exit(vm.RunShim(os.Args[2:], func(ctx context.Context, c vm.Config) (vm.Machine, error) {
			if dir := os.Getenv(image.TranslatorEnv); c.Rosetta && dir != "" {
				c.Rosetta, c.Shares = false, append(c.Shares, vm.Share{Tag: vm.RosettaTag, Path: dir, ReadOnly: true})
			}
			return qemu.New(ctx, c, qemu.Options{Accelerator: qemu.TCG, ShareUID: c.ShareUID, ShareGID: c.ShareGID})
		}))
	}
	if len(os.Args) > 1 && os.Args[1] == rebootingFlag {
		os.Exit(vm.RunShim(os.Args[2:], newRebooting))
	}
	// The command line, which is read later, may say otherwise.
	if err := flag.Set("test.parallel", strconv.Itoa(2*runtime.GOMAXPROCS(0))); err != nil {
		panic(err) // then this is no test
	}
}

// probe asks once what this host can do.
var probe = sync.OnceValues(func() (qemu.Report, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	return qemu.Probe(ctx, qemu.Options{Accelerator: qemu.TCG})
})

// rebooting is a machine of QEMU's that is as Virtualization.framework's are: a
// guest that resets it is booted anew.
type rebooting struct{ vm.Machine }

func newRebooting(ctx context.Context, c vm.Config) (vm.Machine, error) {
	const program = `#!/bin/sh
for word; do
	shift
	[ "$word" = -no-reboot ] || set -- "$@" "$word"
done
exec qemu-system-x86_64 "$@"
`
	path := filepath.Join(c.Dir, "qemu") // which goes with the machine
	if err := os.WriteFile(path, []byte(program), 0o700); err != nil {
		return nil, err
	}
	m, err := qemu.New(ctx, c, qemu.Options{Accelerator: qemu.TCG, QEMU: path})
	if err != nil {
		return nil, err
	}
	return rebooting{m}, nil
}

// SourcePort implements vm.Rebooter.
func (rebooting) SourcePort(conn net.Conn) uint32 {
	if from, ok := conn.(*vhost.Accepted); ok {
		return from.SourcePort()
	}
	if from, ok := conn.RemoteAddr().(*vsock.Addr); ok {
		return from.Port
	}
	return math.MaxUint32
}

// Rebooting is Config with machines that do not end when their guests reset
// them, for guests of amd64.
func Rebooting(root string) (vm.DriverConfig, error) {
	config, err := Config(root, "amd64")
	config.Shim = []string{rebootingFlag}
	return config, err
}

// Open opens a driver on a folder, with the images beside it.
func Open(root string) (*vm.Driver, error) { return OpenFor(root, runtime.GOARCH) }

// OpenFor is Open for guests of an architecture.
func OpenFor(root, arch string) (*vm.Driver, error) {
	config, err := Config(root, arch)
	if err != nil {
		return nil, err
	}
	return vm.New(config)
}

// Config is what OpenFor makes a driver of.
func Config(root, arch string) (vm.DriverConfig, error) {
	images, err := imagestore.Open(filepath.Join(filepath.Dir(root), "images"))
	if err != nil {
		return vm.DriverConfig{}, err
	}
	images.Arch = arch
	return vm.DriverConfig{
		Root: root, Images: images, Kit: image.KitDirFor(arch), Bundles: Bundles(root), Arch: arch,
		Shim: []string{shimFlag}, KeyDir: KeyDir(root),
		// A binary built with the race detector would take a second to exit.
		Env: append(os.Environ(), "GORACE=atexit_sleep_ms=0"),
		Probe: func(context.Context) (sandbox.Report, error) {
			report, err := probe()
			return sandbox.Report{Version: report.Accelerator}, err
		},
	}, nil
}

// Bundles is where a driver opened on a folder has its bundles.
func Bundles(root string) string { return filepath.Join(filepath.Dir(root), "bundles") }

// KeyDir is where a driver opened on a folder keeps the keys of memories: a
// tmpfs on every Linux.
func KeyDir(root string) string {
	return filepath.Join("/dev/shm", "keys"+strings.ReplaceAll(root, "/", "-"))
}

// Backend makes a folder for machines, with the test images loaded, and returns
// it. Without QEMU the test is skipped, or fails if AGENT_REQUIRE has qemu in
// it. When the test ends nothing that runs may be left.
func Backend(t *testing.T) (root string) {
	t.Helper()
	require(t)
	image.Kit(t)
	return folder(t, image.RootOCI, image.UserDocker)
}

// BackendFor is Backend for guests of an architecture; see OpenFor. Loaded are
// the images of every architecture. What is missing for one that is not the
// host's is as if QEMU were.
func BackendFor(t *testing.T, arch string) (root string) {
	t.Helper()
	require(t)
	if arch == runtime.GOARCH {
		image.Kit(t)
	} else {
		drivertest.Require(t, "qemu", foreign(arch))
	}
	return folder(t, image.ArchOCI("amd64"), image.ArchOCI("arm64"))
}

// require skips or fails the test where machines do not run.
func require(t *testing.T) {
	t.Helper()
	report, err := probe()
	if err == nil && len(report.Missing) > 0 {
		err = errors.Join(report.Missing[0], errors.New(report.Missing[0].Cure))
	}
	drivertest.Require(t, "qemu", err)
}

// foreign says what is missing for guests of another architecture than the
// host's.
func foreign(arch string) error {
	program, cure := "qemu-system-x86_64", "Debian: apt-get install qemu-system-x86"
	if arch == "arm64" {
		program, cure = "qemu-system-aarch64", "Debian: apt-get install qemu-system-arm"
	}
	if _, err := exec.LookPath(program); err != nil {
		return &sandbox.UnavailableError{Err: err, Cure: cure}
	}
	if _, err := os.Stat(filepath.Join(image.KitDirFor(arch), "guest.json")); err != nil {
		return &sandbox.UnavailableError{Err: err, Cure: "make guest-kit ARCH=" + arch}
	}
	return nil
}

// folder makes a folder for machines, with images loaded.
func folder(t *testing.T, archives ...string) (root string) {
	t.Helper()
	base, err := os.MkdirTemp("", "vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		CheckNoProcess(t, base)
		if left, _ := filepath.Glob(filepath.Join(KeyDir(root), "*")); len(left) > 0 {
			t.Errorf("left: %s", left)
		}
		_ = os.RemoveAll(KeyDir(root))
		if err := os.RemoveAll(base); err != nil {
			t.Error(err)
		}
	})
	root = filepath.Join(base, "ours")
	d, err := Open(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range archives {
		archive, err := os.ReadFile(filepath.Join(image.Dir(t), file))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.LoadImage(t.Context(), bytes.NewReader(archive)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// Resources are those of a machine that is enough for a test.
func Resources() sandbox.Resources { return sandbox.Resources{CPUMillis: 1000, MemoryMiB: 192} }

// CheckNoProcess fails the test if a process works in a folder, as all that a
// shim starts does, or was started with one in it as an argument.
func CheckNoProcess(t *testing.T, dir string) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(20 * time.Second)
	for left := processesIn(dir); len(left) > 0; left = processesIn(dir) {
		select {
		case <-tick.C:
		case <-deadline:
			t.Errorf("processes are left: %s", strings.Join(left, "; "))
			return
		}
	}
}

func processesIn(dir string) []string {
	var found []string
	entries, _ := filepath.Glob("/proc/[0-9]*") // the pattern is a good one
	for _, entry := range entries {
		cwd, _ := os.Readlink(filepath.Join(entry, "cwd"))         // a process may be gone,
		cmdline, _ := os.ReadFile(filepath.Join(entry, "cmdline")) // or somebody else's
		args := strings.Split(string(cmdline), "\x00")
		if strings.HasPrefix(cwd, dir+"/") || slices.ContainsFunc(args, func(arg string) bool { return strings.HasPrefix(arg, dir+"/") }) {
			found = append(found, filepath.Base(entry)+" "+strings.Join(args, " "))
		}
	}
	return found
}
