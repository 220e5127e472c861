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
	"strings"
	"testing"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest"
	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/vmtest"
	"github.com/choiros/agent/test/image"
)

// errNoRosetta is what a Mac says that could have Rosetta.
var errNoRosetta = errors.New("there is no Rosetta; install it with softwareupdate --install-rosetta, or use an arm64 image")

// newRosetta opens a driver for arm64, as on a Mac whose Rosetta is as missing
// says, and returns the spec of a sandbox from an image for amd64.
func newRosetta(t *testing.T, missing *error) (*vm.Driver, string, sandbox.Spec) {
	t.Helper()
	root := vmtest.BackendFor(t, "arm64")
	translator, err := image.TranslatorDir()
	if err != nil {
		drivertest.Require(t, "qemu", &sandbox.UnavailableError{Err: err})
	}
	config, err := vmtest.Config(root, "arm64")
	if err != nil {
		t.Fatal(err)
	}
	config.Env = append(slices.Clone(config.Env), image.TranslatorEnv+"="+translator)
	config.Rosetta = func() error { return *missing }
	d, err := vm.New(config)
	if err != nil {
		t.Fatal(err)
	}
	return d, root, sandbox.Spec{
		Driver: "vm", Image: image.ArchName("amd64"), Command: []string{"sleep"},
		Resources: vmtest.Resources(), DriverOptions: json.RawMessage(`{"disk_mib": 64, "network": "none"}`),
	}
}

// TestImageForAMD64NeedsRosetta needs no machine to run.
func TestImageForAMD64NeedsRosetta(t *testing.T) {
	missing := errNoRosetta
	d, root, spec := newRosetta(t, &missing)
	ref := sandbox.Ref{ID: "foreign", Dir: filepath.Join(t.TempDir(), "foreign")}
	want := sandbox.FieldError{
		Field: "spec.image", Problem: "image " + spec.Image + " is for linux/amd64, and machines here are linux/arm64: " + errNoRosetta.Error(), Err: sandbox.ErrInvalid,
	}
	for what, err := range map[string]error{"Validate": d.Validate(t.Context(), spec), "Create": d.Create(t.Context(), ref, spec)} {
		if got, ok := errors.AsType[*sandbox.FieldError](err); !ok || got.Field != want.Field || got.Problem != want.Problem || !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v, want %v", what, err, &want)
		}
	}
	if made, err := d.List(t.Context()); err != nil || len(made) > 0 {
		t.Errorf("there are %v, %v; want nothing of what was refused", made, err)
	}
	report, err := d.Probe(t.Context())
	if err != nil || !slices.Contains(report.Warnings, "images for linux/amd64 cannot run here: "+errNoRosetta.Error()) {
		t.Errorf("it reports %+v, %v", report, err)
	}

	// As soon as it is installed it is there.
	missing = nil
	if report, err := d.Probe(t.Context()); err != nil || len(report.Warnings) > 0 || !strings.HasSuffix(report.Version, ", images for linux/amd64 by Rosetta") {
		t.Errorf("it reports %+v, %v", report, err)
	}
	if err := d.Validate(t.Context(), spec); err != nil {
		t.Error(err)
	}
	if err := d.CheckHibernate(spec); !errors.Is(err, sandbox.ErrUnsupported) || !strings.Contains(err.Error(), "Rosetta is a share") {
		t.Errorf("its memory: %v", err)
	}
	if err := d.Create(t.Context(), ref, spec); err != nil {
		t.Fatal(err)
	}
	record, err := filepath.Glob(filepath.Join(root, "boxes", ref.ID, "made*"))
	if err != nil || len(record) != 1 {
		t.Fatalf("its record: %v, %v", record, err)
	}
	if text, err := os.ReadFile(record[0]); err != nil || !strings.Contains(string(text), `"amd64"`) {
		t.Errorf("its record does not say for what its image is: %s, %v", text, err)
	}
	missing = errNoRosetta
	if err := d.Start(t.Context(), ref); !errors.Is(err, sandbox.ErrUnavailable) || !strings.Contains(err.Error(), spec.Image) || !strings.Contains(err.Error(), errNoRosetta.Error()) {
		t.Errorf("without Rosetta it starts: %v", err)
	}
	if seen, err := d.Inspect(t.Context(), ref); err != nil || seen.State != sandbox.StateCreated {
		t.Errorf("it is %+v, %v", seen, err)
	}
	spec.Image = image.ArchName("arm64")
	if err := d.Validate(t.Context(), spec); err != nil {
		t.Errorf("an image of the machine's own: %v", err)
	}
	if err := d.Delete(t.Context(), ref); err != nil {
		t.Error(err)
	}
}

// TestGuestKitOfOldIsRefusedForRosetta needs no machine to run.
func TestGuestKitOfOldIsRefusedForRosetta(t *testing.T) {
	var missing error
	_, root, spec := newRosetta(t, &missing)
	config, err := vmtest.Config(root, "arm64")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(config.Kit, "guest.json"))
	if err != nil {
		t.Fatal(err)
	}
	old := t.TempDir()
	for _, name := range []string{"kernel", "initramfs"} {
		if err := os.Symlink(filepath.Join(config.Kit, name), filepath.Join(old, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(old, "guest.json"), []byte(strings.ReplaceAll(string(text), "binfmt_misc", "another")), 0o600); err != nil {
		t.Fatal(err)
	}
	config.Kit, config.Rosetta = old, func() error { return nil }
	d, err := vm.New(config)
	if err != nil {
		t.Fatal(err)
	}
	err = d.Validate(t.Context(), spec)
	if wrong, ok := errors.AsType[*sandbox.FieldError](err); !ok || wrong.Field != "spec.image" || !strings.Contains(wrong.Problem, "the guest kit is too old") || !strings.Contains(wrong.Problem, spec.Image) {
		t.Errorf("it is taken: %v", err)
	}
	if report, err := d.Probe(t.Context()); err != nil || len(report.Warnings) != 1 || !strings.Contains(report.Warnings[0], "agentctl guest-kit install") {
		t.Errorf("it reports %+v, %v", report, err)
	}
}

// TestImageForAMD64RunsInAMachineForARM64 boots what a Mac with Rosetta boots.
// For Rosetta there is QEMU's program of the same kind: the kernel starts it in
// the same way. Both the machine's processor and the program's are emulated.
func TestImageForAMD64RunsInAMachineForARM64(t *testing.T) {
	if testing.Short() {
		t.Skip("it boots a machine")
	}
	var missing error
	d, _, spec := newRosetta(t, &missing)
	ctx, cancel := context.WithTimeout(t.Context(), macPatience)
	defer cancel()
	m := &macGuest{T: t, ctx: ctx, driver: d, ref: sandbox.Ref{ID: "rosetta", Dir: filepath.Join(t.TempDir(), "rosetta")}}
	m.guest = guest.New(m.ref.ID, func(ctx context.Context) (net.Conn, error) { return d.Dial(ctx, m.ref, guest.Port) })
	t.Cleanup(func() {
		if err := d.Delete(context.WithoutCancel(t.Context()), m.ref); err != nil {
			t.Error(err)
		}
	})
	spec.User = "app" // who may read nothing but what anybody may
	m.must("create", d.Create(ctx, m.ref, spec))
	m.boot()
	began := time.Now()
	m.happens("its workload, for amd64, is ready", func() bool {
		var printed []byte
		m.must("read its log", d.Logs(ctx, m.ref, sandbox.LogOptions{Tail: -1, Stdout: true}, func(entry sandbox.LogEntry) error {
			printed = append(printed, entry.Data...)
			return nil
		}))
		return string(printed) == "ready\n"
	})
	t.Logf("the workload is ready %.1f s after", time.Since(began).Seconds())
	if stdout, stderr, code := m.run("args", "one", "two words", ""); code != 0 || stdout != "\"one\"\n\"two words\"\n\"\"\n" {
		t.Errorf("a command got %q; it said %q and ended with %d", stdout, stderr, code)
	}
	// What follows is read by guestd, which is for arm64, and so faster.
	if arch := m.read("/proc/sys/kernel/arch"); arch != "aarch64\n" {
		t.Errorf("its kernel is for %q", arch)
	}
	if rule := m.read("/proc/sys/fs/binfmt_misc/rosetta"); !strings.HasPrefix(rule, "enabled\n") || !strings.Contains(rule, "flags: OCF\n") {
		t.Errorf("the kernel has the rule\n%s", rule)
	}
	// Nothing of it is in the image's way.
	if _, err := m.guest.Stat(ctx, "/rosetta"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("there is a /rosetta in the image: %v", err)
	}
	if mounts := m.read("/proc/mounts"); !strings.Contains(mounts, "overlay / overlay") || strings.Contains(mounts, "virtiofs") {
		t.Errorf("mounted are\n%s", mounts)
	}
	if err := d.Hibernate(ctx, m.ref); err == nil || !strings.Contains(err.Error(), "Rosetta is a share") {
		t.Errorf("its memory is saved: %v", err)
	}
	m.stops()
}

// read is what a file inside has in it, read by guestd.
func (m *macGuest) read(path string) string {
	m.Helper()
	download, err := m.guest.Read(m.ctx, path, 0, 0)
	m.must("read "+path, err)
	defer download.Close()
	content, err := io.ReadAll(download)
	m.must("read "+path, err)
	return string(content)
}
