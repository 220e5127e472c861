package manager

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

// editRecord changes what the record of a sandbox says, of an agent that does
// not run.
func (h *host) editRecord(name string, edit func(map[string]any)) {
	h.t.Helper()
	path := filepath.Join(h.dir, "records", name+".json")
	data, err := os.ReadFile(path)
	var record map[string]any
	if err == nil {
		err = json.Unmarshal(data, &record)
	}
	if err == nil {
		edit(record)
		data, err = json.Marshal(record)
	}
	if err == nil {
		err = os.WriteFile(path, data, 0o600)
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// halted reports whether the operating system has a sandbox halted.
func (h *host) halted(name string) bool {
	h.t.Helper()
	obs, err := h.driver().Inspect(h.t.Context(), h.m.ref(name))
	if err != nil {
		h.t.Fatal(err)
	}
	return obs.Paused
}

func (h *host) pause(name string) *Sandbox {
	h.t.Helper()
	s, err := h.m.Pause(h.t.Context(), name)
	if err != nil || s.Phase != PhasePaused || !h.halted(name) {
		h.t.Fatalf("paused: %+v, %v", s, err)
	}
	return s
}

func TestPauseAndResume(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	before := h.create("web", process.Spec("sleep"))
	h.await("web", "greeted", func(s *Sandbox) bool { return s.GuestdVersion != "" })
	s := h.pause("web")
	if s.Reason != "PAUSED" || s.Desired != DesiredRunning || s.Generation != 1 || s.GuestdVersion == "" || !s.ReadyAt.Equal(before.ReadyAt) {
		t.Errorf("paused: %+v", s)
	}
	h.pause("web") // again
	for range 2 {
		s, err := h.m.Resume(t.Context(), "web")
		if err != nil || s.Phase != PhaseReady || s.Reason != "" || s.Generation != 1 || h.halted("web") || !s.ReadyAt.Equal(before.ReadyAt) {
			t.Errorf("resumed: %+v, %v", s, err)
		}
	}
	stats, err := h.m.Stats()
	if h.pause("web"); err != nil || stats.Phases[PhaseReady] != 1 {
		t.Errorf("phases: %v, %v", stats.Phases, err)
	}
	if stats, err = h.m.Stats(); err != nil || stats.Phases[PhasePaused] != 1 {
		t.Errorf("phases: %v, %v", stats.Phases, err)
	}
}

func TestOnlyWhatIsReadyCanBePaused(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	if _, err := h.m.Create(t.Context(), CreateRequest{Name: "idle", Spec: process.Spec("sleep")}); err != nil {
		t.Fatal(err)
	}
	spec := process.Spec("sleep")
	spec.Readiness = sandbox.Readiness{Exec: process.Command("exit", "1"), Timeout: time.Minute}
	ended := make(chan error, 1)
	go func() {
		_, err := h.m.Create(t.Context(), CreateRequest{Name: "slow", Spec: spec, Start: true})
		ended <- err
	}()
	h.awaitExists("slow")
	h.await("slow", "starting", func(s *Sandbox) bool { return s.Generation == 1 })
	for name, want := range map[string]error{"idle": sandbox.ErrState, "slow": sandbox.ErrState, "nobody": sandbox.ErrNotFound} {
		if _, err := h.m.Pause(t.Context(), name); !errors.Is(err, want) {
			t.Errorf("pause %s: %v, want %v", name, err, want)
		}
		if _, err := h.m.Resume(t.Context(), name); !errors.Is(err, want) {
			t.Errorf("resume %s: %v, want %v", name, err, want)
		}
	}
	if _, err := h.m.Stop(t.Context(), "slow", 0); err != nil {
		t.Error(err)
	}
	<-ended
}

// plain is a driver that can do nothing beyond the basics.
type plain struct{ sandbox.Driver }

func TestAbilitiesThatADriverLacksAreRefusedByItsName(t *testing.T) {
	t.Parallel()
	h := newHost(t, func(c *Config) {
		c.Drivers = map[string]sandbox.Driver{process.Name: plain{process.New(process.Config{Root: t.TempDir(), Owner: "plain"})}}
	})
	h.create("web", process.Spec("sleep"))
	_, _, console := h.m.Console(t.Context(), "web")
	_, _, refusals := h.m.Refusals(t.Context(), "web")
	for what, err := range map[string]error{
		"pause":    second(h.m.Pause(t.Context(), "web")),
		"resume":   second(h.m.Resume(t.Context(), "web")),
		"console":  console,
		"refusals": refusals,
		"egress":   second(h.m.Update(t.Context(), UpdateRequest{Name: "web", Egress: &sandbox.Egress{Mode: sandbox.EgressDeny}})),
	} {
		if !errors.Is(err, sandbox.ErrUnsupported) || !strings.Contains(err.Error(), process.Name) {
			t.Errorf("%s: %v, want UNSUPPORTED that names the driver", what, err)
		}
	}
}

func TestWhatNeedsTheGuestResumesIt(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("web", process.Spec("sleep"))
	// Draining refuses boots, and this is none.
	if _, err := h.m.Drain(t.Context(), false, 0); err != nil {
		t.Fatal(err)
	}
	greet := func(visit *Visit, err error) error {
		if err != nil {
			return err
		}
		defer visit.Leave()
		_, err = visit.Guest.Hello(t.Context())
		return err
	}
	for what, call := range map[string]func() error{
		"ensure":  func() error { return second(h.m.Ensure(t.Context(), "web", nil)) },
		"start":   func() error { return second(h.m.Start(t.Context(), "web")) },
		"visit":   func() error { return greet(h.m.Visit(t.Context(), "web")) },
		"secrets": func() error { return second(h.m.PushSecrets(t.Context(), "web", Selector{}, true)) },
		"connect": func() error {
			if _, _, err := h.m.Connect(t.Context(), "web", 9, true); err != nil && !errors.Is(err, sandbox.ErrRefused) {
				return err
			}
			return nil
		},
	} {
		h.pause("web")
		if err := call(); err != nil || h.halted("web") {
			t.Errorf("%s: %v, halted: %v", what, err, h.halted("web"))
		}
		if s := h.get("web"); s.Phase != PhaseReady || s.Generation != 1 {
			t.Errorf("%s: %+v", what, s)
		}
	}
}

func TestPausedCanBeEnded(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("web", process.Spec("ready-after", "0s", filepath.Join(t.TempDir(), "ready")))
	h.awaitOutput("web") // by then it handles SIGTERM
	h.pause("web")
	if s, err := h.m.Restart(t.Context(), "web", time.Minute, Request{}); err != nil || s.Phase != PhaseReady || s.Generation != 2 || s.Exit != nil {
		t.Errorf("restarted: %+v, %v", s, err)
	}
	h.pause("web")
	if s, err := h.m.Stop(t.Context(), "web", 0); err != nil || s.Phase != PhaseStopped {
		t.Errorf("stopped: %+v, %v", s, err)
	}
	if s, err := h.m.Start(t.Context(), "web"); err != nil || s.Phase != PhaseReady || s.Generation != 3 || h.halted("web") {
		t.Errorf("started: %+v, %v", s, err)
	}
	h.pause("web")
	if err := h.m.Delete(t.Context(), "web", time.Minute, false, Request{}); err != nil {
		t.Error(err)
	}
}

func TestLifeThatEndsWhilePaused(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("job", process.Spec("sleep"))
	h.pause("job")
	if err := h.driver().Stop(t.Context(), h.m.ref("job"), 0); err != nil {
		t.Fatal(err)
	}
	if s := h.await("job", "failed", inPhase(PhaseFailed)); s.Exit == nil || s.Exit.Code != 137 {
		t.Errorf("%+v", s)
	}
	if s, err := h.m.Start(t.Context(), "job"); err != nil || s.Phase != PhaseReady || s.Generation != 2 {
		t.Errorf("started: %+v, %v", s, err)
	}
	h.restart()
	if s := h.get("job"); s.Phase != PhaseReady {
		t.Errorf("found: %+v", s)
	}
}

func TestPausedIsFoundPaused(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("web", process.Spec("sleep"))
	h.pause("web")
	h.restart()
	if s := h.get("web"); s.Phase != PhasePaused || s.Reason != "PAUSED" || s.Generation != 1 || !h.halted("web") {
		t.Errorf("found: %+v", s)
	}
	if s, err := h.m.Ensure(t.Context(), "web", nil); err != nil || s.Phase != PhaseReady || s.Generation != 1 || h.halted("web") {
		t.Errorf("resumed: %+v, %v", s, err)
	}
}

// TestPauseIsFinishedByTheNextStart has the record say what it does when the
// agent is killed between an intent and its action.
func TestPauseIsFinishedByTheNextStart(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("web", process.Spec("sleep"))
	h.stop()
	h.editRecord("web", func(record map[string]any) { record["paused"] = true })
	h.start()
	if s := h.get("web"); s.Phase != PhasePaused || s.Generation != 1 || !h.halted("web") {
		t.Errorf("killed while pausing it: %+v, halted: %v", s, h.halted("web"))
	}
	h.stop()
	h.editRecord("web", func(record map[string]any) { delete(record, "paused") })
	h.start()
	if s := h.await("web", "ready", inPhase(PhaseReady)); s.Generation != 1 || h.halted("web") {
		t.Errorf("killed while resuming it: %+v, halted: %v", s, h.halted("web"))
	}
}

func TestPausedIsNotUnreachable(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("web", process.Spec("sleep"))
	h.pause("web")
	for began := time.Now(); time.Since(began) < unreachableAfter+500*time.Millisecond; time.Sleep(50 * time.Millisecond) {
		if s := h.get("web"); s.Phase != PhasePaused || s.Reason != "PAUSED" {
			t.Fatalf("after %s: %+v", time.Since(began), s)
		}
	}
	if _, err := h.m.Resume(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	h.await("web", "in touch", func(s *Sandbox) bool { return s.Reason == "" && s.GuestdVersion != "" })
}

func TestIdleTimeGoesOnWhilePaused(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := process.Spec("sleep")
	spec.Idle = sandbox.IdlePolicy{Timeout: time.Hour}
	h.create("web", spec)
	used := h.get("web").LastActivityAt
	if s := h.pause("web"); !s.LastActivityAt.Equal(used) {
		t.Error("pausing it counts as activity")
	}
	h.m.stopIdle(used.Add(59 * time.Minute))
	h.m.stopIdle(used.Add(61 * time.Minute))
	if s := h.await("web", "stopped", inPhase(PhaseStopped)); s.Reason != "IDLE" {
		t.Errorf("%+v", s)
	}
}

// troubled is a driver whose pauses and resumes may fail.
type troubled struct {
	*process.Driver
	pauses, resumes atomic.Pointer[error]
	resumed         atomic.Int32
}

func (d *troubled) Pause(ctx context.Context, ref sandbox.Ref) error {
	if err := d.pauses.Load(); err != nil {
		return *err
	}
	return d.Driver.Pause(ctx, ref)
}

func (d *troubled) Resume(ctx context.Context, ref sandbox.Ref) error {
	d.resumed.Add(1)
	if err := d.resumes.Load(); err != nil {
		return *err
	}
	return d.Driver.Resume(ctx, ref)
}

func newTroubled(t *testing.T) (*host, *troubled) {
	t.Helper()
	d := &troubled{Driver: process.New(process.Config{Root: t.TempDir(), Owner: "troubled"})}
	return newHost(t, func(c *Config) { c.Drivers = map[string]sandbox.Driver{process.Name: d} }), d
}

func TestPauseThatFailsLeavesItReady(t *testing.T) {
	t.Parallel()
	h, d := newTroubled(t)
	h.create("web", process.Spec("sleep"))
	trouble := error(&sandbox.UnavailableError{Err: errors.New("no")})
	d.pauses.Store(&trouble)
	if _, err := h.m.Pause(t.Context(), "web"); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("pause: %v", err)
	}
	if s := h.get("web"); s.Phase != PhaseReady || s.Reason != "" {
		t.Errorf("after it: %+v", s)
	}
	h.restart() // the record has taken it back
	if s := h.get("web"); s.Phase != PhaseReady {
		t.Errorf("found: %+v", s)
	}
	d.pauses.Store(nil)
	if _, err := h.m.Pause(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	d.resumes.Store(&trouble)
	if _, err := h.m.Ensure(t.Context(), "web", nil); !errors.Is(err, sandbox.ErrUnavailable) {
		t.Errorf("resume: %v", err)
	}
	if s := h.get("web"); s.Phase != PhasePaused || s.Reason != "DRIVER_UNAVAILABLE" || s.Message == "" {
		t.Errorf("after it: %+v", s)
	}
	d.resumes.Store(nil)
	if s, err := h.m.Ensure(t.Context(), "web", nil); err != nil || s.Phase != PhaseReady || s.Message != "" {
		t.Errorf("resumed: %+v, %v", s, err)
	}
}

func TestConcurrentEnsuresShareOneResume(t *testing.T) {
	t.Parallel()
	h, d := newTroubled(t)
	h.create("web", process.Spec("sleep"))
	if _, err := h.m.Pause(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	var callers sync.WaitGroup
	for range 50 {
		callers.Go(func() {
			if s, err := h.m.Ensure(t.Context(), "web", nil); err != nil || s.Phase != PhaseReady || s.Generation != 1 {
				t.Errorf("Ensure: %+v, %v", s, err)
			}
		})
	}
	callers.Wait()
	if n := d.resumed.Load(); n != 1 {
		t.Errorf("it was resumed %d times", n)
	}
}

func TestExecGoesOnAfterAPause(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("web", process.Spec("sleep"))
	visit, err := h.m.Visit(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	defer visit.Leave()
	exec, err := visit.Guest.Exec(t.Context(), guest.Command{Args: []string{"cat"}})
	if err != nil {
		t.Fatal(err)
	}
	defer exec.Close()
	h.pause("web")
	if err := exec.Input([]byte("during")); err != nil {
		t.Fatal(err)
	}
	if _, err := h.m.Resume(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	if output, err := exec.Receive(); err != nil || !slices.Equal(output.Data, []byte("during")) {
		t.Errorf("it printed %q, %v", output.Data, err)
	}
}

func TestConsoleCountsAsActivity(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("web", process.Spec("sleep"))
	conn, generation, err := h.m.Console(t.Context(), "web")
	if err != nil || generation != 1 {
		t.Fatalf("generation %d, %v", generation, err)
	}
	e, err := h.m.find("web")
	if err != nil {
		t.Fatal(err)
	}
	if e.holds.Load() != 1 {
		t.Error("an open console does not keep it from being idle")
	}
	h.pause("web") // and is no reason to wake it
	if again, _, err := h.m.Console(t.Context(), "web"); err != nil || again.Close() != nil || !h.halted("web") {
		t.Errorf("console of one that is paused: %v, halted: %v", err, h.halted("web"))
	}
	if err := conn.Close(); err != nil || e.holds.Load() != 0 {
		t.Errorf("closed: %v, held %d times", err, e.holds.Load())
	}
	if _, err := h.m.Stop(t.Context(), "web", 0); err != nil {
		t.Fatal(err)
	}
	if _, _, err := h.m.Console(t.Context(), "web"); !errors.Is(err, sandbox.ErrState) {
		t.Errorf("console of one that is stopped: %v", err)
	}
}
