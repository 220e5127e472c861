package manager

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/store"
)

// pauseDeadline is for halting a sandbox and for letting it go on, clockLimit
// for its guest to set its clock then.
const (
	pauseDeadline = time.Minute
	clockLimit    = 5 * time.Second
)

// paused is the reason of PhasePaused.
const paused = "PAUSED"

func (s *Sandbox) isPaused() bool { return s != nil && s.Phase == PhasePaused }

// pauser returns a sandbox's driver as one that pauses.
func (m *Manager) pauser(verb, name string, spec sandbox.Spec) (sandbox.Driver, sandbox.Pauser, error) {
	drv, err := m.driver(spec.Driver)
	if err != nil {
		return nil, nil, err
	}
	pauser, ok := drv.(sandbox.Pauser)
	if !ok {
		return nil, nil, fmt.Errorf("%s %s: driver %s cannot: %w", verb, name, spec.Driver, sandbox.ErrUnsupported)
	}
	return drv, pauser, nil
}

// Pause halts a sandbox that is ready, with all that is in its memory. It does
// not count as activity.
func (m *Manager) Pause(ctx context.Context, name string) (*Sandbox, error) {
	s, err := m.Sandbox(ctx, name)
	if err != nil {
		return nil, err
	}
	if _, _, err := m.pauser("pause", name, s.Spec); err != nil {
		return nil, err
	}
	// A boot holds the lock until it is over; it is not waited for.
	if err := mayPause(s); err != nil {
		return nil, err
	}
	e, err := m.find(name)
	if err != nil {
		return nil, err
	}
	err = m.detach(ctx, func(ctx context.Context) error {
		if err := e.lock(ctx); err != nil {
			return err
		}
		defer e.unlock()
		return m.pause(ctx, e)
	})
	if err != nil {
		return nil, err
	}
	return e.view(), nil
}

func mayPause(s *Sandbox) error {
	if s.Phase != PhaseReady && s.Phase != PhasePaused {
		return fmt.Errorf("pause %s: it is %s; only one that is ready can be paused: %w", s.Name, s.Phase, sandbox.ErrState)
	}
	return nil
}

// pause writes the intent and halts the sandbox. It needs the operation lock.
func (m *Manager) pause(ctx context.Context, e *entry) error {
	s := e.snap.Load()
	if err := mayPause(s); err != nil || s.Phase == PhasePaused {
		return err
	}
	m.step("pause:intent")
	// From here on whoever wants it waits for it to be resumed.
	if err := m.put(e, func(r *store.Record) { r.Paused, r.Pending = true, store.PendingNone },
		enter(PhasePaused, paused, "")); err != nil {
		return fmt.Errorf("pause %s: %w", e.name, err)
	}
	return m.finishPause(ctx, e)
}

// finishPause halts a sandbox that its record says is paused. If it cannot be
// halted it goes on, and the record says so again. It needs the operation lock.
func (m *Manager) finishPause(ctx context.Context, e *entry) error {
	e.unguard()
	drv, pauser, err := m.pauser("pause", e.name, e.rec.Spec)
	if err == nil {
		m.step("pause:halt")
		bounded, cancel := context.WithTimeout(ctx, pauseDeadline)
		err = deadlined(bounded, pauser.Pause(bounded, m.ref(e.name)))
		cancel()
	}
	if err == nil {
		m.step("pause:done")
		m.log.Info("paused", "sandbox", e.name, "generation", e.rec.Generation)
		m.guard(drv, e)
		return nil
	}
	if m.life.Err() != nil {
		return err // the next start of the agent finishes it
	}
	m.log.Warn("pause failed", "sandbox", e.name, "err", err)
	m.settlePause(ctx, e, err)
	return err
}

// settlePause looks at what a sandbox is, that could not be halted or could not
// be let go on, and notes that. It needs the operation lock.
func (m *Manager) settlePause(ctx context.Context, e *entry, cause error) {
	drv, err := m.driver(e.rec.Spec.Driver)
	var obs sandbox.Observation
	if err == nil {
		obs, err = m.inspect(ctx, drv, e)
	}
	if err != nil {
		m.unavailable(e, PhaseUnknown, errors.Join(cause, err))
		return
	}
	if obs.State != sandbox.StateRunning {
		m.ended(e, obs)
		return
	}
	see := enter(PhaseReady, "", "")
	if obs.Paused {
		see = enter(PhasePaused, sandbox.FailureOf(cause).Reason, cause.Error())
	}
	if err := m.put(e, func(r *store.Record) { r.Paused = obs.Paused }, see); err != nil {
		m.log.Error("record not written", "sandbox", e.name, "err", err)
		m.see(e, see)
	}
	m.guard(drv, e)
	m.tellTime(e)
}

// Resume lets a paused sandbox go on and returns once it does. Of one that is
// ready it succeeds.
func (m *Manager) Resume(ctx context.Context, name string) (*Sandbox, error) {
	s, err := m.Sandbox(ctx, name)
	if err != nil {
		return nil, err
	}
	if _, _, err := m.pauser("resume", name, s.Spec); err != nil {
		return nil, err
	}
	if !s.isReady() && !s.isPaused() {
		return nil, fmt.Errorf("resume %s: it is %s, not paused: %w", name, s.Phase, sandbox.ErrState)
	}
	return m.Start(ctx, name)
}

// awake resumes a sandbox if it is paused, for whoever needs its guest, and
// returns it as it is then.
func (m *Manager) awake(ctx context.Context, name string) (*Sandbox, error) {
	s, err := m.Sandbox(ctx, name)
	if err == nil && s.isPaused() {
		return m.Start(ctx, name)
	}
	return s, err
}

// resume lets a sandbox go on whose phase is PhasePaused. It needs the
// operation lock.
func (m *Manager) resume(ctx context.Context, e *entry) error {
	m.step("resume:intent")
	if err := m.put(e, func(r *store.Record) { r.Paused = false }, nil); err != nil {
		return fmt.Errorf("resume %s: %w", e.name, err)
	}
	e.unguard()
	drv, err := m.letGo(ctx, e)
	if cause := context.Cause(ctx); cause != nil {
		// Superseded, or the agent stops: who ended it deals with the rest.
		return fmt.Errorf("resume %s: %w", e.name, cause)
	}
	if err != nil {
		m.log.Warn("resume failed", "sandbox", e.name, "err", err)
		m.settlePause(ctx, e, err)
		return err
	}
	m.setClock(ctx, drv, e)
	m.step("resume:done")
	e.touch(time.Now())
	m.see(e, enter(PhaseReady, "", ""))
	m.log.Info("resumed", "sandbox", e.name, "generation", e.rec.Generation)
	m.guard(drv, e)
	return nil
}

// letGo lets what is halted go on.
func (m *Manager) letGo(ctx context.Context, e *entry) (sandbox.Driver, error) {
	drv, pauser, err := m.pauser("resume", e.name, e.rec.Spec)
	if err != nil {
		return nil, err
	}
	m.step("resume:go")
	ctx, cancel := context.WithTimeout(ctx, pauseDeadline)
	defer cancel()
	return drv, deadlined(ctx, pauser.Resume(ctx, m.ref(e.name)))
}

// setClock sets the clock of a guest that has one of its own, which stood
// still. A guest that does not answer is not waited for: it is seen to be
// unreachable soon.
func (m *Manager) setClock(ctx context.Context, drv sandbox.Driver, e *entry) {
	ctx, cancel := context.WithTimeout(ctx, clockLimit)
	defer cancel()
	err := m.guest(drv, e.name).SetTime(ctx, time.Now())
	if err != nil && !errors.Is(err, sandbox.ErrDenied) {
		m.log.Warn("clock not set", "sandbox", e.name, "err", err)
	}
}
