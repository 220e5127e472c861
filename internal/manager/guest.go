package manager

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
)

// entropyBytes is how much a booting guest is given for its kernel's pool.
const entropyBytes = 32

// Pauses between two attempts to reach a guestd that is only just starting, or
// has stopped answering.
const (
	firstCall = time.Millisecond
	lastCall  = 20 * time.Millisecond
	lastLink  = 5 * time.Second
)

// guest is the way to a sandbox's guestd.
func (m *Manager) guest(drv sandbox.Driver, name string) *guest.Guest {
	return guest.New(name, func(ctx context.Context) (net.Conn, error) {
		return drv.Dial(ctx, m.ref(name), guest.Port)
	})
}

// Visit is a caller's stay with a running sandbox, which is not idle meanwhile.
type Visit struct {
	Guest *guest.Guest
	// Generation is that of the boot that runs.
	Generation uint64
	entry      *entry
	leave      func()
	calls      []net.Conn // to the guest, those that have ended too; guarded by entry.visiting
}

// Leave ends the visit.
func (v *Visit) Leave() {
	v.entry.visiting.Lock()
	delete(v.entry.visits, v)
	v.entry.visiting.Unlock()
	v.leave()
}

// called notes that a call to the guest was begun.
func (v *Visit) called(conn net.Conn) {
	v.entry.visiting.Lock()
	defer v.entry.visiting.Unlock()
	v.calls = append(v.calls, conn)
}

// calls are visits' to the guest, those that have ended too.
func (e *entry) calls() []net.Conn {
	e.visiting.Lock()
	defer e.visiting.Unlock()
	var all []net.Conn
	for v := range e.visits {
		all = append(all, v.calls...)
	}
	return all
}

// Visit returns the way to the guest of a sandbox that runs, or is becoming
// ready; one that is paused is resumed. It counts as activity until it is left.
func (m *Manager) Visit(ctx context.Context, name string) (*Visit, error) {
	s, err := m.awake(ctx, name)
	if err != nil {
		return nil, err
	}
	e, err := m.find(name)
	if err != nil {
		return nil, err
	}
	drv, err := m.driver(s.Spec.Driver)
	if err != nil {
		return nil, err
	}
	if s.Phase != PhaseReady && s.Phase != PhaseStarting {
		return nil, fmt.Errorf("sandbox %s is %s: %w", name, s.Phase, sandbox.ErrState)
	}
	v := &Visit{Generation: s.Generation, entry: e, leave: e.hold()}
	v.Guest = guest.New(name, func(ctx context.Context) (net.Conn, error) {
		conn, err := drv.Dial(ctx, m.ref(name), guest.Port)
		if err == nil {
			v.called(conn)
		}
		return conn, err
	})
	e.visiting.Lock()
	defer e.visiting.Unlock()
	e.visits[v] = struct{}{}
	return v, nil
}

// hold counts as activity until the function it returns is called.
func (e *entry) hold() (release func()) {
	e.holds.Add(1)
	e.touch(time.Now())
	var once sync.Once
	return func() {
		once.Do(func() {
			e.touch(time.Now())
			e.holds.Add(-1)
		})
	}
}

// awaitReady gives a sandbox that runs what its workload needs, and returns
// once its readiness probe succeeds, the workload has ended, or the time is up.
func (m *Manager) awaitReady(ctx context.Context, drv sandbox.Driver, e *entry, values []guest.Secret) error {
	readiness := e.rec.Spec.Readiness
	ctx, cancel := context.WithTimeoutCause(ctx, readiness.ReadyTimeout(), errProbeTimeout)
	defer cancel()
	var gone *endedError
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if obs, err := drv.Wait(ctx, m.ref(e.name)); err == nil {
			gone = &endedError{obs}
			cancel()
		}
	}()
	b := bringUp{manager: m, driver: drv, entry: e, guest: m.guest(drv, e.name), values: values, looked: time.Now()}
	err := b.run(ctx)
	early := context.Cause(ctx)
	cancel()
	<-ended
	switch {
	case err == nil:
		return nil
	case gone != nil && b.begun && !readiness.Probes():
		return nil // it ran; how it ended, the guard tells
	case gone != nil:
		return gone
	case errors.Is(early, errProbeTimeout):
		return fmt.Errorf("start %s: %w within %s: %s", e.name, sandbox.ErrNotReady, readiness.ReadyTimeout(), b.last)
	case early != nil:
		return early
	}
	return err
}

var errProbeTimeout = errors.New("readiness timeout")

// bringUp is a boot from where the sandbox runs to where it is ready.
type bringUp struct {
	manager *Manager
	driver  sandbox.Driver
	entry   *entry
	guest   *guest.Guest
	values  []guest.Secret
	// begun is set once the workload may have been started.
	begun bool
	// last is what kept it from being ready, for people.
	last string
	// progress is what the driver said last of how far it is, and looked when.
	progress string
	looked   time.Time
}

// silentGuestd is what keeps a boot from being ready whose guestd was not heard.
const silentGuestd = "its guestd does not answer"

// progressEvery is how often a driver is asked how far a boot is whose guestd
// does not answer yet.
const progressEvery = 300 * time.Millisecond

// look shows how far the boot is, where the driver can tell.
func (b *bringUp) look(ctx context.Context) {
	if time.Since(b.looked) < progressEvery {
		return
	}
	obs, err := b.manager.inspect(ctx, b.driver, b.entry)
	b.looked = time.Now()
	if err != nil || obs.State != sandbox.StateRunning || obs.Detail == b.progress {
		return
	}
	b.progress = obs.Detail
	if !b.begun && b.progress != "" {
		b.last = silentGuestd + ": " + b.progress
	}
	b.manager.see(b.entry, enter(PhaseStarting, "", obs.Detail))
}

func (b *bringUp) run(ctx context.Context) error {
	e := b.entry
	entropy := make([]byte, entropyBytes)
	_, _ = rand.Read(entropy) // never fails, see crypto/rand
	b.manager.step("boot:configure")
	back := false
	var err error
	if e.rec.Hibernated {
		if back, err = b.rejoin(ctx, entropy); err != nil {
			return err
		}
	}
	if !back {
		err = b.configure(ctx, entropy)
	}
	if errors.Is(err, sandbox.ErrNotFound) || errors.Is(err, sandbox.ErrDenied) {
		return &sandbox.FieldError{Field: "spec.command", Problem: err.Error()}
	}
	if err != nil || !e.rec.Spec.Readiness.Probes() {
		return err
	}
	b.last = "the probe gave no answer"
	b.manager.step("boot:probe")
	return b.insist(ctx, func() error {
		return b.guest.AwaitReady(ctx, e.rec.Spec.Readiness, func(note string) { b.last = note })
	})
}

// configure gives guestd what the workload needs, until it has answered.
func (b *bringUp) configure(ctx context.Context, entropy []byte) error {
	e := b.entry
	return b.insist(ctx, func() error {
		err := b.guest.Configure(ctx, guest.Configuration{
			Generation: e.rec.Generation, Hostname: e.name, Secrets: b.values, Entropy: entropy,
		})
		// It may have got it even if it did not come to answer.
		b.begun = b.begun || err == nil || errors.Is(err, sandbox.ErrGuest)
		return err
	})
}

// insist repeats a call until guestd answers.
func (b *bringUp) insist(ctx context.Context, call func() error) error {
	if b.last == "" {
		b.last = silentGuestd
	}
	for pause := firstCall; ; pause = min(2*pause, lastCall) {
		err := call()
		if said, ok := errors.AsType[*guest.Error](err); err == nil || ok && said != nil {
			return err
		}
		b.look(ctx)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
