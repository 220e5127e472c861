package manager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

func TestLifeOfASandbox(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	s := h.create("web", process.Spec("sleep"))
	if s.Phase != PhaseReady || s.Generation != 1 || s.Desired != DesiredRunning || s.UID == "" || s.ReadyAt.IsZero() {
		t.Errorf("created: %+v", s)
	}
	s, err := h.m.Stop(t.Context(), "web", time.Second)
	if err != nil || s.Phase != PhaseStopped || s.Desired != DesiredStopped || s.Exit == nil {
		t.Errorf("stopped: %+v, %v", s, err)
	}
	if s, err = h.m.Stop(t.Context(), "web", time.Second); err != nil || s.Phase != PhaseStopped {
		t.Errorf("stopped again: %+v, %v", s, err)
	}
	if s, err = h.m.Start(t.Context(), "web"); err != nil || s.Generation != 2 || s.Phase != PhaseReady {
		t.Errorf("started: %+v, %v", s, err)
	}
	if s, err = h.m.Restart(t.Context(), "web", time.Second, Request{}); err != nil || s.Generation != 3 || s.Phase != PhaseReady {
		t.Errorf("restarted: %+v, %v", s, err)
	}
	if err := h.m.Delete(t.Context(), "web", time.Second, false, Request{}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.m.Sandbox(t.Context(), "web"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("deleted: %v", err)
	}
	if err := h.m.Delete(t.Context(), "web", 0, false, Request{}); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("deleted again: %v", err)
	}
	if err := h.m.Delete(t.Context(), "web", 0, true, Request{}); err != nil {
		t.Errorf("deleted again, allowed to miss: %v", err)
	}
	again := h.create("web", process.Spec("sleep"))
	if again.UID == s.UID || again.Generation != 1 {
		t.Errorf("made anew: %+v", again)
	}
}

func TestSandboxSurvivesTheAgent(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	before := h.create("web", process.Spec("sleep"))
	h.restart()
	after := h.get("web")
	if after.Phase != PhaseReady || after.Generation != before.Generation || after.UID != before.UID || !after.StartedAt.Equal(before.StartedAt) &&
		after.StartedAt.Sub(before.StartedAt).Abs() > time.Second {
		t.Errorf("before %+v\nafter  %+v", before, after)
	}
	if s, err := h.m.Ensure(t.Context(), "web", nil); err != nil || s.Generation != before.Generation {
		t.Errorf("Ensure: %+v, %v", s, err)
	}
}

func TestWhatEndedMeanwhileIsSeenToHaveEnded(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("job", process.Spec("sleep"))
	h.stop()
	if err := h.driver().Stop(t.Context(), sandbox.Ref{ID: "job", Dir: filepath.Join(h.dir, "sandboxes", "job")}, 0); err != nil {
		t.Fatal(err)
	}
	h.start()
	s := h.await("job", "failed", inPhase(PhaseFailed))
	if s.Exit == nil || s.Exit.Code != 137 || s.Desired != DesiredStopped {
		t.Errorf("%+v, exit %+v", s, s.Exit)
	}
	h.restart()
	if s := h.get("job"); s.Phase != PhaseFailed || s.Exit == nil || s.Exit.Code != 137 || s.Message == "" {
		t.Errorf("after another restart: %+v, exit %+v", s, s.Exit)
	}
}

func TestConcurrentEnsuresShareOneBoot(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	if _, err := h.m.Create(t.Context(), CreateRequest{Name: "web", Spec: process.Spec("sleep")}); err != nil {
		t.Fatal(err)
	}
	var callers sync.WaitGroup
	for i := range 100 {
		callers.Go(func() {
			ctx := t.Context()
			if i%3 == 0 { // some leave at once; the boot must not mind
				short, cancel := context.WithTimeout(ctx, time.Millisecond)
				defer cancel()
				_, _ = h.m.Ensure(short, "web", nil)
				return
			}
			if s, err := h.m.Ensure(ctx, "web", nil); err != nil || s.Generation != 1 || s.Phase != PhaseReady {
				t.Errorf("Ensure: %+v, %v", s, err)
			}
		})
	}
	callers.Wait()
}

func TestEnsureCreates(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	if _, err := h.m.Ensure(t.Context(), "web", nil); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("without a spec: %v", err)
	}
	var callers sync.WaitGroup
	for range 20 {
		callers.Go(func() {
			s, err := h.m.Ensure(t.Context(), "web", &CreateRequest{Spec: process.Spec("sleep")})
			if err != nil || s.Phase != PhaseReady || s.Generation != 1 {
				t.Errorf("Ensure: %+v, %v", s, err)
			}
		})
	}
	callers.Wait()
}

func TestStopEndsABoot(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := process.Spec("sleep")
	spec.Readiness = sandbox.Readiness{Exec: process.Command("exit", "1"), Timeout: time.Minute}
	started := make(chan error, 1)
	go func() {
		_, err := h.m.Create(t.Context(), CreateRequest{Name: "web", Spec: spec, Start: true})
		started <- err
	}()
	h.awaitExists("web")
	h.await("web", "started", func(s *Sandbox) bool { return s.Generation == 1 })
	began := time.Now()
	if s, err := h.m.Stop(t.Context(), "web", time.Second); err != nil || s.Phase != PhaseStopped {
		t.Errorf("Stop: %+v, %v", s, err)
	}
	if err := <-started; !errors.Is(err, sandbox.ErrSuperseded) {
		t.Errorf("the boot: %v; want ErrSuperseded", err)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("the stop waited for the boot: %s", took)
	}
}

func TestOnceAnswersRetriesTheSame(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	ran := 0
	run := func(context.Context) ([]byte, error) { ran++; return fmt.Appendf(nil, "answer %d", ran), nil }
	req := Request{ID: "id", Fingerprint: "f"}
	for range 3 {
		if body, err := h.m.Once(t.Context(), req, run); err != nil || string(body) != "answer 1" {
			t.Errorf("%q, %v", body, err)
		}
		h.restart()
	}
	if _, err := h.m.Once(t.Context(), Request{ID: "id", Fingerprint: "g"}, run); !errors.Is(err, sandbox.ErrRequestReused) {
		t.Errorf("another request under the id: %v", err)
	}
	fail := func(context.Context) ([]byte, error) { return nil, sandbox.ErrExhausted }
	if _, err := h.m.Once(t.Context(), Request{ID: "id2", Fingerprint: "f"}, fail); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("a failure: %v", err)
	}
	if body, err := h.m.Once(t.Context(), Request{ID: "id2", Fingerprint: "f"}, run); err != nil || string(body) != "answer 2" {
		t.Errorf("after a failure: %q, %v", body, err)
	}
}

func TestOnceJoinsAndOutlivesItsCaller(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	begun, release := make(chan struct{}), make(chan struct{})
	req := Request{ID: "id", Fingerprint: "f"}
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() {
		_, err := h.m.Once(ctx, req, func(ctx context.Context) ([]byte, error) {
			close(begun)
			<-release
			return []byte("done"), ctx.Err()
		})
		left <- err
	}()
	<-begun
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("who left got %v", err)
	}
	joined := make(chan string, 1)
	go func() {
		body, err := h.m.Once(t.Context(), req, func(context.Context) ([]byte, error) { return []byte("twice"), nil })
		joined <- fmt.Sprint(string(body), err)
	}()
	close(release)
	if got := <-joined; got != "done<nil>" {
		t.Errorf("who joined got %s", got)
	}
}

func TestOrphansAreRemovedAndQuarantinedOnesKept(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("kept", process.Spec("sleep"))
	h.create("orphan", process.Spec("sleep"))
	h.stop()
	if err := os.Remove(filepath.Join(h.dir, "records", "orphan.json")); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(h.dir, "records", "kept.json")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, whole[:len(whole)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	h.start()
	if _, err := h.m.Sandbox(t.Context(), "kept"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("a sandbox whose record is unreadable: %v", err)
	}
	info, err := h.m.Info(t.Context())
	if err != nil || len(info.Quarantined) != 1 || info.Quarantined[0].Name != "kept" {
		t.Errorf("quarantined: %+v, %v", info.Quarantined, err)
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		names, err := h.driver().List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if slices.Equal(names, []string{"kept"}) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("on the host: %v; want kept alone", names)
		}
	}
	// A person mends the record and puts it back.
	h.stop()
	if err := os.Remove(info.Quarantined[0].Path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	h.start()
	if s := h.get("kept"); s.Phase != PhaseReady || s.Generation != 1 {
		t.Errorf("put back: %+v", s)
	}
}

func TestThousandWaitsCostLittle(t *testing.T) {
	h := newHost(t)
	h.create("web", process.Spec("sleep"))
	before := runtime.NumGoroutine()
	for range 1000 {
		if _, err := h.m.Ensure(t.Context(), "web", nil); err != nil {
			t.Fatal(err)
		}
	}
	if after := runtime.NumGoroutine(); after > before+20 {
		t.Errorf("%d goroutines became %d", before, after)
	}
}

func TestStopsOvertakeLongerOnes(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	for _, c := range []struct {
		name     string
		overtake func() error
	}{
		{"by-stop", func() error { _, err := h.m.Stop(t.Context(), "by-stop", 0); return err }},
		{"by-delete", func() error { return h.m.Delete(t.Context(), "by-delete", 10*time.Millisecond, false, Request{}) }},
		{"by-restart", func() error { _, err := h.m.Restart(t.Context(), "by-restart", 0, Request{}); return err }},
	} {
		t.Run(c.name, func(t *testing.T) {
			h.create(c.name, process.Spec("ignore-term"))
			h.awaitOutput(c.name) // by then it ignores
			first := make(chan error, 1)
			go func() { _, err := h.m.Stop(t.Context(), c.name, 5*time.Minute); first <- err }()
			h.await(c.name, "stopping", inPhase(PhaseStopping))
			began := time.Now()
			if err := c.overtake(); err != nil {
				t.Error(err)
			}
			if err := <-first; err != nil {
				t.Errorf("who was overtaken: %v", err)
			}
			if took := time.Since(began); took > time.Minute {
				t.Errorf("it took %s", took)
			}
		})
	}
}

func TestFailedWriteLosesNothing(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("a", process.Spec("sleep"))
	// Stands in the way of the new record, as a full disk does.
	block := func(name string) (unblock func()) {
		path := filepath.Join(h.dir, "records", name+".json.tmp~")
		if err := os.MkdirAll(filepath.Join(path, "x"), 0o700); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
		}
	}
	free := block("a")
	for what, err := range map[string]error{
		"stop":    second(h.m.Stop(t.Context(), "a", 0)),
		"restart": second(h.m.Restart(t.Context(), "a", 0, Request{})),
		"delete":  h.m.Delete(t.Context(), "a", 0, false, Request{}),
	} {
		if !errors.Is(err, sandbox.ErrExhausted) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if s := h.get("a"); s.Phase != PhaseReady || s.Generation != 1 || s.Desired != DesiredRunning {
		t.Errorf("afterwards: %+v", s)
	}
	free()
	free = block("b")
	_, err := h.m.Create(t.Context(), CreateRequest{Name: "b", Spec: process.Spec("sleep"), Start: true})
	if !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("create: %v", err)
	}
	free()
	if _, err := h.m.Sandbox(t.Context(), "b"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("after a failed create: %v", err)
	}
	h.create("b", process.Spec("sleep"))
	h.restart()
	if s := h.get("a"); s.Phase != PhaseReady || s.Generation != 1 {
		t.Errorf("after a restart: %+v", s)
	}
}

func TestDeleteAfterAnAbandonedCreateLeavesNothing(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	for i := range 100 {
		ctx, cancel := context.WithCancel(t.Context())
		created := make(chan struct{})
		go func() {
			defer close(created)
			_, _ = h.m.Create(ctx, CreateRequest{Name: "web", Spec: process.Spec("sleep")})
		}()
		time.Sleep(time.Duration(i) * 20 * time.Microsecond) // wherever it is by then
		cancel()
		if err := h.m.Delete(t.Context(), "web", 0, true, Request{}); err != nil {
			t.Fatal(err)
		}
		<-created
		if _, err := h.m.Sandbox(t.Context(), "web"); !errors.Is(err, sandbox.ErrNotFound) {
			t.Fatalf("after %d: %v; want nothing", i, err)
		}
	}
}
