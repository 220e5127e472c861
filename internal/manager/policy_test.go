package manager

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

func TestFiftyStartsAtOnceAllSucceed(t *testing.T) {
	t.Parallel()
	h := newHost(t, func(c *Config) { c.MaxConcurrentBoots = 4 })
	var most int
	var mu sync.Mutex
	h.onStep(func(step string) {
		if step == "boot:launch" {
			mu.Lock()
			most = max(most, len(h.m.slots.taken))
			mu.Unlock()
		}
	})
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

func TestReadiness(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	flag := filepath.Join(t.TempDir(), "up")
	spec := process.Spec("ready-after", "200ms", flag)
	spec.Readiness = sandbox.Readiness{Exec: process.Command("test-file", flag), Interval: 20 * time.Millisecond}
	s := h.create("late", spec)
	if _, err := os.Stat(flag); err != nil || s.Phase != PhaseReady {
		t.Errorf("ready before it was: %v, %s", err, s.Phase)
	}

	spec = process.Spec("sleep")
	spec.Readiness = sandbox.Readiness{Exec: process.Command("exit", "3"), Timeout: 2 * time.Second}
	_, err := h.m.Create(t.Context(), CreateRequest{Name: "never", Spec: spec, Start: true})
	if !errors.Is(err, sandbox.ErrNotReady) || !strings.Contains(err.Error(), "status 3") {
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
	spec.Readiness = sandbox.Readiness{Exec: process.Command("exit", "1"), Timeout: time.Minute}
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
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	taken := other.Addr().(*net.TCPAddr).AddrPort().Port()
	for field, edit := range map[string]func(*sandbox.Spec){
		"spec.driver":                func(s *sandbox.Spec) { s.Driver = "docker" },
		"spec.image":                 func(s *sandbox.Spec) { s.Image = "absent" },
		"spec.machine_class":         func(s *sandbox.Spec) { s.MachineClass = "huge" },
		"spec.ports[1].guest_port":   func(s *sandbox.Spec) { s.Ports = []sandbox.Port{{GuestPort: 80}, {GuestPort: 80}} },
		"spec.ports[0].host_port":    func(s *sandbox.Spec) { s.Ports = []sandbox.Port{{GuestPort: 80, HostPort: taken}} },
		"spec.secrets":               func(s *sandbox.Spec) { s.Secrets = []sandbox.SecretRef{{Name: "K", Source: "file:/x"}} },
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
			for _, dry := range []bool{field != "spec.ports[0].host_port", false} {
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
