package manager

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

// policed is a driver that takes policies of egress, but for when it does not.
type policed struct {
	process.Policed
	trouble atomic.Pointer[error]
}

func (d *policed) SetEgress(ctx context.Context, ref sandbox.Ref, egress sandbox.Egress) error {
	if err := d.trouble.Load(); err != nil {
		return *err
	}
	return d.Policed.SetEgress(ctx, ref, egress)
}

// picky is a driver that cannot keep policies of names.
type picky struct{ *policed }

func (picky) CheckEgress(spec sandbox.Spec) error {
	if spec.Egress.Mode == sandbox.EgressList {
		return sandbox.Unsupportedf("spec.egress", "no lists here; allow everything")
	}
	return nil
}

func TestPolicyThatCannotBeKeptIsNotRecorded(t *testing.T) {
	t.Parallel()
	d := &policed{Policed: process.NewPoliced(process.Config{Root: t.TempDir(), Owner: "policed"})}
	h := newHost(t, func(c *Config) { c.Drivers = map[string]sandbox.Driver{process.Name: picky{d}} })
	h.create("web", process.Spec("sleep"))
	list := sandbox.Egress{Mode: sandbox.EgressList, Rules: []sandbox.EgressRule{{Name: "example.com"}}}
	_, err := h.m.Update(t.Context(), UpdateRequest{Name: "web", Egress: &list})
	if wrong, ok := errors.AsType[*sandbox.FieldError](err); !ok || wrong.Field != "spec.egress" || !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("%v, want a refusal of spec.egress", err)
	}
	d.inForce(t, h, sandbox.Egress{})
	if e, err := h.m.find("web"); err != nil || !e.view().Spec.Egress.IsZero() {
		t.Errorf("it was recorded, %v", err)
	}
	h.create("idle", process.Spec("sleep"))
	if _, err := h.m.Update(t.Context(), UpdateRequest{Name: "idle", Idle: &sandbox.IdlePolicy{}}); err != nil {
		t.Errorf("what has nothing to do with it: %v", err)
	}
}

func newPoliced(t *testing.T) (*host, *policed) {
	t.Helper()
	d := &policed{Policed: process.NewPoliced(process.Config{Root: t.TempDir(), Owner: "policed"})}
	return newHost(t, func(c *Config) { c.Drivers = map[string]sandbox.Driver{process.Name: d} }), d
}

// inForce wants the driver to have a policy.
func (d *policed) inForce(t *testing.T, h *host, want sandbox.Egress) {
	t.Helper()
	got, err := d.Egress(h.m.ref("web"))
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("the policy in force (-want +got), %v:\n%s", err, diff)
	}
}

func TestEgressIsSetAndChangedLive(t *testing.T) {
	t.Parallel()
	h, d := newPoliced(t)
	list := sandbox.Egress{Mode: sandbox.EgressList, Rules: []sandbox.EgressRule{{Name: "example.com", Ports: []sandbox.PortRange{{From: 443}}}}}
	spec := process.Spec("sleep")
	spec.Egress = list
	before := h.create("web", spec)
	d.inForce(t, h, list)
	list.Rules[0].Name = "EXAMPLE.org." // is brought into its simplest form
	s, err := h.m.Update(t.Context(), UpdateRequest{Name: "web", Egress: &list})
	list.Rules[0].Name = "example.org"
	if diff := cmp.Diff(list, s.Spec.Egress); err != nil || diff != "" || s.Generation != 1 || !s.UpdatedAt.After(before.UpdatedAt) {
		t.Errorf("%+v, %v (-want +got):\n%s", s, err, diff)
	}
	d.inForce(t, h, list)
	_, err = h.m.Update(t.Context(), UpdateRequest{Name: "web", Egress: &sandbox.Egress{Mode: "perhaps"}})
	if wrong, ok := errors.AsType[*sandbox.FieldError](err); !ok || wrong.Field != "spec.egress.mode" {
		t.Errorf("a wrong policy: %v", err)
	}
	// None at all is a policy, too; and it may be stopped meanwhile.
	if _, err := h.m.Stop(t.Context(), "web", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := h.m.Update(t.Context(), UpdateRequest{Name: "web", Egress: &sandbox.Egress{}}); err != nil {
		t.Error(err)
	}
	d.inForce(t, h, sandbox.Egress{})
}

func TestRefusalsAreTold(t *testing.T) {
	t.Parallel()
	h, d := newPoliced(t)
	h.create("web", process.Spec("sleep"))
	refusal := sandbox.Refusal{Destination: "192.0.2.1", Port: 443, Protocol: "tcp", Count: 3, Last: time.Now().UTC()}
	if err := d.Refuse(t.Context(), h.m.ref("web"), refusal); err != nil {
		t.Fatal(err)
	}
	recent, total, err := h.m.Refusals(t.Context(), "web")
	if diff := cmp.Diff([]sandbox.Refusal{refusal}, recent); err != nil || diff != "" || total != 3 {
		t.Errorf("total %d, %v (-want +got):\n%s", total, err, diff)
	}
	if _, err := h.m.Stop(t.Context(), "web", 0); err != nil {
		t.Fatal(err)
	}
	if recent, total, err := h.m.Refusals(t.Context(), "web"); err != nil || len(recent) != 0 || total != 0 {
		t.Errorf("of one that is stopped: %v, %d, %v", recent, total, err)
	}
}

func TestEgressThatWasNotSetIsSetLater(t *testing.T) {
	t.Parallel()
	h, d := newPoliced(t)
	h.create("web", process.Spec("sleep"))
	deny := sandbox.Egress{Mode: sandbox.EgressDeny}
	trouble := error(&sandbox.UnavailableError{Err: errors.New("no")})
	d.trouble.Store(&trouble)
	if _, err := h.m.Update(t.Context(), UpdateRequest{Name: "web", Egress: &deny}); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("an update that its driver did not take: %v", err)
	}
	// It does not boot with a policy that is not its own.
	if _, err := h.m.Restart(t.Context(), "web", 0, Request{}); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("restarted all the same: %v", err)
	}
	d.trouble.Store(nil)
	if s, err := h.m.Start(t.Context(), "web"); err != nil || s.Spec.Egress.Mode != sandbox.EgressDeny {
		t.Errorf("started: %+v, %v", s, err)
	}
	d.inForce(t, h, deny)

	// The agent is killed between the intent and the action.
	h.stop()
	h.editRecord("web", func(record map[string]any) {
		record["egress_due"] = true
		record["spec"].(map[string]any)["egress"] = map[string]any{"deny_private": true}
	})
	h.start()
	if s := h.get("web"); s.Phase != PhaseReady {
		t.Errorf("found: %+v", s)
	}
	d.inForce(t, h, sandbox.Egress{DenyPrivate: true})
}

func TestEgressIsTriedAgainWhileItRuns(t *testing.T) {
	t.Parallel()
	h, d := newPoliced(t)
	h.create("web", process.Spec("sleep"))
	trouble := error(&sandbox.UnavailableError{Err: errors.New("no")})
	d.trouble.Store(&trouble)
	deny := sandbox.Egress{Mode: sandbox.EgressDeny}
	if _, err := h.m.Update(t.Context(), UpdateRequest{Name: "web", Egress: &deny}); err == nil {
		t.Error("an update that its driver did not take succeeded")
	}
	if s := h.get("web"); s.Phase != PhaseReady {
		t.Errorf("meanwhile: %+v", s)
	}
	d.trouble.Store(nil)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if got, err := d.Egress(h.m.ref("web")); err == nil && got.Mode == sandbox.EgressDeny {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it was not tried again")
		}
	}
	h.await("web", "ready", inPhase(PhaseReady))
}

func TestEgressNeedsADriverThatEnforcesIt(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := process.Spec("sleep")
	spec.Egress.Mode = sandbox.EgressAllow
	_, err := h.m.Create(t.Context(), CreateRequest{Name: "web", Spec: spec})
	if wrong, ok := errors.AsType[*sandbox.FieldError](err); !ok || wrong.Field != "spec.egress" || !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("%v; want spec.egress to be unsupported", err)
	}
}

func TestDiskImages(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	roots := filepath.Join(dir, "roots")
	for _, folder := range []string{roots, filepath.Join(dir, "outside"), filepath.Join(roots, "folder.img")} {
		if err := os.Mkdir(folder, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"roots/there.img", "outside/other.img"} {
		if err := os.WriteFile(filepath.Join(dir, file), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"out.img": "../outside/other.img", "dangling.img": "nowhere.img", "outfolder": "../outside"} {
		if err := os.Symlink(to, filepath.Join(roots, link)); err != nil {
			t.Fatal(err)
		}
	}
	h := newHost(t, func(c *Config) { c.MountRoots = []string{roots} })
	const source, kind = "spec.mounts[0].source", "spec.mounts[0].kind"
	for image, field := range map[string]string{
		filepath.Join(roots, "there.img"):           kind, // which is what this driver has against it
		filepath.Join(roots, "new.img"):             kind,
		filepath.Join(roots, "missing", "new.img"):  source,
		filepath.Join(roots, "folder.img"):          source,
		filepath.Join(roots, "out.img"):             source,
		filepath.Join(roots, "dangling.img"):        source,
		filepath.Join(roots, "outfolder", "x.img"):  source,
		filepath.Join(dir, "outside", "other.img"):  source,
		filepath.Join(h.dir, "records", "disk.img"): source,
	} {
		spec := process.Spec("sleep")
		spec.Mounts = []sandbox.Mount{{Kind: sandbox.MountDisk, Source: image, Target: "/disk", SizeMiB: 64}}
		_, err := h.m.Create(t.Context(), CreateRequest{Name: "web", Spec: spec, ValidateOnly: true})
		if wrong, ok := errors.AsType[*sandbox.FieldError](err); !ok || wrong.Field != field {
			t.Errorf("%s: %v; want an error of %s", image, err, field)
		}
	}
}
