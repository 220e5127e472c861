package manager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

// sleeping is a driver that says it saves memories, and boots as ever: what a
// manager does is the same. A file says that one is saved.
type sleeping struct {
	*process.Driver
	trouble atomic.Pointer[error]
}

func marker(ref sandbox.Ref) string { return filepath.Join(ref.Dir, "saved") }

func (d *sleeping) CheckHibernate(spec sandbox.Spec) error {
	if len(spec.Mounts) > 0 {
		return fmt.Errorf("it has mounts: %w", sandbox.ErrUnsupported)
	}
	return nil
}

func (d *sleeping) Hibernate(ctx context.Context, ref sandbox.Ref) error {
	if err := d.trouble.Load(); err != nil {
		return *err
	}
	if err := d.Driver.Stop(ctx, ref, 0); err != nil {
		return err
	}
	return os.WriteFile(marker(ref), nil, 0o600)
}

func (d *sleeping) Start(ctx context.Context, ref sandbox.Ref) error {
	_ = os.Remove(marker(ref))
	return d.Driver.Start(ctx, ref)
}

func (d *sleeping) Stop(ctx context.Context, ref sandbox.Ref, grace time.Duration) error {
	_ = os.Remove(marker(ref))
	return d.Driver.Stop(ctx, ref, grace)
}

func (d *sleeping) Inspect(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
	o, err := d.Driver.Inspect(ctx, ref)
	_, missing := os.Stat(marker(ref))
	o.Saved = o.State == sandbox.StateExited && missing == nil
	return o, err
}

func newSleeping(t *testing.T, edit ...func(*Config)) (*host, *sleeping) {
	t.Helper()
	d := &sleeping{Driver: process.New(process.Config{Root: t.TempDir(), Owner: "sleeping"})}
	edit = append(edit, func(c *Config) { c.Drivers = map[string]sandbox.Driver{process.Name: d} })
	return newHost(t, edit...), d
}

func (h *host) hibernate(name string) *Sandbox {
	h.t.Helper()
	s, err := h.m.Hibernate(h.t.Context(), name)
	if err != nil {
		h.t.Fatal(err)
	}
	return s
}

func TestHibernatedGoesOnAtItsNextStart(t *testing.T) {
	t.Parallel()
	h, _ := newSleeping(t)
	h.create("web", process.Spec("sleep"))
	s := h.hibernate("web")
	if s.Phase != PhaseHibernated || s.Desired != DesiredStopped || s.Generation != 1 || s.Exit != nil {
		t.Errorf("hibernated: %+v", s)
	}
	h.hibernate("web") // again: it stays so
	h.restart()
	if s := h.get("web"); s.Phase != PhaseHibernated {
		t.Errorf("after the agent has restarted: %+v", s)
	}
	if s, err := h.m.Start(t.Context(), "web"); err != nil || !s.isReady() || s.Generation != 2 {
		t.Errorf("started: %+v, %v", s, err)
	}
	if s, err := h.m.Stop(t.Context(), "web", 0); err != nil || s.Phase != PhaseStopped {
		t.Errorf("stopped: %+v, %v; it is not hibernated any more", s, err)
	}
}

func TestStopForgetsAMemory(t *testing.T) {
	t.Parallel()
	h, d := newSleeping(t)
	h.create("web", process.Spec("sleep"))
	h.hibernate("web")
	if s, err := h.m.Stop(t.Context(), "web", 0); err != nil || s.Phase != PhaseStopped {
		t.Errorf("stopped: %+v, %v", s, err)
	}
	if o, err := d.Inspect(t.Context(), h.m.ref("web")); err != nil || o.Saved {
		t.Errorf("its memory is still there: %+v, %v", o, err)
	}
}

func TestHibernationThatFailsEndsInAStop(t *testing.T) {
	t.Parallel()
	h, d := newSleeping(t)
	h.create("web", process.Spec("sleep"))
	trouble := errors.New("the disk is full")
	d.trouble.Store(&trouble)
	if _, err := h.m.Hibernate(t.Context(), "web"); !errors.Is(err, trouble) {
		t.Errorf("the error is %v", err)
	}
	if s := h.get("web"); s.Phase != PhaseStopped || s.Reason != hibernateFailed {
		t.Errorf("it is %+v", s)
	}
	if s, err := h.m.Start(t.Context(), "web"); err != nil || !s.isReady() || s.Reason != "" {
		t.Errorf("started: %+v, %v", s, err)
	}
}

func TestHibernationIsFinishedByTheNextAgent(t *testing.T) {
	t.Parallel()
	h, d := newSleeping(t)
	for _, name := range []string{"before", "after", "lost"} {
		h.create(name, process.Spec("sleep"))
	}
	h.hibernate("lost")
	refs := map[string]sandbox.Ref{}
	for _, name := range []string{"before", "after", "lost"} {
		refs[name] = h.m.ref(name)
	}
	h.stop()
	// Killed before the driver did anything, and after it had done it all.
	pending := func(record map[string]any) {
		record["desired"], record["pending"] = "stopped", "hibernate"
	}
	h.editRecord("before", pending)
	h.editRecord("after", pending)
	if err := d.Hibernate(t.Context(), refs["after"]); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(marker(refs["lost"])); err != nil { // as a restart of the host does
		t.Fatal(err)
	}
	h.start()
	for name, want := range map[string][2]string{
		"before": {string(PhaseStopped), hibernateFailed}, "after": {string(PhaseHibernated), ""}, "lost": {string(PhaseStopped), hibernationLost},
	} {
		if s := h.get(name); string(s.Phase) != want[0] || s.Reason != want[1] {
			t.Errorf("%s is %s, %q; want %v", name, s.Phase, s.Reason, want)
		}
	}
}

func TestIdleSandboxesHibernateIfTheyAreTo(t *testing.T) {
	t.Parallel()
	h, _ := newSleeping(t, func(c *Config) { c.IdleScan = 20 * time.Millisecond })
	spec := process.Spec("sleep")
	spec.Idle = sandbox.IdlePolicy{Timeout: time.Second, Action: sandbox.IdleHibernate}
	h.create("web", spec)
	h.await("web", "hibernated for idleness", func(s *Sandbox) bool { return s.Phase == PhaseHibernated && s.Reason == "IDLE" })
}

func TestHibernateIsRefused(t *testing.T) {
	t.Parallel()
	idle := sandbox.IdlePolicy{Timeout: time.Minute, Action: sandbox.IdleHibernate}
	field := func(err error, what string) {
		t.Helper()
		if wrong, ok := errors.AsType[*sandbox.FieldError](err); !ok || wrong.Field != "spec.idle.action" || !errors.Is(err, sandbox.ErrUnsupported) {
			t.Errorf("%s: %v", what, err)
		}
	}
	h := newHost(t)
	h.create("web", process.Spec("sleep"))
	if _, err := h.m.Hibernate(t.Context(), "web"); !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("by a driver that cannot: %v", err)
	}
	_, err := h.m.Update(t.Context(), UpdateRequest{Name: "web", Idle: &idle})
	field(err, "an idle policy that its driver cannot follow")
	if s := h.get("web"); !s.isReady() {
		t.Errorf("it is %+v", s)
	}

	h, _ = newSleeping(t)
	h.create("web", process.Spec("sleep"))
	if _, err := h.m.Stop(t.Context(), "web", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := h.m.Hibernate(t.Context(), "web"); !errors.Is(err, sandbox.ErrState) {
		t.Errorf("of one that is stopped: %v", err)
	}
	spec := process.Spec("sleep")
	spec.Mounts = []sandbox.Mount{{Kind: sandbox.MountData, Source: t.TempDir(), Target: "/data"}}
	spec.Idle = idle
	_, err = h.m.Create(t.Context(), CreateRequest{Name: "shares", Spec: spec})
	field(err, "an idle policy for one that has mounts")
}

func TestHibernateThatCameTooLateChangesNothing(t *testing.T) {
	t.Parallel()
	h, _ := newSleeping(t)
	h.create("web", process.Spec("sleep"))
	e, err := h.m.find("web")
	if err != nil {
		t.Fatal(err)
	}
	if err := e.lock(t.Context()); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := h.m.Hibernate(t.Context(), "web")
		done <- err
	}()
	// For it to wait by then; if it comes later still, it finds the same.
	time.Sleep(50 * time.Millisecond)
	stopped := h.m.stop(t.Context(), e, 0, "")
	e.unlock()
	if err := <-done; stopped != nil || !errors.Is(err, sandbox.ErrState) {
		t.Errorf("hibernated once it was stopped: %v, %v", err, stopped)
	}
	if s := h.get("web"); s.Phase != PhaseStopped || s.Reason != "" {
		t.Errorf("it is %+v", s)
	}
}
