package vm_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/vmtest"
	"github.com/choiros/agent/test/image"
)

// victimLimit is how long anything may take that a victim is waited for; it
// makes no test take longer that passes.
const victimLimit = 2 * time.Minute

// victim is a machine that has trouble.
type victim struct {
	*testing.T
	driver     *vm.Driver
	root       string
	ref        sandbox.Ref
	generation uint64
}

// newVictim makes a machine that runs the workload's program with args, and
// sees to its end. mounts may be nil.
func newVictim(t *testing.T, d *vm.Driver, root, id string, mounts []sandbox.Mount, args ...string) *victim {
	t.Helper()
	v := &victim{T: t, driver: d, root: root, ref: sandbox.Ref{ID: id, Dir: t.TempDir()}}
	if err := d.Create(t.Context(), v.ref, victimSpec(mounts, args...)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.delete)
	return v
}

func victimSpec(mounts []sandbox.Mount, args ...string) sandbox.Spec {
	return sandbox.Spec{
		Driver: "vm", Image: image.RootName, Command: args, Mounts: mounts,
		Resources: vmtest.Resources(), DriverOptions: json.RawMessage(`{"disk_mib": 64}`),
	}
}

// delete deletes it, and looks for what is left.
func (v *victim) delete() {
	v.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(v.Context()), victimLimit)
	defer cancel()
	if err := v.driver.Delete(ctx, v.ref); err != nil {
		v.Errorf("Delete: %v", err)
	}
	vmtest.CheckNoProcess(v.T, v.box(""))
	for _, path := range []string{v.box(""), filepath.Join(v.root, "locks", v.ref.ID), v.key()} {
		if _, err := os.Lstat(path); err == nil {
			v.Errorf("left: %s", path)
		}
	}
}

// box is where a file of its is on the host.
func (v *victim) box(name string) string { return filepath.Join(v.root, "boxes", v.ref.ID, name) }

// key is where the key of its saved memory is.
func (v *victim) key() string { return filepath.Join(vmtest.KeyDir(v.root), v.ref.ID) }

func (v *victim) guest() *guest.Guest {
	return guest.New(v.ref.ID, func(ctx context.Context) (net.Conn, error) { return v.driver.Dial(ctx, v.ref, guest.Port) })
}

func (v *victim) inspect() sandbox.Observation {
	v.Helper()
	begun := time.Now()
	o, err := v.driver.Inspect(v.Context(), v.ref)
	if err != nil {
		v.Fatalf("Inspect: %v", err)
	}
	if took := time.Since(begun); took > victimLimit/4 {
		v.Errorf("Inspect took %s", took)
	}
	return o
}

// until polls until something is true.
func (v *victim) until(what string, is func() bool) {
	v.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(victimLimit)
	for !is() {
		select {
		case <-tick.C:
		case <-deadline:
			said, _ := os.ReadFile(v.box("console.log"))
			faults, _ := os.ReadFile(v.box("shim.log"))
			v.Fatalf("not in %s: %s; it is %+v\nconsole: %s\nshim: %s", victimLimit, what, v.inspect(), said, faults)
		}
	}
}

// start starts it and returns once the operating system says that it runs.
func (v *victim) start() {
	v.Helper()
	if err := v.driver.Start(v.Context(), v.ref); err != nil {
		v.Fatalf("Start: %v", err)
	}
	v.generation++
}

// up starts it, and its workload as the manager would.
func (v *victim) up() sandbox.Observation {
	v.Helper()
	v.start()
	v.until("its guestd is configured", func() bool {
		if o := v.inspect(); o.State != sandbox.StateRunning {
			v.Fatalf("it is %+v", o)
		}
		return v.guest().Configure(v.Context(), guest.Configuration{Generation: v.generation}) == nil
	})
	return v.inspect()
}

// answers wants guestd to answer, and to be that of the present generation.
func (v *victim) answers() {
	v.Helper()
	info, err := v.guest().Hello(v.Context())
	if err != nil || info.Phase != guest.PhaseRunning || info.Generation != v.generation {
		v.Errorf("Hello says %+v, %v; want generation %d", info, err, v.generation)
	}
}

// exited waits until it has ended, and wants a code, and words in its reason.
func (v *victim) exited(code int, words ...string) sandbox.Observation {
	v.Helper()
	ctx, cancel := context.WithTimeout(v.Context(), victimLimit)
	defer cancel()
	o, err := v.driver.Wait(ctx, v.ref)
	if err != nil {
		v.Fatalf("Wait: %v, while it is %+v", err, v.inspect())
	}
	if now := v.inspect(); now != o {
		v.Errorf("Wait says %+v, Inspect %+v", o, now)
	}
	if o.State != sandbox.StateExited || o.ExitCode != code || o.Saved || o.OOMKilled || o.FinishedAt.Before(o.StartedAt) {
		v.Errorf("it is %+v; want exited with %d", o, code)
	}
	for _, word := range words {
		if !strings.Contains(o.Detail, word) {
			v.Errorf("its reason is %q; want %q in it", o.Detail, word)
		}
	}
	vmtest.CheckNoProcess(v.T, v.box(""))
	if conn, err := v.driver.Dial(v.Context(), v.ref, guest.Port); !errors.Is(err, sandbox.ErrUnavailable) {
		if err == nil {
			conn.Close()
		}
		v.Errorf("Dial of one that has ended: %v", err)
	}
	return o
}

// process finds its shim, or a child of that by the name of the program; 0:
// there is none.
func (v *victim) process(name string) int {
	shim, children := 0, map[string]int{}
	entries, _ := filepath.Glob("/proc/[0-9]*") // the pattern is a good one
	for _, entry := range entries {
		pid, err := strconv.Atoi(filepath.Base(entry))
		if err != nil {
			v.Fatal(err)
		}
		text, _ := os.ReadFile(filepath.Join(entry, "cmdline")) // it may be gone
		args := strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
		switch stat, _ := os.ReadFile(filepath.Join(entry, "stat")); {
		case slices.Contains(args, filepath.Clean(v.box(""))):
			shim = pid
		case strings.HasPrefix(filepath.Base(args[0]), name):
			_, rest, _ := strings.Cut(string(stat), ") ") // see proc_pid_stat(5)
			if fields := strings.Fields(rest); len(fields) > 1 {
				children[fields[1]] = pid
			}
		}
	}
	if name == "shim" || shim == 0 {
		return shim
	}
	return children[strconv.Itoa(shim)]
}

// signal waits for a process of its, and sends it a signal. One that is seen
// may have been asked for no more than its version, and be gone.
func (v *victim) signal(name string, number syscall.Signal) {
	v.Helper()
	v.until("it has a process "+name, func() bool {
		pid := v.process(name)
		return pid != 0 && syscall.Kill(pid, number) == nil
	})
}

// run runs the workload's program inside with other arguments, and returns
// what it prints.
func (v *victim) run(args ...string) string {
	v.Helper()
	x, err := v.guest().Exec(v.Context(), guest.Command{Args: append([]string{"/workload"}, args...), NoInput: true})
	if err != nil {
		v.Fatal(err)
	}
	defer x.Close()
	var printed strings.Builder
	for {
		out, err := x.Receive()
		switch {
		case err != nil:
			v.Fatalf("%v: %v", args, err)
		case out.Exit != nil && out.Exit.Code != 0:
			v.Fatalf("%v ended with %d: %s", args, out.Exit.Code, printed.String())
		case out.Exit != nil:
			return strings.TrimSpace(printed.String())
		}
		printed.Write(out.Data)
	}
}

// printed is what the workload has printed.
func (v *victim) printed() string {
	v.Helper()
	var text strings.Builder
	err := v.driver.Logs(v.Context(), v.ref, sandbox.LogOptions{Tail: -1, Stdout: true, Stderr: true}, func(e sandbox.LogEntry) error {
		_, err := text.Write(e.Data)
		return err
	})
	if err != nil {
		v.Fatal(err)
	}
	return text.String()
}

// background makes a call that goes on while something is done to it. The
// channel has its error.
func background(call func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- call() }()
	return done
}

// returns waits for a call, and wants it to be back in time.
func (v *victim) returns(what string, call <-chan error, within time.Duration) error {
	v.Helper()
	select {
	case err := <-call:
		return err
	case <-time.After(within):
		v.Fatalf("%s is not back after %s; it is %+v", what, within, v.inspect())
		return nil
	}
}

// rewrite changes a record of its.
func (v *victim) rewrite(name string, change func(map[string]any)) {
	v.Helper()
	text, err := os.ReadFile(v.box(name))
	record := map[string]any{}
	if err == nil {
		err = json.Unmarshal(text, &record)
	}
	if err == nil {
		change(record)
		text, err = json.Marshal(record)
	}
	if err == nil {
		err = os.WriteFile(v.box(name), text, 0o600)
	}
	if err != nil {
		v.Fatal(err)
	}
}

// copyFile copies a file with its times, and leaves its holes.
func copyFile(t *testing.T, to, from string) {
	t.Helper()
	source, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	info, err := source.Stat()
	if err != nil {
		t.Fatal(err)
	}
	target, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, info.Mode())
	if err == nil {
		err = copySparse(target, source, info.Size())
		err = errors.Join(err, target.Close(), os.Chtimes(to, info.ModTime(), info.ModTime()))
	}
	if err != nil {
		t.Fatal(err)
	}
}

func copySparse(to *os.File, from io.Reader, size int64) error {
	chunk, zeros := make([]byte, 1<<16), string(make([]byte, 1<<16))
	for at := int64(0); at < size; {
		n, err := io.ReadFull(from, chunk[:min(int64(len(chunk)), size-at)])
		if err != nil {
			return err
		}
		if string(chunk[:n]) != zeros[:n] {
			if _, err := to.WriteAt(chunk[:n], at); err != nil {
				return err
			}
		}
		at += int64(n)
	}
	return to.Truncate(size)
}
