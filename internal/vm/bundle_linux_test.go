package vm_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest"
	"github.com/choiros/agent/internal/store"
	"github.com/choiros/agent/internal/vm/vmtest"
	"github.com/choiros/agent/test/image"
)

// bundleLimit is for anything that the system of an emulated machine does.
const bundleLimit = 5 * time.Minute

// system is a sandbox made from the test bundle: a Debian with systemd.
type system struct {
	*testing.T
	driver     sandbox.Driver
	ref        sandbox.Ref
	generation uint64
}

// systemName is what the driver knows the test bundle by.
const systemName = "debian"

// bundle has the driver know the test bundle, and returns its folder.
func bundle(t *testing.T, root string) string {
	t.Helper()
	dir, err := image.Bundle()
	drivertest.Require(t, "qemu", err)
	if err = os.Mkdir(vmtest.Bundles(root), 0o700); err == nil {
		err = os.Symlink(dir, filepath.Join(vmtest.Bundles(root), systemName))
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// newSystem makes a sandbox that is gone when the test ends.
func newSystem(t *testing.T, root, id string, spec sandbox.Spec) *system {
	t.Helper()
	s := &system{T: t, driver: open(t, root), ref: sandbox.Ref{ID: id, Dir: t.TempDir()}}
	spec.Driver, spec.Resources = "vm", vmtest.Resources()
	if err := s.driver.Create(t.Context(), s.ref, spec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.driver.Delete(context.WithoutCancel(t.Context()), s.ref); err != nil {
			t.Error(err)
		}
	})
	return s
}

func (s *system) guest() *guest.Guest {
	return guest.New(s.ref.ID, func(ctx context.Context) (net.Conn, error) { return s.driver.Dial(ctx, s.ref, guest.Port) })
}

// boot starts it, and has its guestd start the workload.
func (s *system) boot() {
	s.Helper()
	if err := s.driver.Start(s.Context(), s.ref); err != nil {
		s.Fatal(err)
	}
	s.generation++
	ctx, cancel := context.WithTimeout(s.Context(), bundleLimit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := s.guest().Configure(ctx, guest.Configuration{Generation: s.generation})
		if err == nil {
			return
		}
		if o, inspected := s.driver.Inspect(s.Context(), s.ref); inspected != nil || o.State != sandbox.StateRunning {
			s.Fatalf("configure: %v; it is %v, exit code %d, %s, %v", err, o.State, o.ExitCode, o.Detail, inspected)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			s.Fatalf("its guestd does not answer: %v", err)
		}
	}
}

// run runs a command line of the shell inside, and returns what it printed.
func (s *system) run(line string) string {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), bundleLimit)
	defer cancel()
	x, err := s.guest().Exec(ctx, guest.Command{Args: []string{"/bin/sh", "-c", line}, NoInput: true})
	if err != nil {
		s.Fatal(err)
	}
	defer x.Close()
	var printed strings.Builder
	for {
		out, err := x.Receive()
		if err != nil {
			s.Fatalf("%s: %v, after %q", line, err, &printed)
		}
		printed.Write(out.Data)
		if out.Exit != nil {
			if out.Exit.Code != 0 {
				s.Errorf("%s: exit code %d, %q", line, out.Exit.Code, &printed)
			}
			return strings.TrimSpace(printed.String())
		}
	}
}

// stop stops it within a grace, and wants it to have ended so.
func (s *system) stop(grace time.Duration, exitCode int, detail string) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), grace+bundleLimit)
	defer cancel()
	if err := s.driver.Stop(ctx, s.ref, grace); err != nil {
		s.Fatal(err)
	}
	s.inspect(sandbox.StateExited, exitCode, detail)
}

// inspect wants it to be in a state, with an exit code and a reason.
func (s *system) inspect(state sandbox.State, exitCode int, detail string) {
	s.Helper()
	o, err := s.driver.Inspect(s.Context(), s.ref)
	if err != nil || o.State != state || o.ExitCode != exitCode || o.Detail != detail {
		s.Errorf("it is %v, exit code %d, %q, %v; want %v, %d, %q", o.State, o.ExitCode, o.Detail, err, state, exitCode, detail)
	}
}

// tool runs a program of e2fsprogs on a disk image, and returns what it says.
func (s *system) tool(name string, args ...string) string {
	s.Helper()
	said, err := exec.CommandContext(s.Context(), name, args...).Output()
	if err != nil {
		s.Fatalf("%s %q: %v", name, args, err)
	}
	return string(said)
}

// clean wants a disk to be as after having been unmounted.
func (s *system) clean(image string) {
	s.Helper()
	if said := s.tool("dumpe2fs", "-h", image); !strings.Contains(said, "Filesystem state:         clean\n") || strings.Contains(said, "needs_recovery") {
		s.Errorf("%s was not unmounted: %s", image, said)
	}
}

// marked wants the system to have left its mark as it was shut down, and takes
// that away.
func (s *system) marked(folder string) {
	s.Helper()
	text, err := os.ReadFile(filepath.Join(folder, "mark"))
	if err != nil || string(text) != "in good order\n" {
		s.Errorf("its mark is %q, %v: it was not shut down in good order", text, err)
	}
	_ = os.Remove(filepath.Join(folder, "mark")) // there is none
}

// killGuestd ends what the agent speaks to, and leaves the rest alive.
func (s *system) killGuestd() {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), bundleLimit)
	defer cancel()
	x, err := s.guest().Exec(ctx, guest.Command{
		Args: []string{"/bin/sh", "-c", "kill -KILL $(systemctl show --property MainPID --value guestd)"}, NoInput: true,
	})
	if err != nil {
		s.Fatal(err)
	}
	defer x.Close()
	for err == nil {
		_, err = x.Receive() // until it hangs up
	}
	if ctx.Err() != nil {
		s.Fatal("its guestd lives on")
	}
	s.inspect(sandbox.StateRunning, 0, "")
}

func sum(t *testing.T, path string) string {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(hash.Sum(nil))
}

func TestBundleRunsItsCommandUnderItsSystem(t *testing.T) {
	root := vmtest.Backend(t)
	bundle(t, root)
	t.Parallel()
	data, disk := t.TempDir(), filepath.Join(t.TempDir(), "disk.img")
	s := newSystem(t, root, "commanded", sandbox.Spec{
		Machine: systemName, Entrypoint: []string{"/bin/sh", "-c"},
		Command: []string{`echo "$GREETING from $(pwd)" >/data/out; trap 'exit 7' TERM; echo printed; sleep infinity & wait`},
		Env:     map[string]string{"GREETING": "hello"}, WorkingDir: "/usr/lib",
		Mounts: []sandbox.Mount{
			{Kind: sandbox.MountData, Source: data, Target: "/data"},
			{Kind: sandbox.MountDisk, Source: disk, Target: "/disk", SizeMiB: 64},
		},
	})
	s.boot()
	if info, err := s.guest().Hello(t.Context()); err != nil || info.Phase != guest.PhaseRunning || info.Generation != 1 {
		t.Errorf("greeting: %+v, %v", info, err)
	}
	if got := s.run("cat /proc/1/comm; systemctl is-active guestd; systemctl is-system-running --wait"); got != "systemd\nactive\nrunning" {
		t.Errorf("process 1, guestd's service and the system are %q", got)
	}
	if text, err := os.ReadFile(filepath.Join(data, "out")); err != nil || string(text) != "hello from /usr/lib\n" {
		t.Errorf("its command wrote %q, %v", text, err)
	}
	if got := s.run("findmnt --noheadings --output FSTYPE /disk; findmnt --noheadings --output FSTYPE /data"); got != "ext4\nvirtiofs" {
		t.Errorf("at /disk and /data are %q", got)
	}
	const reaches = "nameserver 192.168.127.1\n00000000\t017FA8C0\n192.168.127.2" // the gateway is as the kernel writes it
	if got := s.run(`cat /etc/resolv.conf; cut -f 2,3 /proc/net/route | grep ^0*[[:space:]]; grep -o 192.168.127.2 /proc/net/fib_trie | sort -u`); got != reaches {
		t.Errorf("its network: %q", got)
	}
	if got := s.run("ls /var/mine 2>/dev/null || echo commanded >/var/mine; echo kept >/disk/kept"); got != "" {
		t.Errorf("in its /var there is %q of another sandbox", got)
	}
	began := time.Now()
	s.stop(bundleLimit, 7, "")
	t.Logf("stopped within %v", time.Since(began))
	s.marked(data)
	s.clean(disk)
	if got := s.tool("debugfs", "-R", "cat /kept", disk); got != "kept\n" {
		t.Errorf("its disk kept %q", got)
	}

	// Without guestd, and with nobody who looks at the power button.
	s.boot()
	s.run("systemctl stop systemd-logind")
	s.killGuestd()
	began = time.Now()
	s.stop(2*time.Second, 128+9, "it did not stop within its grace, and was killed")
	if took := time.Since(began); took < 2*time.Second || took > time.Minute {
		t.Errorf("killed after %v, with a grace of 2 s", took)
	}
}

func TestBundleIsStoppedAsASystemIs(t *testing.T) {
	root := vmtest.Backend(t)
	dir := bundle(t, root)
	t.Parallel()
	data, before := t.TempDir(), sum(t, filepath.Join(dir, "var.img"))
	s := newSystem(t, root, "plain", sandbox.Spec{
		Machine: systemName, DriverOptions: json.RawMessage(`{"network": "none"}`),
		Mounts: []sandbox.Mount{{Kind: sandbox.MountData, Source: data, Target: "/data"}},
	})
	own := filepath.Join(root, "boxes", "plain", "disk-var.img")
	s.boot()
	if got := s.run("ls /var/mine 2>/dev/null || echo plain >/var/mine; ls /sys/class/net"); got != "lo" {
		t.Errorf("what is of another sandbox in its /var, and its network's interfaces: %q", got)
	}
	s.stop(bundleLimit, 0, "")
	s.marked(data)
	s.clean(own)
	if got := s.tool("debugfs", "-R", "cat /mark", own); got != "in good order\n" {
		t.Errorf("the mark on its disk is %q", got)
	}

	// Without guestd it still has a power button.
	s.boot()
	if got := s.run("cat /var/mine"); got != "plain" {
		t.Errorf("its disk kept %q", got)
	}
	s.killGuestd()
	s.stop(bundleLimit, 0, "")
	s.marked(data)
	s.clean(own)
	if sum(t, filepath.Join(dir, "var.img")) != before {
		t.Error("the bundle's own disk was written to")
	}
}

// variant makes a bundle in a folder of links to the files of another, with more
// on its kernel's command line.
func variant(t *testing.T, dir, from, words string) {
	t.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(from, "guest.json"))
	if err != nil {
		t.Fatal(err)
	}
	var description map[string]any
	if err := json.Unmarshal(text, &description); err != nil {
		t.Fatal(err)
	}
	description["cmdline"] = fmt.Sprint(description["cmdline"], " ", words)
	entries, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if entry.Name() != "guest.json" {
			if err := os.Symlink(filepath.Join(from, entry.Name()), filepath.Join(dir, entry.Name())); err != nil {
				t.Fatal(err)
			}
		}
	}
	if text, err = json.Marshal(description); err == nil {
		err = os.WriteFile(filepath.Join(dir, "guest.json"), text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestBundleWhoseGuestdNeverCalls boots, by way of the manager, which gives up
// after the spec's readiness timeout, what is no guest of ours.
func TestBundleWhoseGuestdNeverCalls(t *testing.T) {
	root := vmtest.Backend(t)
	from := bundle(t, root)
	t.Parallel()
	records, err := store.Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	m, err := manager.Open(manager.Config{
		Store: records, Drivers: map[string]sandbox.Driver{"vm": open(t, root)}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = m.Run(ctx) })
	defer func() {
		cancel()
		running.Wait()
		if err := errors.Join(m.Close(), records.Close()); err != nil {
			t.Error(err)
		}
	}()
	for name, tc := range map[string]struct {
		words   string
		timeout time.Duration
		want    []string
	}{
		"no-service": {"systemd.mask=guestd.service", 5 * time.Second, []string{
			"did not become ready within 5s: its guestd does not answer: booting its system, which has to start guestd as a service",
		}},
		"no-vsock": {"module_blacklist=vsock,vmw_vsock_virtio_transport,vmw_vsock_virtio_transport_common", bundleLimit, []string{
			"switched itself off before its guestd had called", "guestd: listen", "docs/guest-kit.md",
		}},
	} {
		variant(t, filepath.Join(vmtest.Bundles(root), name), from, tc.words)
		_, err := m.Create(t.Context(), manager.CreateRequest{Name: name, Start: true, Spec: sandbox.Spec{
			Driver: "vm", Machine: name, Resources: vmtest.Resources(),
			DriverOptions: json.RawMessage(`{"network": "none"}`), Readiness: sandbox.Readiness{Timeout: tc.timeout},
		}})
		for _, want := range tc.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v; want %q", name, err, want)
			}
		}
		vmtest.CheckNoProcess(t, filepath.Join(root, "boxes", name))
		if err := m.Delete(t.Context(), name, 0, false, manager.Request{}); err != nil {
			t.Error(err)
		}
		if left, _ := filepath.Glob(filepath.Join(root, "boxes", "*")); len(left) > 0 { // the pattern is a good one
			t.Errorf("left of %s: %v", name, left)
		}
	}
}
