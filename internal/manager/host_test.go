package manager

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/choiros/agent/internal/forward"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
	"github.com/choiros/agent/internal/store"
)

func TestMain(m *testing.M) {
	process.Main()
	serviceMain()
	os.Exit(m.Run())
}

var hosts atomic.Uint32

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
	step   atomic.Pointer[func(string)]
}

// onStep has f called at each step of an operation from now on; nil: nobody.
func (h *host) onStep(f func(step string)) { h.step.Store(&f) }

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
	// Ports of its own: another test's agent may take a number while this one
	// is restarted.
	first := uint16(14000 + 10*hosts.Add(1))
	h.cfg.Ports = forward.Config{First: first, Last: first + 9}
	h.cfg.OnStep = func(step string) {
		if f := h.step.Load(); f != nil && *f != nil {
			(*f)(step)
		}
	}
	for _, f := range edit {
		f(&h.cfg)
	}
	h.start()
	t.Cleanup(func() {
		ctx := context.Background()
		h.onStep(nil)
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

// awaitOutput waits until a workload has printed something.
func (h *host) awaitOutput(name string) {
	h.t.Helper()
	enough := errors.New("enough")
	err := h.m.Logs(h.t.Context(), name, sandbox.LogOptions{Follow: true, Tail: -1, Stdout: true}, func(sandbox.LogEntry) error { return enough })
	if !errors.Is(err, enough) {
		h.t.Fatalf("logs of %s: %v", name, err)
	}
}

func second[T any](_ T, err error) error { return err }
