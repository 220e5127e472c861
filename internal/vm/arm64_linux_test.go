package vm_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/vmtest"
	"github.com/choiros/agent/test/image"
)

// macPatience is for a boot whose processor is emulated, on a machine that
// does other things too.
const macPatience = 5 * time.Minute

// TestMacGuest boots here what a Mac boots: the kit for arm64, on the kinds of
// device that Virtualization.framework has, with an image for arm64. Nothing of
// it is native, but on a host that is of that architecture, too. The processor
// is emulated on both.
func TestMacGuest(t *testing.T) {
	if testing.Short() {
		t.Skip("it boots a machine")
	}
	m := newMacGuest(t)
	for _, step := range []struct {
		name string
		run  func()
	}{
		{"boots", m.boot},
		{"devices", m.devices},
		{"console", m.console},
		{"folders", m.folders},
		{"commands", m.commands},
		{"reaches out", m.reachesOut},
		{"stops", m.stops},
	} {
		began := time.Now()
		step.run()
		t.Logf("%-11s %4.1f s", step.name, time.Since(began).Seconds())
	}
}

// TestImageOfAnotherArchitectureIsRefused needs no machine to run.
func TestImageOfAnotherArchitectureIsRefused(t *testing.T) {
	root := vmtest.BackendFor(t, "arm64")
	d := openMac(t, root)
	ref := sandbox.Ref{ID: "foreign", Dir: filepath.Join(t.TempDir(), "foreign")}
	spec := sandbox.Spec{Driver: "vm", Image: image.ArchName("amd64"), Resources: vmtest.Resources()}
	want := &sandbox.FieldError{Field: "spec.image", Problem: "image " + spec.Image + " is for amd64 and cannot run on arm64; load or pull it for linux/arm64"}
	for what, err := range map[string]error{"Validate": d.Validate(t.Context(), spec), "Create": d.Create(t.Context(), ref, spec)} {
		if got, ok := errors.AsType[*sandbox.FieldError](err); !ok || *got != *want || !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	if made, err := d.List(t.Context()); err != nil || len(made) > 0 {
		t.Errorf("there are %v, %v; want nothing of what was refused", made, err)
	}
}

func openMac(t *testing.T, root string) *vm.Driver {
	t.Helper()
	d, err := vmtest.OpenFor(root, "arm64")
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// macGuest is a sandbox with guests of a Mac's architecture.
type macGuest struct {
	*testing.T
	ctx             context.Context //nolint:containedctx // The test's.
	driver          *vm.Driver
	ref             sandbox.Ref
	guest           *guest.Guest
	workspace, data string
}

func newMacGuest(t *testing.T) *macGuest {
	root := vmtest.BackendFor(t, "arm64")
	ctx, cancel := context.WithTimeout(t.Context(), macPatience)
	t.Cleanup(cancel)
	m := &macGuest{T: t, ctx: ctx, driver: openMac(t, root), workspace: t.TempDir(), data: t.TempDir()}
	m.ref = sandbox.Ref{ID: "mac", Dir: filepath.Join(t.TempDir(), "mac")}
	m.guest = guest.New(m.ref.ID, func(ctx context.Context) (net.Conn, error) { return m.driver.Dial(ctx, m.ref, guest.Port) })
	if err := os.WriteFile(filepath.Join(m.workspace, "outside"), []byte("from the host\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.driver.Delete(context.WithoutCancel(t.Context()), m.ref); err != nil {
			t.Error(err)
		}
	})
	m.must("create", m.driver.Create(ctx, m.ref, sandbox.Spec{
		Driver: "vm", Image: image.ArchName("arm64"), Command: []string{"write", "/data/inside", "from the workload"},
		Resources: vmtest.Resources(), DriverOptions: json.RawMessage(`{"disk_mib": 64}`),
		Mounts: []sandbox.Mount{
			{Kind: sandbox.MountWorkspace, Source: m.workspace, Target: "/workspace", ReadWrite: true},
			{Kind: sandbox.MountData, Source: m.data, Target: "/data"},
			{Kind: sandbox.MountDisk, Source: filepath.Join(t.TempDir(), "disk.img"), Target: "/disk", SizeMiB: 64},
		},
		Egress: sandbox.Egress{Mode: sandbox.EgressList, Rules: []sandbox.EgressRule{{Name: "allowed.invalid"}}},
	}))
	return m
}

func (m *macGuest) must(what string, err error) {
	m.Helper()
	if err != nil {
		m.Fatalf("%s: %v", what, err)
	}
}

// happens waits until something is true of a machine that runs.
func (m *macGuest) happens(what string, is func() bool) {
	m.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		if seen, err := m.driver.Inspect(m.ctx, m.ref); err != nil || seen.State != sandbox.StateRunning {
			m.Fatalf("while waiting until %s: %+v, %v", what, seen, err)
		}
		select {
		case <-tick.C:
		case <-m.ctx.Done():
			m.Fatalf("not until %v: %s", m.ctx.Err(), what)
		}
	}
}

// boot starts it, and has guestd start the workload.
func (m *macGuest) boot() {
	began := time.Now()
	m.must("start", m.driver.Start(m.ctx, m.ref))
	m.happens("guestd answers", func() bool {
		_, err := m.guest.Hello(m.ctx)
		return err == nil
	})
	m.Logf("an arm64 guest on %s: its guestd answers %.1f s after Start was called", runtime.GOARCH, time.Since(began).Seconds())
	m.must("configure", m.guest.Configure(m.ctx, guest.Configuration{Generation: 1}))
}

// devices looks at what the machine is made of: on a bus of PCI virtio's
// devices of version 1, each with its driver, and nothing else but what makes
// the bus; and on no other bus any of virtio's.
func (m *macGuest) devices() {
	if arch := m.cat("/proc/sys/kernel/arch"); arch != "aarch64\n" {
		m.Errorf("its kernel is for %q", arch)
	}
	// Numbers are those of the specification of virtio 1.2, section 5, after
	// 0x1040, which section 4.1.2.1 has them begin at.
	want := map[string]int{
		"network virtio-pci": 1, "block virtio-pci": 3, "console virtio-pci": 1, "entropy virtio-pci": 1,
		"balloon virtio-pci": 1, "vsock virtio-pci": 1, "fs virtio-pci": 2,
	}
	kinds := map[string]string{
		"1af41041": "network", "1af41042": "block", "1af41043": "console", "1af41044": "entropy",
		"1af41045": "balloon", "1af41053": "vsock", "1af4105a": "fs",
		"1b360008": "", "1b36000c": "", // QEMU's host bridge and root port
	}
	found := map[string]int{}
	for line := range strings.Lines(m.cat("/proc/bus/pci/devices")) {
		fields := strings.Fields(line)
		kind, known := kinds[fields[1]]
		if !known {
			kind = "something unknown, " + fields[1] + ","
		}
		if kind != "" {
			found[kind+" "+fields[len(fields)-1]]++ // the driver is the last
		}
	}
	if diff := cmp.Diff(want, found); diff != "" {
		m.Fatalf("its devices (-want +got):\n%s", diff)
	}
	// Balloon and entropy come when the workload runs.
	drivers := map[string]int{
		"virtio_net": 1, "virtio_blk": 3, "virtio_console": 1, "virtio_rng": 1, "virtio_balloon": 1,
		"vmw_vsock_virtio_transport": 1, "virtiofs": 2,
	}
	bound := map[string]int{}
	m.happens("each device of virtio's has its driver", func() bool {
		for driver := range drivers {
			files, _, err := m.guest.List(m.ctx, "/sys/bus/virtio/drivers/"+driver, "", 100)
			if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
				m.Fatalf("list the devices of %s: %v; found so far: %v", driver, err, bound)
			}
			bound[driver] = 0
			for _, file := range files {
				if strings.HasPrefix(file.Name, "virtio") {
					bound[driver]++
				}
			}
		}
		return maps.Equal(bound, drivers)
	})
	all, _, err := m.guest.List(m.ctx, "/sys/bus/virtio/devices", "", 100)
	m.must("list virtio's devices", err)
	for _, device := range all {
		if !strings.Contains(device.Target, "/pci") {
			m.Errorf("%s is not on PCI: %s", device.Name, device.Target)
		}
	}
}

// console looks whether what is written to the console inside is seen outside.
func (m *macGuest) console() {
	if consoles := m.cat("/proc/consoles"); !strings.HasPrefix(consoles, "hvc0 ") {
		m.Errorf("its first console is not hvc0: %q", consoles)
	}
	conn, err := m.driver.Console(m.ctx, m.ref)
	m.must("open the console", err)
	defer conn.Close()
	const text = "said on the console"
	writer, err := m.guest.Exec(m.ctx, guest.Command{Args: []string{"/workload", "write", "/dev/hvc0", text}, NoInput: true})
	m.must("write to the console", err)
	defer writer.Close()
	deadline, _ := m.ctx.Deadline()
	m.must("bound the reading", conn.SetReadDeadline(deadline))
	for lines := bufio.NewScanner(conn); lines.Scan(); {
		if strings.HasSuffix(lines.Text(), text) {
			return
		}
	}
	m.Errorf("the console does not say %q", text)
}

// folders looks at both shares from both sides, and at the data disk.
func (m *macGuest) folders() {
	var content []byte
	m.happens("the workload's file is seen on the host", func() bool {
		content, _ = os.ReadFile(filepath.Join(m.data, "inside")) // it may not be there yet
		return len(content) > 0
	})
	if string(content) != "from the workload\n" {
		m.Errorf("the workload wrote %q", content)
	}
	if content := m.cat("/workspace/outside"); content != "from the host\n" {
		m.Errorf("of the host's file it reads %q", content)
	}
	for _, path := range []string{"/workspace/made", "/disk/made"} {
		if _, stderr, code := m.run("touch", path); code != 0 {
			m.Errorf("touch %s: %s", path, stderr)
		}
	}
	if _, err := os.Stat(filepath.Join(m.workspace, "made")); err != nil {
		m.Errorf("what was made inside: %v", err)
	}
	mounts, _, _ := m.run("mounts")
	for _, want := range []string{"/ overlay ", "/workspace virtiofs rw", "/data virtiofs rw", "/disk ext4 rw"} {
		if !strings.Contains("\n"+mounts, "\n"+want) {
			m.Errorf("nothing is mounted as %q:\n%s", want, mounts)
		}
	}
}

// commands runs some of guestd's, over vsock.
func (m *macGuest) commands() {
	if _, _, code := m.run("exit", "7"); code != 7 {
		m.Errorf("a command that ends with 7 ended with %d", code)
	}
	if stdout, stderr, _ := m.run("spew", "4"); stdout != "line 1\nline 3\n" || stderr != "line 2\nline 4\n" {
		m.Errorf("a command printed %q and %q", stdout, stderr)
	}
}

// reachesOut looks at the shim's network, which is to be had without any of the
// host's: a connection to the gateway, and a name that the policy refuses.
func (m *macGuest) reachesOut() {
	if _, stderr, code := m.run("connect", "192.168.127.1:53"); code != 0 {
		m.Errorf("it does not reach the gateway: %s", stderr)
	}
	if _, _, code := m.run("connect", "refused.invalid:80"); code == 0 {
		m.Error("it reaches what is refused")
	}
	refused, _, err := m.driver.EgressRefused(m.ctx, m.ref)
	m.must("ask what was refused", err)
	if !slices.ContainsFunc(refused, func(r sandbox.Refusal) bool { return r.Destination == "refused.invalid" && r.Protocol == "dns" }) {
		m.Errorf("it asked for refused.invalid, and refused was %+v", refused)
	}
}

// stops stops it with a grace that it does not use up.
func (m *macGuest) stops() {
	m.must("stop", m.driver.Stop(m.ctx, m.ref, macPatience))
	seen, err := m.driver.Inspect(m.ctx, m.ref)
	m.must("inspect", err)
	if seen.State != sandbox.StateExited || seen.ExitCode != 0 || seen.Detail != "" {
		m.Errorf("it ended as %+v, want exit code 0 and nothing to say", seen)
	}
	var printed bytes.Buffer
	m.must("read its log", m.driver.Logs(m.ctx, m.ref, sandbox.LogOptions{Tail: -1, Stdout: true, Stderr: true}, func(entry sandbox.LogEntry) error {
		printed.Write(entry.Data)
		return nil
	}))
	if printed.String() != "ready\n" {
		m.Errorf("the workload printed %q", printed.String())
	}
}

// cat is what a file inside has in it.
func (m *macGuest) cat(path string) string {
	m.Helper()
	stdout, stderr, code := m.run("cat", path)
	if code != 0 {
		m.Errorf("cat %s: %s", path, stderr)
	}
	return stdout
}

// run runs the workload's program inside, as a command.
func (m *macGuest) run(args ...string) (stdout, stderr string, code int32) {
	m.Helper()
	x, err := m.guest.Exec(m.ctx, guest.Command{Args: append([]string{"/workload"}, args...), NoInput: true})
	m.must(fmt.Sprint("run ", args), err)
	defer x.Close()
	var out, errs strings.Builder
	for {
		output, err := x.Receive()
		m.must(fmt.Sprint("run ", args), err)
		switch {
		case output.Exit != nil:
			return out.String(), errs.String(), output.Exit.Code
		case output.Stderr:
			errs.Write(output.Data)
		default:
			out.Write(output.Data)
		}
	}
}
