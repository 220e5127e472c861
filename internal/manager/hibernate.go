package manager

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/store"
)

// hibernateDeadline is for a driver to write a sandbox's memory and end it.
const hibernateDeadline = 15 * time.Minute

// Reasons that have to do with hibernation.
const (
	hibernating     = "HIBERNATING"
	hibernateFailed = "HIBERNATE_FAILED"
	hibernationLost = "HIBERNATION_LOST"
)

// hibernator returns a sandbox's driver as one that hibernates sandboxes of
// such a spec.
func (m *Manager) hibernator(spec sandbox.Spec) (sandbox.Driver, sandbox.Hibernator, error) {
	drv, err := m.driver(spec.Driver)
	if err != nil {
		return nil, nil, err
	}
	h, ok := drv.(sandbox.Hibernator)
	if !ok {
		return nil, nil, fmt.Errorf("driver %s cannot: %w", spec.Driver, sandbox.ErrUnsupported)
	}
	return drv, h, h.CheckHibernate(spec)
}

// checkIdle refuses to hibernate when idle what cannot be hibernated.
func (m *Manager) checkIdle(spec sandbox.Spec) error {
	if spec.Idle.Action != sandbox.IdleHibernate {
		return nil
	}
	if _, _, err := m.hibernator(spec); err != nil {
		return sandbox.Unsupportedf("spec.idle.action", "it cannot hibernate: %v; use stop", err)
	}
	return nil
}

// Hibernate keeps the memory of a sandbox that is ready on disk and ends it;
// its next boot goes on from there. Of one that is hibernated it succeeds. If
// its memory cannot be kept after all it is stopped, and the error says why.
func (m *Manager) Hibernate(ctx context.Context, name string) (*Sandbox, error) {
	s, err := m.Sandbox(ctx, name)
	if err != nil {
		return nil, err
	}
	if _, _, err := m.hibernator(s.Spec); err != nil {
		return nil, fmt.Errorf("hibernate %s: %w", name, err)
	}
	// A boot holds the lock until it is over; it is not waited for.
	if err := mayHibernate(s); err != nil {
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
		// It may have ended, or be to be deleted, since.
		if err := mayHibernate(e.view()); err != nil {
			return err
		}
		return m.hibernate(ctx, e, "")
	})
	if err != nil {
		return nil, err
	}
	return e.view(), nil
}

func mayHibernate(s *Sandbox) error {
	if !s.isReady() && !s.isPaused() && s.Phase != PhaseHibernated {
		return fmt.Errorf("hibernate %s: it is %s; only one that is ready can be: %w", s.Name, s.Phase, sandbox.ErrState)
	}
	return nil
}

// hibernate writes the intent, and has the driver do it. It needs the operation
// lock.
func (m *Manager) hibernate(ctx context.Context, e *entry, reason string) error {
	s := e.snap.Load()
	if s.Phase == PhaseHibernated {
		return nil
	}
	drv, h, err := m.hibernator(e.rec.Spec)
	if err != nil {
		return fmt.Errorf("hibernate %s: %w", e.name, err)
	}
	m.step("hibernate:intent")
	err = m.put(e, func(r *store.Record) {
		r.Desired, r.Pending, r.Grace = store.DesiredStopped, store.PendingHibernate, DefaultGrace
		r.Reason, r.Failure, r.Paused = reason, "", false
	}, enter(PhaseStopping, hibernating, ""))
	if err != nil {
		return fmt.Errorf("hibernate %s: %w", e.name, err)
	}
	m.log.Info("hibernating", "sandbox", e.name, "generation", e.rec.Generation, "reason", reason)
	e.unguard()
	m.step("hibernate:save")
	bounded, cancel := context.WithTimeout(ctx, hibernateDeadline)
	err = deadlined(bounded, h.Hibernate(bounded, m.ref(e.name)))
	cancel()
	if m.life.Err() != nil {
		return err // the next start of the agent finishes it
	}
	return m.settleHibernate(ctx, drv, e, err)
}

// settleHibernate looks at what became of a sandbox that was to be hibernated,
// and stops it if it was not. It needs the operation lock.
func (m *Manager) settleHibernate(ctx context.Context, drv sandbox.Driver, e *entry, cause error) error {
	obs, err := m.inspect(ctx, drv, e)
	if err != nil {
		m.unavailable(e, PhaseUnknown, errors.Join(cause, err))
		return fmt.Errorf("hibernate %s: %w", e.name, errors.Join(cause, err))
	}
	if !obs.Saved {
		m.log.Warn("hibernate failed", "sandbox", e.name, "err", cause)
		err := m.put(e, func(r *store.Record) { r.Pending, r.Reason = store.PendingStop, hibernateFailed },
			enter(PhaseStopping, hibernateFailed, ""))
		if err == nil {
			if err = m.halt(ctx, drv, e); err == nil {
				err = m.stopped(e)
			}
		}
		if cause == nil {
			cause = errors.New("the agent was interrupted")
		}
		return fmt.Errorf("hibernate %s, which was stopped instead: %w", e.name, errors.Join(cause, err))
	}
	m.forward.CutOff(e.name, e.rec.Generation)
	e.admitted.Store(false)
	m.step("hibernate:done")
	see := func(s *Sandbox) {
		enter(PhaseHibernated, e.rec.Reason, "")(s)
		s.Exit = nil
	}
	err = m.put(e, func(r *store.Record) { r.Pending, r.Hibernated = store.PendingNone, true }, see)
	if err != nil {
		// The intent on disk is found carried out.
		m.log.Error("record not written", "sandbox", e.name, "err", err)
		m.see(e, see)
	}
	m.log.Info("hibernated", "sandbox", e.name, "generation", e.rec.Generation)
	return nil
}

// loseHibernation notes that what a sandbox was to go on from is gone, as it is
// once the host was restarted.
func (m *Manager) loseHibernation(ctx context.Context, drv sandbox.Driver, e *entry) {
	m.log.Warn("its memory is gone; it will boot as ever", "sandbox", e.name)
	// What is left of it takes room and is of no use.
	bounded, cancel := context.WithTimeout(ctx, stopDeadline)
	defer cancel()
	if err := drv.Stop(bounded, m.ref(e.name), 0); err != nil {
		m.log.Warn("its memory was not removed", "sandbox", e.name, "err", err)
	}
	if err := m.put(e, func(r *store.Record) { r.Hibernated, r.Reason = false, hibernationLost }, nil); err != nil {
		m.log.Error("record not written", "sandbox", e.name, "err", err)
	}
}

// errStale is a workload that went on with secrets that are past, though its
// spec says that new ones are a reason to start it again.
var errStale = errors.New("its secrets have changed since it was hibernated")

// rejoin tells the guestd of a sandbox that went on from a saved memory which
// boot this is, and gives it the secrets of today. It reports false of one that
// did not: it booted as ever.
func (b *bringUp) rejoin(ctx context.Context, entropy []byte) (bool, error) {
	e := b.entry
	var info guest.Info
	err := b.insist(ctx, func() (err error) {
		info, err = b.guest.Hello(ctx)
		return err
	})
	if err != nil || info.Phase != guest.PhaseRunning {
		return false, err
	}
	b.begun = true
	if err := b.insist(ctx, func() error { return b.guest.Rejoin(ctx, e.rec.Generation, entropy) }); err != nil {
		return true, err
	}
	rotation := e.rec.Spec.Rotation
	var signal int32
	if rotation.Action == sandbox.RotationSignal {
		if signal, err = sandbox.ParseSignal("spec.secret_rotation.signal", cmp.Or(rotation.Signal, "HUP")); err != nil {
			return true, err
		}
	}
	var changed []string
	err = b.insist(ctx, func() (err error) {
		changed, err = b.guest.UpdateSecrets(ctx, b.values, signal, false)
		return err
	})
	if err == nil && len(changed) > 0 && rotation.Action == sandbox.RotationRestart {
		return true, errStale
	}
	return true, err
}

// afresh ends a life that went on from a saved memory, and boots as ever.
func (m *Manager) afresh(ctx context.Context, drv sandbox.Driver, e *entry, values []guest.Secret) (sandbox.Observation, error) {
	m.log.Info("booting afresh", "sandbox", e.name, "why", errStale)
	err := m.put(e, func(r *store.Record) { r.Hibernated, r.Grace = false, DefaultGrace }, nil)
	if err == nil {
		err = m.halt(ctx, drv, e)
	}
	if err != nil {
		return sandbox.Observation{}, err
	}
	obs, err := m.launch(ctx, drv, e, sandbox.Observation{State: sandbox.StateExited})
	if err == nil {
		err = m.awaitReady(ctx, drv, e, values)
	}
	return obs, err
}
