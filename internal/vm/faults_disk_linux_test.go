package vm_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest"
	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/vmtest"
)

// smallDisk makes a file system of some size and returns its folder, as it is
// seen from outside the mount namespace of a process that ends with the test.
func smallDisk(t *testing.T, sizeMiB int) string {
	t.Helper()
	at := t.TempDir()
	script := `mount -t tmpfs -o size="$1"m none "$2" && echo mounted && exec cat`
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), "/bin/sh", "-c", script, "sh", fmt.Sprint(sizeMiB), at)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	} else {
		script = "mount --make-rprivate / && " + script
		cmd.Args[2] = script
	}
	var said strings.Builder
	cmd.Stderr = &said
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		drivertest.Require(t, "namespaces", err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	if line != "mounted\n" {
		drivertest.Require(t, "namespaces", fmt.Errorf("mount a small disk: %w: %s", err, &said))
	}
	return fmt.Sprintf("/proc/%d/root%s", cmd.Process.Pid, at)
}

// fill writes a file until the disk has no room but for spareMiB.
func fill(t *testing.T, path string, spareMiB int) {
	t.Helper()
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	chunk, size := make([]byte, 4096), int64(0)
	for ; err == nil; size += int64(len(chunk)) {
		_, err = file.Write(chunk)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if err := file.Truncate(max(0, size-int64(spareMiB)<<20)); err != nil {
		t.Fatal(err)
	}
}

// fullDisk has the disk of a machine's box be full at every step.
func fullDisk(t *testing.T, _ *vm.Driver, root string) {
	disk := smallDisk(t, 32)
	hog := filepath.Join(disk, "hog")
	config, err := vmtest.Config(root, runtime.GOARCH)
	if err != nil {
		t.Fatal(err)
	}
	config.Root = filepath.Join(disk, "ours")
	config.KeyDir = vmtest.KeyDir(config.Root)
	t.Cleanup(func() { _ = os.Remove(config.KeyDir) }) // of a test: it has to be empty
	d, err := vm.New(config)
	if err != nil {
		t.Fatal(err)
	}
	v := &victim{T: t, driver: d, root: config.Root, ref: sandbox.Ref{ID: "full", Dir: t.TempDir()}}
	t.Cleanup(v.delete)
	exhausted := func(verb string, err error) {
		t.Helper()
		if !errors.Is(err, sandbox.ErrExhausted) || !strings.Contains(err.Error(), "no space left on device") {
			t.Errorf("%s without room: %v", verb, err)
		}
	}

	fill(t, hog, 0)
	exhausted("Create", d.Create(t.Context(), v.ref, victimSpec(nil, "sleep")))
	if ids, err := d.List(t.Context()); err != nil || len(ids) > 0 || v.inspect().State != sandbox.StateAbsent {
		t.Errorf("there are %v, %v, and it is %+v", ids, err, v.inspect())
	}
	if err := os.Remove(hog); err != nil {
		t.Fatal(err)
	}
	if err := d.Create(t.Context(), v.ref, victimSpec(nil, "sleep")); err != nil {
		t.Fatal(err)
	}

	fill(t, hog, 0)
	exhausted("Start", d.Start(t.Context(), v.ref))
	if o := v.inspect(); o.State != sandbox.StateCreated {
		t.Errorf("it never ran, and is %+v", o)
	}
	if err := os.Remove(hog); err != nil {
		t.Fatal(err)
	}

	life := v.up()
	begun := time.Now()
	exhausted("Hibernate", d.Hibernate(t.Context(), v.ref))
	t.Logf("Hibernate failed after %s", time.Since(begun))
	v.unsaved()
	if now := v.inspect(); now != life {
		t.Errorf("it was %+v, and is %+v", life, now)
	}
	v.until("it answers", func() bool { _, err := v.guest().Hello(t.Context()); return err == nil })

	fill(t, hog, 4)
	writing := background(func() error { return v.writes("/big", 24) })
	v.until("it says that it is halted", func() bool { return strings.Contains(v.inspect().Detail, "no room") })
	if o := v.inspect(); o.State != sandbox.StateRunning || o.Paused {
		t.Errorf("it is %+v", o)
	}
	if err := os.Remove(hog); err != nil {
		t.Fatal(err)
	}
	if err := v.returns("writing", writing, victimLimit); err != nil {
		t.Error(err)
	}
	v.until("it says that it goes on", func() bool { return v.inspect() == life })
	v.answers()
	if file, err := v.guest().Stat(t.Context(), "/big"); err != nil || file.Size != 24<<20 {
		t.Errorf("what it wrote is %+v, %v", file, err)
	}

	// How it ends can be told all the same.
	fill(t, hog, 0)
	if err := d.Stop(t.Context(), v.ref, 0); err != nil {
		t.Error(err)
	}
	if o := v.exited(137); strings.Contains(o.Detail, "shim") {
		t.Errorf("it is %+v", o)
	}
	if err := os.Remove(hog); err != nil {
		t.Fatal(err)
	}
	v.up()
	v.answers()
}

// writes has a file of so many MiB written inside. Nothing is on its way to the
// machine meanwhile.
func (v *victim) writes(path string, mib int) error {
	x, err := v.guest().Exec(v.Context(), guest.Command{
		Args: []string{"/workload", "fill", path, strconv.Itoa(mib)}, NoInput: true,
	})
	if err != nil {
		return err
	}
	defer x.Close()
	for {
		out, err := x.Receive()
		if err != nil {
			return err
		}
		if out.Exit != nil && out.Exit.Code != 0 {
			return fmt.Errorf("it ended with %d", out.Exit.Code)
		}
		if out.Exit != nil {
			return nil
		}
	}
}
