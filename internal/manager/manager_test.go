package manager

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
	"github.com/choiros/agent/internal/store"
)

func TestMain(m *testing.M) {
	process.Main()
	os.Exit(m.Run())
}

// host is a host whose agent can be restarted.
type host struct {
	t      *testing.T
	dir    string
	root   string
	cfg    Config
	m      *Manager
	store  *store.Store
	cancel context.CancelFunc
	ended  chan struct{}
}

// newHost starts a manager on real child processes; edit may change its
// configuration. At the end of the test everything is deleted, and nothing may
// be left.
func newHost(t *testing.T, edit ...func(*Config)) *host {
	t.Helper()
	h := &host{t: t, dir: filepath.Join(t.TempDir(), "state"), root: filepath.Join(t.TempDir(), "os")}
	h.cfg = Config{
		Memory: func() (uint64, uint64, error) { return 16384, 16384, nil },
		Log:    slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	for _, f := range edit {
		f(&h.cfg)
	}
	h.start()
	t.Cleanup(func() {
		ctx := context.Background()
		h.m.cfg.OnStep = nil
		all, _, err := h.m.List(ctx, Selector{}, "", 10000)
		for _, s := range all {
			err = errors.Join(err, h.m.Delete(ctx, s.Name, 0, true, Request{}))
		}
		if err != nil {
			t.Errorf("clean up: %v", err)
		}
		left, err := h.driver().List(ctx)
		if err != nil || len(left) > 0 {
			t.Errorf("left on the host: %v, %v", left, err)
		}
		h.stop()
		for _, pattern := range []string{"records/*", "sandboxes/*"} {
			if left, _ := filepath.Glob(filepath.Join(h.dir, pattern)); len(left) > 0 {
				t.Errorf("left in the store: %v", left)
			}
		}
	})
	return h
}

func (h *host) driver() *process.Driver {
	return process.New(process.Config{Root: h.root, Owner: h.store.Owner(), Limits: sandbox.Limits{CPU: true, Memory: true, Pids: true}})
}

func (h *host) start() {
	h.t.Helper()
	var err error
	if h.store, err = store.Open(h.dir); err != nil {
		h.t.Fatal(err)
	}
	cfg := h.cfg
	cfg.Store = h.store
	if cfg.Drivers == nil {
		cfg.Drivers = map[string]sandbox.Driver{process.Name: h.driver()}
	}
	if h.m, err = Open(cfg); err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel, h.ended = cancel, make(chan struct{})
	go func() {
		defer close(h.ended)
		if err := h.m.Run(ctx); err != nil {
			h.t.Error(err)
		}
	}()
}

func (h *host) stop() {
	h.cancel()
	<-h.ended
	if err := h.store.Close(); err != nil {
		h.t.Error(err)
	}
}

func (h *host) restart() { h.stop(); h.start() }

// create makes a sandbox and boots it.
func (h *host) create(name string, spec sandbox.Spec) *Sandbox {
	h.t.Helper()
	s, err := h.m.Create(h.t.Context(), CreateRequest{Name: name, Spec: spec, Start: true})
	if err != nil {
		h.t.Fatalf("create %s: %v", name, err)
	}
	return s
}

func (h *host) get(name string) *Sandbox {
	h.t.Helper()
	s, err := h.m.Sandbox(h.t.Context(), name)
	if err != nil {
		h.t.Fatal(err)
	}
	return s
}

// await waits until a sandbox is as it should be.
func (h *host) await(name, what string, holds func(*Sandbox) bool) *Sandbox {
	h.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		s := h.get(name)
		if holds(s) {
			return s
		}
		select {
		case <-deadline:
			h.t.Fatalf("%s: never %s; it is %s %s: %s", name, what, s.Phase, s.Reason, s.Message)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func inPhase(phase Phase) func(*Sandbox) bool {
	return func(s *Sandbox) bool { return s.Phase == phase }
}

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

func TestFiftyStartsAtOnceAllSucceed(t *testing.T) {
	t.Parallel()
	h := newHost(t, func(c *Config) { c.MaxConcurrentBoots = 4 })
	var most int
	var mu sync.Mutex
	h.m.cfg.OnStep = func(step string) {
		if step == "boot:launch" {
			mu.Lock()
			most = max(most, len(h.m.slots.taken))
			mu.Unlock()
		}
	}
	var callers sync.WaitGroup
	for i := range 50 {
		callers.Go(func() {
			_, err := h.m.Create(t.Context(), CreateRequest{Name: fmt.Sprint("s", i), Spec: process.Spec("sleep"), Start: true})
			if err != nil {
				t.Error(err)
			}
		})
	}
	callers.Wait()
	if most > 4 {
		t.Errorf("%d boots at once; at most 4 are allowed", most)
	}
}

func TestStopEndsABoot(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := process.Spec("sleep")
	spec.Readiness = sandbox.Readiness{Exec: []string{process.Program, "exit", "1"}, Timeout: time.Minute}
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

func (h *host) awaitExists(name string) {
	h.t.Helper()
	for {
		if _, err := h.m.find(name); err == nil {
			return
		}
		select {
		case <-h.t.Context().Done():
			h.t.Fatal("never there")
		case <-time.After(time.Millisecond):
		}
	}
}

func TestReadiness(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	flag := filepath.Join(t.TempDir(), "up")
	spec := process.Spec("ready-after", "200ms", flag)
	spec.Readiness = sandbox.Readiness{Exec: []string{process.Program, "test-file", flag}, Interval: 20 * time.Millisecond}
	s := h.create("late", spec)
	if _, err := os.Stat(flag); err != nil || s.Phase != PhaseReady {
		t.Errorf("ready before it was: %v, %s", err, s.Phase)
	}

	spec = process.Spec("sleep")
	spec.Readiness = sandbox.Readiness{Exec: []string{process.Program, "exit", "3"}, Timeout: 300 * time.Millisecond}
	_, err := h.m.Create(t.Context(), CreateRequest{Name: "never", Spec: spec, Start: true})
	if !errors.Is(err, sandbox.ErrNotReady) || !strings.Contains(err.Error(), "status is 3") {
		t.Errorf("never ready: %v", err)
	}
	if s := h.get("never"); s.Phase != PhaseFailed || s.Reason != "NOT_READY" || s.Desired != DesiredStopped {
		t.Errorf("never ready: %+v", s)
	}
	obs, err := h.driver().Inspect(t.Context(), h.m.ref("never"))
	if err != nil || obs.State != sandbox.StateExited {
		t.Errorf("never ready, and left %s, %v", obs.State, err)
	}

	spec = process.Spec("exit", "7")
	spec.Readiness = sandbox.Readiness{Exec: []string{process.Program, "exit", "1"}, Timeout: time.Minute}
	if _, err = h.m.Create(t.Context(), CreateRequest{Name: "gone", Spec: spec, Start: true}); !errors.Is(err, sandbox.ErrEnded) {
		t.Errorf("ended before ready: %v", err)
	}
	if s := h.get("gone"); s.Phase != PhaseFailed || s.Exit == nil || s.Exit.Code != 7 {
		t.Errorf("ended before ready: %+v, exit %+v", s, s.Exit)
	}
}

func TestRestartPolicy(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	fast := func(mode sandbox.RestartMode, retries uint32) sandbox.RestartPolicy {
		return sandbox.RestartPolicy{Mode: mode, MaxRetries: retries, InitialBackoff: 10 * time.Millisecond, MaxBackoff: 20 * time.Millisecond}
	}
	for _, c := range []struct {
		name       string
		code       string
		policy     sandbox.RestartPolicy
		phase      Phase
		reason     string
		generation uint64
	}{
		{"never-ok", "0", sandbox.RestartPolicy{}, PhaseStopped, "EXITED", 1},
		{"never-bad", "3", sandbox.RestartPolicy{}, PhaseFailed, "EXITED", 1},
		{"failure-ok", "0", fast(sandbox.RestartOnFailure, 2), PhaseStopped, "EXITED", 1},
		{"failure-bad", "3", fast(sandbox.RestartOnFailure, 2), PhaseFailed, "RETRIES_EXHAUSTED", 3},
		{"always-ok", "0", fast(sandbox.RestartAlways, 3), PhaseStopped, "RETRIES_EXHAUSTED", 4},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := process.Spec("exit", c.code)
			spec.Restart = c.policy
			h.create(c.name, spec)
			s := h.await(c.name, "given up", func(s *Sandbox) bool { return s.Desired == DesiredStopped })
			if s.Phase != c.phase || s.Reason != c.reason || s.Generation != c.generation {
				t.Errorf("%s %s, generation %d; want %s %s, %d", s.Phase, s.Reason, s.Generation, c.phase, c.reason, c.generation)
			}
		})
	}
}

func TestStopEndsABackoff(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := process.Spec("exit", "1")
	spec.Restart = sandbox.RestartPolicy{Mode: sandbox.RestartAlways, InitialBackoff: time.Hour, MaxBackoff: time.Hour}
	h.create("web", spec)
	s := h.await("web", "in backoff", inPhase(PhaseBackoff))
	if time.Until(s.NextRestartAt) < 50*time.Minute || s.Exit == nil {
		t.Errorf("backoff: %+v", s)
	}
	if s, err := h.m.Stop(t.Context(), "web", 0); err != nil || s.Phase != PhaseStopped {
		t.Errorf("Stop: %+v, %v", s, err)
	}
	h.m.mu.RLock()
	e := h.m.entries["web"]
	h.m.mu.RUnlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.alarm != nil {
		t.Error("the timer still runs")
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

func TestCreateIsRefusedBeforeAnythingIsMade(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	mount := func(source string) func(*sandbox.Spec) {
		return func(s *sandbox.Spec) {
			s.Mounts = []sandbox.Mount{{Kind: sandbox.MountData, Source: source, Target: "/data"}}
		}
	}
	for field, edit := range map[string]func(*sandbox.Spec){
		"spec.driver":                func(s *sandbox.Spec) { s.Driver = "docker" },
		"spec.image":                 func(s *sandbox.Spec) { s.Image = "absent" },
		"spec.machine_class":         func(s *sandbox.Spec) { s.MachineClass = "huge" },
		"spec.ports":                 func(s *sandbox.Spec) { s.Ports = []sandbox.Port{{GuestPort: 80}} },
		"spec.secrets":               func(s *sandbox.Spec) { s.Secrets = []sandbox.SecretRef{{Name: "K", Source: "file:/x"}} },
		"spec.readiness.http":        func(s *sandbox.Spec) { s.Readiness.HTTP = &sandbox.HTTPProbe{Port: 80} },
		"spec.readiness.tcp":         func(s *sandbox.Spec) { s.Readiness.TCPPort = 80 },
		"spec.idle.action":           func(s *sandbox.Spec) { s.Idle.Action = sandbox.IdleHibernate },
		"spec.machine":               func(s *sandbox.Spec) { s.Image, s.Machine = "", "nixos" },
		"spec.mounts[0].source":      mount("/does/not/exist"),
		"spec.mounts[0].source file": mount(file),
		"spec.mounts[0].source own":  mount(h.dir),
		"spec.mounts[0].source root": mount("/"),
		"spec.mounts[0].target":      func(s *sandbox.Spec) { mount("/tmp")(s); s.Mounts[0].Target = "/proc/x" },
		"spec.resources.memory_mib":  func(s *sandbox.Spec) { s.Resources.MemoryMiB = 1 },
		"spec.env":                   func(s *sandbox.Spec) { s.Env = map[string]string{"1X": ""} },
		"spec.restart.mode":          func(s *sandbox.Spec) { s.Restart.Mode = "sometimes" },
	} {
		t.Run(field, func(t *testing.T) {
			spec := process.Spec("sleep")
			edit(&spec)
			for _, dry := range []bool{true, false} {
				_, err := h.m.Create(t.Context(), CreateRequest{Name: "web", Spec: spec, Start: true, ValidateOnly: dry})
				var bad *sandbox.FieldError
				want, _, _ := strings.Cut(field, " ")
				if !errors.As(err, &bad) || bad.Field != want {
					t.Errorf("%v; want a refusal of %s", err, want)
				}
			}
		})
	}
	if left, _ := filepath.Glob(filepath.Join(h.dir, "*", "web*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestMountRoots(t *testing.T) {
	t.Parallel()
	inside, outside := t.TempDir(), t.TempDir()
	if err := os.Symlink(outside, filepath.Join(inside, "escape")); err != nil {
		t.Fatal(err)
	}
	h := newHost(t, func(c *Config) { c.MountRoots = []string{inside} })
	try := func(source string) error {
		spec := process.Spec("sleep")
		spec.Mounts = []sandbox.Mount{{Kind: sandbox.MountData, Source: source}}
		_, err := h.m.Create(t.Context(), CreateRequest{Name: "web", Spec: spec, ValidateOnly: true})
		return err
	}
	if err := try(inside); err != nil {
		t.Errorf("inside: %v", err)
	}
	for _, source := range []string{outside, filepath.Join(inside, "escape"), inside + "/../x"} {
		if err := try(source); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v; want a refusal", source, err)
		}
	}
}

func TestAdmission(t *testing.T) {
	t.Parallel()
	available := uint64(512)
	h := newHost(t, func(c *Config) {
		c.MaxRunning = 1
		c.Memory = func() (uint64, uint64, error) { return 2048, available, nil }
	})
	var retry *sandbox.RetryError
	_, err := h.m.Create(t.Context(), CreateRequest{Name: "a", Spec: process.Spec("sleep"), Start: true})
	if !errors.Is(err, sandbox.ErrExhausted) || !errors.As(err, &retry) || retry.After == 0 {
		t.Errorf("without memory: %v", err)
	}
	if _, err := h.m.Sandbox(t.Context(), "a"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("a refused create left a sandbox: %v", err)
	}
	available = 2048
	h.create("a", process.Spec("sleep"))
	if _, err = h.m.Create(t.Context(), CreateRequest{Name: "b", Spec: process.Spec("sleep")}); err != nil {
		t.Fatal(err)
	}
	if _, err = h.m.Start(t.Context(), "b"); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("beyond max_running: %v", err)
	}
	if s := h.get("b"); s.Phase != PhaseStopped || s.Generation != 0 {
		t.Errorf("a refused start left %s, generation %d", s.Phase, s.Generation)
	}
	if _, err = h.m.Stop(t.Context(), "a", 0); err != nil {
		t.Fatal(err)
	}
	if _, err = h.m.Start(t.Context(), "b"); err != nil {
		t.Errorf("once there is room: %v", err)
	}
}

func TestDrain(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("a", process.Spec("sleep"))
	h.create("b", process.Spec("sleep"))
	if n, err := h.m.Drain(t.Context(), false, 0); n != 0 || err != nil {
		t.Errorf("drain: %d, %v", n, err)
	}
	h.restart()
	_, err := h.m.Create(t.Context(), CreateRequest{Name: "c", Spec: process.Spec("sleep"), Start: true})
	if !errors.Is(err, sandbox.ErrDraining) {
		t.Errorf("create on a draining host: %v", err)
	}
	if _, err := h.m.Restart(t.Context(), "a", 0, Request{}); !errors.Is(err, sandbox.ErrDraining) || h.get("a").Phase != PhaseReady {
		t.Errorf("restart on a draining host: %v, %s", err, h.get("a").Phase)
	}
	if s, err := h.m.Ensure(t.Context(), "a", nil); err != nil || s.Phase != PhaseReady {
		t.Errorf("ensure of a running one: %v", err)
	}
	if n, err := h.m.Drain(t.Context(), true, 0); n != 2 || err != nil {
		t.Errorf("drain and stop: %d, %v", n, err)
	}
	if err := h.m.Undrain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s, err := h.m.Start(t.Context(), "a"); err != nil || s.Phase != PhaseReady {
		t.Errorf("after undrain: %v", err)
	}
}

func TestIdleStop(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := process.Spec("sleep")
	h.create("forever", spec)
	spec.Idle.Timeout = time.Minute
	h.create("web", spec)
	h.m.stopIdle(time.Now().Add(59 * time.Second))
	if s := h.get("web"); s.Phase != PhaseReady {
		t.Errorf("stopped too early: %s", s.Phase)
	}
	if _, err := h.m.Touch(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	h.m.stopIdle(time.Now().Add(61 * time.Second))
	if s := h.await("web", "stopped", inPhase(PhaseStopped)); s.Reason != "IDLE" || s.Desired != DesiredStopped {
		t.Errorf("%+v", s)
	}
	if s := h.get("forever"); s.Phase != PhaseReady {
		t.Errorf("one without an idle policy was stopped: %s", s.Phase)
	}
	if s, err := h.m.Ensure(t.Context(), "web", nil); err != nil || s.Generation != 2 {
		t.Errorf("ensure: %+v, %v", s, err)
	}
}

func TestMemoryPressureStopsTheIdlestFirst(t *testing.T) {
	t.Parallel()
	available := uint64(2000)
	h := newHost(t, func(c *Config) {
		c.MinFreeMemoryMiB = 1
		c.Memory = func() (uint64, uint64, error) { return 2000, available, nil }
	})
	spec := process.Spec("sleep")
	spec.Idle.Timeout = time.Hour
	for i := range 8 {
		name := fmt.Sprint("s", i)
		h.create(name, spec)
	}
	now := time.Now()
	h.m.mu.RLock()
	for i := range 8 {
		h.m.entries[fmt.Sprint("s", i)].touch(now.Add(-time.Duration(i) * time.Minute))
	}
	h.m.mu.RUnlock()
	h.m.stopIdle(now)
	available = 200 // 10 %
	h.m.stopIdle(now)
	for i := 3; i < 8; i++ {
		h.await(fmt.Sprint("s", i), "stopped", inPhase(PhaseStopped))
	}
	for i := range 3 {
		if s := h.get(fmt.Sprint("s", i)); s.Phase != PhaseReady {
			t.Errorf("%s is %s; at most five are stopped at once", s.Name, s.Phase)
		}
	}
}

func TestMachineClassAppliesAndIsOverridden(t *testing.T) {
	t.Parallel()
	h := newHost(t, func(c *Config) {
		c.Classes = map[string]Class{
			"small": {Resources: sandbox.Resources{CPUMillis: 500, MemoryMiB: 256, Pids: 100}},
			"other": {Driver: "vm"},
		}
	})
	spec := process.Spec("sleep")
	spec.MachineClass, spec.Resources.MemoryMiB = "small", 512
	s := h.create("web", spec)
	if want := (sandbox.Resources{CPUMillis: 500, MemoryMiB: 512, Pids: 100}); s.Resources != want {
		t.Errorf("resources %+v, want %+v", s.Resources, want)
	}
	spec.MachineClass = "other"
	if _, err := h.m.Create(t.Context(), CreateRequest{Name: "x", Spec: spec}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("a class of another driver: %v", err)
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

func TestActivityInTheLastMomentKeepsASandbox(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := process.Spec("sleep")
	spec.Idle.Timeout = time.Hour
	h.create("web", spec)
	e := h.entry("web")
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			for range 200 {
				s, err := h.m.Ensure(t.Context(), "web", nil)
				if err != nil {
					t.Errorf("Ensure: %v", err)
					return
				}
				// As if the scan had seen it idle just before the call.
				h.m.stopIfIdle(e, e.lastActivity().Add(-time.Nanosecond))
				if now := h.get("web"); now.Generation != s.Generation {
					t.Errorf("generation %d became %d", s.Generation, now.Generation)
					return
				}
			}
		})
	}
	callers.Wait()
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

// awaitOutput waits until a workload has printed something.
func (h *host) awaitOutput(name string) {
	h.t.Helper()
	enough := errors.New("enough")
	err := h.m.Logs(h.t.Context(), name, sandbox.LogOptions{Follow: true, Tail: -1, Stdout: true}, func(sandbox.LogEntry) error { return enough })
	if !errors.Is(err, enough) {
		h.t.Fatalf("logs of %s: %v", name, err)
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

func second[T any](_ T, err error) error { return err }

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
