//go:build linux

package qemu_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest"
	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/qemu"
	"github.com/choiros/agent/test/image"
)

// bootLimit is how long a guest may take where its processor is emulated, on a
// machine that does other things too.
const bootLimit = 3 * time.Minute

// files is what all guests here boot, and what they are run with.
type files struct {
	kernel, initrd string
	options        qemu.Options
}

var prepare = sync.OnceValues(func() (*files, error) {
	report, err := qemu.Probe(context.Background(), qemu.Options{})
	if err != nil {
		return nil, err
	}
	for _, missing := range report.Missing {
		return nil, &sandbox.UnavailableError{Err: missing, Cure: missing.Cure}
	}
	kit := image.KitDir()
	f := &files{kernel: filepath.Join(kit, "kernel"), options: qemu.Options{Accelerator: report.Accelerator}}
	initramfs, err := os.ReadFile(filepath.Join(kit, "initramfs"))
	if err != nil {
		return nil, &sandbox.UnavailableError{Err: err, Cure: "make guest-kit"}
	}
	dir, err := os.MkdirTemp("", "qemu-test-")
	if err != nil {
		return nil, err
	}
	init := filepath.Join(dir, "init")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", init, "./testdata/init")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the guests' init: %w: %s", err, said)
	}
	program, err := os.ReadFile(init)
	if err != nil {
		return nil, err
	}
	f.initrd = filepath.Join(dir, "initrd")
	return f, os.WriteFile(f.initrd, append(initramfs, archive("testinit", program)...), 0o644)
})

// archive is a cpio archive (newc, Documentation/driver-api/early-userspace/
// buffer-format.rst) with one executable file. The kernel unpacks any number of
// them, one behind the other.
func archive(name string, content []byte) []byte {
	var out bytes.Buffer
	add := func(name string, mode int, content []byte) {
		fmt.Fprintf(&out, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
		out.Write(make([]byte, -out.Len()&3))
		out.Write(content)
		out.Write(make([]byte, -out.Len()&3))
	}
	add(name, 0o100755, content)
	add("TRAILER!!!", 0, nil)
	return out.Bytes()
}

func TestMain(m *testing.M) {
	if os.Getenv("QEMU_TEST_PARENT") != "" {
		os.Exit(beParent())
	}
	status := m.Run()
	if f, err := prepare(); err == nil {
		os.RemoveAll(filepath.Dir(f.initrd))
	}
	os.Exit(status)
}

func require(t testing.TB) *files {
	t.Helper()
	f, err := prepare()
	if _, ok := errors.AsType[*sandbox.UnavailableError](err); ok {
		drivertest.Require(t, "qemu", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// shortTemp is a folder whose name is short, and checked to be left empty.
func shortTemp(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "m-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// guest is a machine under test.
type guest struct {
	vm.Machine
	config  vm.Config
	console *screen
}

// screen is what a guest printed.
type screen struct {
	mu      sync.Mutex
	changed *sync.Cond
	text    bytes.Buffer
	ended   bool
	keys    *os.File
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// awaits waits until the guest has printed what.
func (s *screen) awaits(t testing.TB, what string) {
	t.Helper()
	timer := time.AfterFunc(bootLimit, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.ended = true
		s.changed.Broadcast()
	})
	defer timer.Stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	for !strings.Contains(s.text.String(), what) {
		if s.ended {
			t.Fatalf("the console never said %q, but: %s", what, s.text.String())
		}
		s.changed.Wait()
	}
}

// newScreen makes a console, and the end of it that a machine is given.
func newScreen(t testing.TB) (*screen, *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	unix.SetNonblock(fds[0], true)
	s := &screen{keys: os.NewFile(uintptr(fds[0]), "console")}
	s.changed = sync.NewCond(&s.mu)
	theirs := os.NewFile(uintptr(fds[1]), "console")
	read := make(chan struct{})
	go func() {
		defer close(read)
		buf := make([]byte, 4096)
		for {
			n, err := s.keys.Read(buf)
			s.mu.Lock()
			s.text.Write(buf[:n])
			s.ended = err != nil
			s.changed.Broadcast()
			s.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		theirs.Close()
		s.keys.Close()
		<-read
	})
	return s, theirs
}

// newGuest makes a machine that boots the tests' init, with what change makes
// of its configuration, and does not start it.
func newGuest(t testing.TB, change func(*vm.Config, *qemu.Options)) *guest {
	t.Helper()
	f := require(t)
	g := &guest{config: vm.Config{
		Dir: shortTemp(t), Arch: runtime.GOARCH, CPUs: 1, MemoryMiB: 256,
		Kernel: f.kernel, Initrd: f.initrd, Cmdline: "console=hvc0 quiet panic=-1 rdinit=/testinit",
	}}
	options := f.options
	g.console, g.config.Console = newScreen(t)
	if change != nil {
		change(&g.config, &options)
	}
	var err error
	if g.Machine, err = qemu.New(t.Context(), g.config, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error("close:", err)
		}
		entries, err := os.ReadDir(g.config.Dir)
		if err != nil || len(entries) > 0 {
			t.Errorf("left in its folder: %v, %v", entries, err)
		}
		if left := processesOf(g.config); len(left) > 0 {
			t.Errorf("left running: %v", left)
		}
	})
	return g
}

// boot starts a machine and waits until its init is ready.
func boot(t testing.TB, change func(*vm.Config, *qemu.Options)) *guest {
	t.Helper()
	g := newGuest(t, change)
	if err := g.Start(t.Context()); err != nil {
		t.Fatal("start:", err)
	}
	g.console.awaits(t, "init: ready")
	return g
}

// ask has the guest's init do something, and returns its answer.
func (g *guest) ask(t testing.TB, format string, args ...any) string {
	t.Helper()
	answer, err := g.tryAsk(t, format, args...)
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

// askSoon asks a guest that has yet to find its vsock device.
func (g *guest) askSoon(t testing.TB, question string) string {
	t.Helper()
	for deadline := time.Now().Add(bootLimit); ; {
		answer, err := g.tryAsk(t, "%s", question)
		if err == nil {
			return answer
		}
		if !errors.Is(err, vm.ErrNoListener) || time.Now().After(deadline) {
			t.Fatal(err)
		}
		runtime.Gosched()
	}
}

func (g *guest) tryAsk(t testing.TB, format string, args ...any) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	defer cancel()
	conn, err := g.Dial(ctx, 1024)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(bootLimit))
	if _, err := fmt.Fprintf(conn, format+"\n", args...); err != nil {
		return "", err
	}
	if err := closeWrite(conn); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(conn)
	return strings.TrimSpace(string(answer)), err
}

func closeWrite(conn net.Conn) error {
	return conn.(interface{ CloseWrite() error }).CloseWrite()
}

// ends waits for the machine's end and returns why it was.
func (g *guest) ends(t testing.TB) error {
	t.Helper()
	select {
	case <-g.Done():
	case <-time.After(bootLimit):
		t.Fatalf("the machine did not end; its console: %s", g.console)
	}
	return g.Err()
}

// processesOf are the processes of a machine, by their commands: those that
// work in its folder, and those that have one of its shares.
func processesOf(config vm.Config) map[int]string {
	found := map[int]string{}
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, process := range processes {
		at, _ := os.Readlink(filepath.Join(process, "cwd"))
		args, _ := os.ReadFile(filepath.Join(process, "cmdline"))
		mine := strings.TrimSuffix(at, " (deleted)") == config.Dir
		for _, share := range config.Shares {
			mine = mine || bytes.Contains(args, []byte("\x00--shared-dir="+share.Path+"\x00"))
		}
		if mine {
			var pid int
			fmt.Sscanf(process, "/proc/%d", &pid)
			command, _ := os.ReadFile(filepath.Join(process, "comm"))
			found[pid] = strings.TrimSpace(string(command))
		}
	}
	return found
}

// process is the one process of the machine's with that name.
func (g *guest) process(t testing.TB, name string) int {
	t.Helper()
	all := processesOf(g.config)
	for pid, command := range all {
		if strings.HasPrefix(name, command) || strings.HasPrefix(command, name) {
			return pid
		}
	}
	t.Fatalf("no process %s in %v", name, all)
	return 0
}
