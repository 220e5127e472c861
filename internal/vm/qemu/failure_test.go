//go:build linux

package qemu_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/qemu"
)

func withShare(dir string) func(*vm.Config, *qemu.Options) {
	return func(c *vm.Config, _ *qemu.Options) {
		c.Shares = []vm.Share{{Tag: "work", Path: dir}}
		c.Cmdline += " test.mount=work:/work"
	}
}

func TestDeathOfAProcessEndsMachine(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"qemu-system", "virtiofsd"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGuest(t, withShare(t.TempDir()))
			if err := g.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := unix.Kill(g.process(t, name), unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			err := g.ends(t)
			if err == nil || !strings.HasPrefix(err.Error(), strings.TrimSuffix(name, "-system")) {
				t.Error("it ended because of", err)
			}
		})
	}
}

func TestSilentQEMUIsAnErrorAndCanBeKilled(t *testing.T) {
	t.Parallel()
	g := newGuest(t, nil)
	if err := g.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(g.process(t, "qemu-system"), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := g.Pause(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error("pause:", err)
	}
	if err := g.PressPower(t.Context()); !errors.Is(err, context.DeadlineExceeded) {
		t.Error("power button:", err) // by the deadline that every command has
	}
	if err := g.Kill(); err != nil {
		t.Error(err)
	}
	if err := g.ends(t); err != nil {
		t.Error(err)
	}
}

func TestCancelledStartLeavesNothing(t *testing.T) {
	t.Parallel()
	g := newGuest(t, withShare(t.TempDir()))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.Start(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	g.ends(t) // and the clean-up looks for what is left
}

func TestMachineThatWasNeverStartedCloses(t *testing.T) {
	t.Parallel()
	g := newGuest(t, nil)
	if err := g.Kill(); err != nil {
		t.Error(err)
	}
	if err := g.ends(t); err != nil {
		t.Error(err)
	}
	if err := g.Start(t.Context()); err == nil {
		t.Error("it was started after it was killed")
	}
}

func TestLongFolderName(t *testing.T) {
	t.Parallel()
	g := newGuest(t, func(c *vm.Config, o *qemu.Options) {
		withShare(t.TempDir())(c, o)
		c.Dir = filepath.Join(c.Dir, strings.Repeat("long/", 40))
		if err := os.MkdirAll(c.Dir, 0o700); err != nil {
			t.Fatal(err)
		}
	})
	if _, err := g.Listen(1025); err != nil {
		t.Fatal(err)
	}
	if err := g.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.console.awaits(t, "init: ready")
	if got := g.ask(t, "keep this"); got != "ok" {
		t.Error(got)
	}
}

func TestBadConfigurationIsRefused(t *testing.T) {
	t.Parallel()
	f := require(t)
	noKernel := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(noKernel, []byte("#!/bin/sh\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*vm.Config, *qemu.Options){
		"is not a bzImage for amd64":            func(c *vm.Config, _ *qemu.Options) { c.Kernel = noKernel },
		"file is not an ELF file for amd64":     func(c *vm.Config, _ *qemu.Options) { c.Vmlinux = noKernel },
		"kernel: open /nowhere":                 func(c *vm.Config, _ *qemu.Options) { c.Kernel = "/nowhere" },
		"disk a: open /nowhere":                 func(c *vm.Config, _ *qemu.Options) { c.Disks = []vm.Disk{{Serial: "a", Path: "/nowhere"}} },
		`disk serial "a,b"`:                     func(c *vm.Config, _ *qemu.Options) { c.Disks = []vm.Disk{{Serial: "a,b", Path: noKernel}} },
		"share a: " + noKernel + " is not":      func(c *vm.Config, _ *qemu.Options) { c.Shares = []vm.Share{{Tag: "a", Path: noKernel}} },
		`"riscv64": architecture is not`:        func(c *vm.Config, _ *qemu.Options) { c.Arch = "riscv64" },
		"QEMU has no Rosetta; use an image for": func(c *vm.Config, _ *qemu.Options) { c.Rosetta = true },
		"0 processors":                          func(c *vm.Config, _ *qemu.Options) { c.CPUs = 0 },
		"/nowhere/qemu is not installed":        func(_ *vm.Config, o *qemu.Options) { o.QEMU = "/nowhere/qemu" },
		`accelerator "magic"`:                   func(_ *vm.Config, o *qemu.Options) { o.Accelerator = "magic" },
		"state to restore: open /nowhere":       func(c *vm.Config, _ *qemu.Options) { c.Restore = "/nowhere" },
		"/nowhere/virtiofsd is not installed":   func(c *vm.Config, o *qemu.Options) { withShare("/")(c, o); o.Virtiofsd = "/nowhere/virtiofsd" },
		"the kernel command line has a zero":    func(c *vm.Config, _ *qemu.Options) { c.Cmdline = "a\x00b" },
		"two networks, and one network device": func(c *vm.Config, _ *qemu.Options) {
			_, c.Network, _ = datagrams()
			c.NAT, c.MAC = true, []byte{0x5a, 0, 0, 0, 0, 1}
		},
		"\"\" is no address of an Ethernet device": func(c *vm.Config, _ *qemu.Options) { c.NAT = true },
		"is no address of an Ethernet device":      func(c *vm.Config, _ *qemu.Options) { _, c.Network, _ = datagrams() },
		"open " + noKernel + ": not a directory":   func(c *vm.Config, _ *qemu.Options) { c.Dir = noKernel },
	} {
		config := vm.Config{
			Dir: shortTemp(t), Arch: "amd64", CPUs: 1, MemoryMiB: 128,
			Kernel: f.kernel, Initrd: f.initrd,
		}
		options := f.options
		change(&config, &options)
		if runtime.GOARCH != "amd64" {
			t.Skip("of the other architecture's files there are none")
		}
		_, err := qemu.New(t.Context(), config, options)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
		if strings.HasSuffix(want, "is not installed") {
			if missing, ok := errors.AsType[*qemu.MissingError](err); !ok || !strings.Contains(missing.Cure, "apt-get install") {
				t.Errorf("no cure in %#v", err)
			}
		}
	}
}

// Of a kernel that has nothing but zeros behind its first sectors the machine
// ends, or is silent, but it can be ended. One that is cut off there is refused.
func TestBrokenKernel(t *testing.T) {
	t.Parallel()
	f := require(t)
	kernel, err := os.ReadFile(f.kernel)
	if err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(broken, kernel[:len(kernel)/8], 0o600); err != nil {
		t.Fatal(err)
	}
	cut := vm.Config{Dir: shortTemp(t), Arch: runtime.GOARCH, CPUs: 1, MemoryMiB: 128, Kernel: broken, Initrd: f.initrd}
	if _, err := qemu.New(t.Context(), cut, f.options); runtime.GOARCH == "amd64" && (err == nil || !strings.Contains(err.Error(), "is not all there")) {
		t.Error("one that is cut off:", err)
	}
	if err := os.Truncate(broken, int64(len(kernel))); err != nil {
		t.Fatal(err)
	}
	g := newGuest(t, func(c *vm.Config, _ *qemu.Options) { c.Kernel = broken })
	if err := g.Start(t.Context()); err == nil {
		err = g.Kill()
		if err != nil {
			t.Error(err)
		}
	}
	g.ends(t)
}

// A machine never outlives the process that made it, however that ends.
func TestKilledParentLeavesNoProcess(t *testing.T) {
	t.Parallel()
	f := require(t)
	dir := shortTemp(t)
	made := vm.Config{
		Dir: dir, Arch: runtime.GOARCH, CPUs: 1, MemoryMiB: 256,
		Kernel: f.kernel, Initrd: f.initrd, Cmdline: "console=hvc0 quiet",
		Shares: []vm.Share{{Tag: "work", Path: t.TempDir()}},
	}
	config, err := json.Marshal(made)
	if err != nil {
		t.Fatal(err)
	}
	parent := exec.Command(os.Args[0])
	parent.Env = append(os.Environ(), "QEMU_TEST_PARENT="+string(config))
	parent.Stderr = os.Stderr
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	running := processesOf(made)
	if killErr := parent.Process.Signal(syscall.SIGKILL); killErr != nil {
		t.Fatal(killErr)
	}
	parent.Wait()
	if line != "started\n" || len(running) < 3 {
		t.Fatalf("%q, %v, with %v", line, err, running)
	}
	deadline := time.Now().Add(bootLimit)
	for left := processesOf(made); len(left) > 0; left = processesOf(made) {
		if time.Now().After(deadline) {
			t.Fatalf("still there: %v", left)
		}
		runtime.Gosched()
	}
}

// beParent is the process that TestKilledParentLeavesNoProcess kills.
func beParent() int {
	var config vm.Config
	if err := json.Unmarshal([]byte(os.Getenv("QEMU_TEST_PARENT")), &config); err != nil {
		fmt.Println(err)
		return 1
	}
	m, err := qemu.New(context.Background(), config, qemu.Options{Accelerator: qemu.TCG})
	if err == nil {
		err = m.Start(context.Background())
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("started")
	<-m.Done()
	return 0
}

func TestShares(t *testing.T) {
	t.Parallel()
	writable, readOnly, outside := t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "outside")
	for _, name := range []string{filepath.Join(writable, "file"), filepath.Join(readOnly, "file"), outside} {
		if err := os.WriteFile(name, []byte("from outside"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(writable, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(writable, "link")); err != nil {
		t.Fatal(err)
	}
	g := boot(t, func(c *vm.Config, o *qemu.Options) {
		c.Shares = []vm.Share{{Tag: "rw", Path: writable}, {Tag: "ro", Path: readOnly, ReadOnly: true}}
		// Writable, as far as the guest's mount goes.
		c.Cmdline += " test.mount=rw:/rw test.mount=ro:/ro"
		o.ShareUID, o.ShareGID = 1000, 1000
	})
	expect := func(want, format string, args ...any) {
		t.Helper()
		if got := g.ask(t, format, args...); got != want && (want != "error" || !strings.HasPrefix(got, "error")) {
			t.Errorf("%s: %q, not %q", fmt.Sprintf(format, args...), got, want)
		}
	}
	expect("from outside", "read /rw/file")
	expect("1000:1000", "owner /rw/file")

	for _, change := range []string{"write /ro/file no", "write /ro/new no", "chmod /ro/file", "remove /ro/file", "symlink /ro/new file"} {
		expect("error", "%s", change)
	}
	if entries, err := os.ReadDir(readOnly); len(entries) != 1 || err != nil {
		t.Error("the share that is only read has", entries, err)
	}

	// Whoever writes inside, it is ours outside, and the other way round.
	expect("ok", "write /rw/root by root")
	expect("ok", "as 4321 write /rw/other by another")
	expect("ok", "as 1000 write /rw/same by the same")
	for _, name := range []string{"root", "other", "same"} {
		info, err := os.Stat(filepath.Join(writable, name))
		if err != nil {
			t.Error(err)
			continue
		}
		if owner := info.Sys().(*syscall.Stat_t); int(owner.Uid) != os.Getuid() || int(owner.Gid) != os.Getgid() {
			t.Errorf("%s belongs to %d:%d", name, owner.Uid, owner.Gid)
		}
		expect("1000:1000", "owner /rw/%s", name)
	}

	// Each side sees at once what the other does.
	for i := range 5 {
		text := fmt.Sprintf("version %d", i)
		if err := os.WriteFile(filepath.Join(writable, "file"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		expect(text, "read /rw/file")
		expect("ok", "write /rw/file inside %d", i)
		if got, err := os.ReadFile(filepath.Join(writable, "file")); string(got) != fmt.Sprintf("inside %d", i) && !strings.HasPrefix(string(got), fmt.Sprintf("inside %d", i)) || err != nil {
			t.Errorf("%q, %v", got, err)
		}
	}

	// A link is followed inside, where nothing is, and never outside.
	expect("error", "read /rw/link")
	expect("error", "as 0 write /rw/../../outside/x no")
	expect("ok", "symlink /rw/made /etc/passwd")
	expect("error", "read /rw/made")
	if _, err := os.Lstat(outside); errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestSaveAndRestore(t *testing.T) {
	t.Parallel()
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	withDisk := func(c *vm.Config, _ *qemu.Options) { c.Disks = []vm.Disk{{Serial: "data", Path: disk}} }
	state := filepath.Join(t.TempDir(), "state")
	g := boot(t, withDisk)
	if got := g.ask(t, "keep what is remembered"); got != "ok" {
		t.Fatal(got)
	}
	if _, err := g.Save(t.Context(), state); !errors.Is(err, vm.ErrCannotSave) {
		t.Error("saved while it runs:", err)
	}
	if err := g.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Save(t.Context(), filepath.Join(state, "nowhere")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	start := time.Now()
	key, err := g.Save(t.Context(), state)
	if err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(state); err != nil || bytes.Contains(text, []byte("what is remembered")) {
		t.Errorf("the file shows what was in the memory, %v", err)
	}
	info, err := os.Stat(state)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("saved in %v: %d MiB on disk", time.Since(start), info.Sys().(*syscall.Stat_t).Blocks>>11)
	if _, err := g.Save(t.Context(), state); !errors.Is(err, fs.ErrExist) {
		t.Error("a state was overwritten:", err)
	}

	// What was saved goes on too, if that is wanted.
	if err := g.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := g.askSoon(t, "kept"); got != "what is remembered" {
		t.Error("after saving:", got)
	}
	if err := g.Kill(); err != nil {
		t.Fatal(err)
	}

	start = time.Now()
	restored := newGuest(t, func(c *vm.Config, o *qemu.Options) { withDisk(c, o); c.Restore, c.RestoreKey = state, key })
	if err := restored.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := restored.askSoon(t, "kept"); got != "what is remembered" {
		t.Error("after restoring:", got)
	}
	t.Logf("restored in %v", time.Since(start))
	if got := restored.ask(t, "write /dev/vda still there"); got != "ok" {
		t.Error(got)
	}
	restored.ask(t, "poweroff")
	if err := restored.ends(t); err != nil {
		t.Error(err)
	}

	t.Run("OtherMachine", func(t *testing.T) {
		other := newGuest(t, func(c *vm.Config, o *qemu.Options) { c.MemoryMiB, c.Restore, c.RestoreKey = 512, state, key })
		if err := other.Start(t.Context()); !errors.Is(err, vm.ErrCannotSave) {
			t.Error(err)
		}
	})
	t.Run("NoKey", func(t *testing.T) {
		other := newGuest(t, func(c *vm.Config, o *qemu.Options) { withDisk(c, o); c.Restore = state })
		if err := other.Start(t.Context()); !errors.Is(err, vm.ErrCannotSave) {
			t.Error(err)
		}
	})
	t.Run("Garbage", func(t *testing.T) {
		if err := os.Truncate(state, info.Size()/2); err != nil {
			t.Fatal(err)
		}
		other := newGuest(t, func(c *vm.Config, o *qemu.Options) { withDisk(c, o); c.Restore, c.RestoreKey = state, key })
		if err := other.Start(t.Context()); !errors.Is(err, vm.ErrCannotSave) {
			t.Error(err)
		}
	})
}

func TestMachineWithSharesIsNotSaved(t *testing.T) {
	t.Parallel()
	g := newGuest(t, withShare(t.TempDir()))
	if err := g.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := g.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(t.TempDir(), "state")
	if _, err := g.Save(t.Context(), state); !errors.Is(err, vm.ErrCannotSave) {
		t.Error(err)
	}
	if _, err := os.Stat(state); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a file was left:", err)
	}
}
