package manager

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/store"
)

// errStopping is why a stop or a deletion ends a boot.
var errStopping = fmt.Errorf("stop: %w", sandbox.ErrSuperseded)

func checkGrace(grace time.Duration) error {
	if grace < 0 || grace > MaxGrace {
		return sandbox.Invalidf("grace", "%s is not from 0 to %s", grace, MaxGrace)
	}
	return nil
}

// Stop stops a sandbox and returns once it does not run. It ends a boot or a
// backoff that is under way.
func (m *Manager) Stop(ctx context.Context, name string, grace time.Duration) (*Sandbox, error) {
	e, err := m.find(name)
	if err != nil {
		return nil, err
	}
	if err := checkGrace(grace); err != nil {
		return nil, err
	}
	e.interrupt(errStopping)
	arrived := e.hasten(grace)
	err = m.detach(ctx, func(ctx context.Context) error {
		err := e.lock(ctx)
		arrived()
		if err != nil {
			return err
		}
		defer e.unlock()
		return m.stop(ctx, e, grace, "")
	})
	if err != nil {
		return nil, err
	}
	return e.view(), nil
}

// stop writes the intent and stops the sandbox. It needs the operation lock.
func (m *Manager) stop(ctx context.Context, e *entry, grace time.Duration, reason string) error {
	if e.rec.Desired == store.DesiredDeleted {
		return fmt.Errorf("stop %s: it is being deleted: %w", e.name, sandbox.ErrState)
	}
	phase := e.snap.Load().Phase
	if e.rec.Desired == store.DesiredStopped && e.rec.Pending == store.PendingNone &&
		(phase == PhaseStopped || phase == PhaseFailed) {
		return nil
	}
	drv, err := m.driver(e.rec.Spec.Driver)
	if err != nil {
		return err
	}
	m.step("stop:intent")
	err = m.put(e, func(r *store.Record) {
		r.Desired, r.Pending, r.Grace = store.DesiredStopped, store.PendingStop, grace
		r.Reason, r.Failure, r.Paused, r.Hibernated = reason, "", false, false
	}, enter(PhaseStopping, reason, ""))
	if err != nil {
		return fmt.Errorf("stop %s: %w", e.name, err)
	}
	m.log.Info("stopping", "sandbox", e.name, "generation", e.rec.Generation, "reason", reason)
	if err := m.halt(ctx, drv, e); err != nil {
		return fmt.Errorf("stop %s: %w", e.name, err)
	}
	return m.stopped(e)
}

// halt stops what runs, by the grace in the record, and sees how it ended. If
// the driver fails it is tried again in the background.
func (m *Manager) halt(ctx context.Context, drv sandbox.Driver, e *entry) error {
	e.unguard()
	m.step("stop:signal")
	err := m.terminate(ctx, drv, e)
	if err == nil {
		var obs sandbox.Observation
		if obs, err = m.inspect(ctx, drv, e); err == nil {
			m.forward.CutOff(e.name, e.rec.Generation)
			e.admitted.Store(false)
			m.see(e, func(s *Sandbox) { observed(s, obs) })
			return nil
		}
	}
	if m.life.Err() == nil {
		m.see(e, enter(PhaseUnknown, "DRIVER_UNAVAILABLE", err.Error()))
		m.retryLater(e)
	}
	return err
}

// ending is a driver's Stop that may be told to hurry.
type ending struct {
	kill   time.Time // when the workload is killed
	cancel context.CancelFunc
}

// terminate is the driver's Stop, by the grace in the record or by the shorter
// one of somebody who waits for the lock, now or while it goes on.
func (m *Manager) terminate(ctx context.Context, drv sandbox.Driver, e *entry) error {
	latest := time.Now().Add(e.rec.Grace)
	for {
		bounded, cancel := context.WithCancel(ctx)
		kill := e.beginEnding(latest, cancel)
		grace := max(0, time.Until(kill))
		if kill.Equal(latest) {
			grace = max(0, min(e.rec.Grace, grace+time.Millisecond)) // as asked for, not a hair less
		}
		timed, stop := context.WithTimeout(bounded, grace+stopDeadline)
		err := deadlined(timed, drv.Stop(timed, m.ref(e.name), grace))
		stop()
		hurried := bounded.Err() != nil && ctx.Err() == nil
		cancel()
		e.endEnding()
		if err == nil || !hurried {
			return err
		}
	}
}

// beginEnding notes that a Stop is under way and returns when it is to kill:
// at the latest time given, or sooner if somebody waits.
func (e *entry) beginEnding(latest time.Time, cancel context.CancelFunc) time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	for at := range e.awaited {
		if at.Before(latest) {
			latest = *at
		}
	}
	e.ending = &ending{kill: latest, cancel: cancel}
	return latest
}

func (e *entry) endEnding() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ending = nil
}

// hasten announces somebody who will wait for the lock to stop the sandbox by
// this grace: a stop that is under way, or begins first, takes no longer. The
// caller calls arrived once it has the lock, or does not want it any more.
func (e *entry) hasten(grace time.Duration) (arrived func()) {
	at := time.Now().Add(grace)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.awaited[&at] = struct{}{}
	if e.ending != nil && at.Before(e.ending.kill) {
		e.ending.cancel()
	}
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.awaited, &at)
	}
}

// stopped notes that a stop is complete.
func (m *Manager) stopped(e *entry) error {
	m.step("stop:done")
	phase := PhaseStopped
	if e.rec.Failure != "" {
		phase = PhaseFailed
	}
	err := m.put(e, func(r *store.Record) { r.Pending = store.PendingNone }, enter(phase, e.rec.Reason, e.rec.Failure))
	if err != nil {
		// The intent on disk says to stop it, which is harmless to do again.
		m.log.Error("record not written", "sandbox", e.name, "err", err)
		m.settle(e)
	}
	m.log.Info("stopped", "sandbox", e.name, "generation", e.rec.Generation)
	return nil
}

// Restart stops a sandbox if it runs, and boots it: always a new generation,
// but for a retry of a request that was carried out.
func (m *Manager) Restart(ctx context.Context, name string, grace time.Duration, req Request) (*Sandbox, error) {
	e, err := m.find(name)
	if err != nil {
		return nil, err
	}
	if err := checkGrace(grace); err != nil {
		return nil, err
	}
	if err := m.mayBoot(name); err != nil {
		return nil, err
	}
	for {
		e.interrupt(errRestarting)
		arrived := e.hasten(grace)
		f, began := m.fly(e, func(ctx context.Context) error {
			arrived()
			return m.restart(ctx, e, grace, req)
		})
		if began {
			// Also if it is ended before it gets the lock.
			m.work.Go(func() { <-f.done; arrived() })
		} else {
			arrived()
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if !began {
			continue
		}
		if f.err != nil {
			return nil, f.err
		}
		return e.view(), nil
	}
}

func (m *Manager) restart(ctx context.Context, e *entry, grace time.Duration, req Request) error {
	if e.rec.Desired == store.DesiredDeleted {
		return fmt.Errorf("restart %s: it is being deleted: %w", e.name, sandbox.ErrState)
	}
	if req.ID != "" && e.rec.Restarted == req {
		return m.boot(ctx, e, byRequest)
	}
	drv, err := m.driver(e.rec.Spec.Driver)
	if err != nil {
		return err
	}
	m.step("restart:intent")
	err = m.put(e, func(r *store.Record) {
		r.Desired, r.Pending, r.Grace = store.DesiredRunning, store.PendingStop, grace
		r.Reason, r.Failure, r.Restarted, r.Paused, r.Hibernated = "", "", req, false, false
	}, enter(PhaseStopping, "RESTARTING", ""))
	if err != nil {
		return fmt.Errorf("restart %s: %w", e.name, err)
	}
	m.log.Info("restarting", "sandbox", e.name, "generation", e.rec.Generation)
	if err := m.halt(ctx, drv, e); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return fmt.Errorf("restart %s: %w", e.name, err)
	}
	return m.boot(ctx, e, byRequest)
}

// Delete stops a sandbox and removes it and its artefacts.
func (m *Manager) Delete(ctx context.Context, name string, grace time.Duration, allowMissing bool, req Request) error {
	if err := checkGrace(grace); err != nil {
		return err
	}
	e, err := m.lookUp(name)
	if err == nil {
		e.interrupt(errStopping)
		arrived := e.hasten(grace)
		err = m.detach(ctx, func(ctx context.Context) error {
			err := e.lock(ctx)
			arrived()
			if err != nil {
				return err
			}
			defer e.unlock()
			return m.delete(ctx, e, grace, req)
		})
	}
	if allowMissing && errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	return err
}

func (m *Manager) delete(ctx context.Context, e *entry, grace time.Duration, req Request) error {
	m.step("delete:intent")
	err := m.put(e, func(r *store.Record) {
		r.Desired, r.Pending, r.Grace, r.Deleted = store.DesiredDeleted, store.PendingNone, grace, req
		r.UpdatedAt = time.Now()
	}, enter(PhaseDeleting, "", ""))
	if err != nil {
		return fmt.Errorf("delete %s: %w", e.name, err)
	}
	m.log.Info("deleting", "sandbox", e.name)
	if err := m.finishDelete(ctx, e); err != nil {
		if m.life.Err() == nil {
			m.see(e, enter(PhaseDeleting, "DELETE_FAILED", err.Error()))
			m.retryLater(e)
		}
		return fmt.Errorf("delete %s, to be tried again: %w", e.name, err)
	}
	return nil
}

// finishDelete carries out a deletion whose intent is written. Its answer is
// kept before the record goes, so that a retry always finds one of them.
func (m *Manager) finishDelete(ctx context.Context, e *entry) error {
	drv, err := m.driver(e.rec.Spec.Driver)
	if err != nil {
		return err
	}
	e.unguard()
	if e.rec.Grace > 0 {
		m.step("delete:stop")
		if err := m.terminate(ctx, drv, e); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, deleteDeadline)
	defer cancel()
	m.step("delete:artefacts")
	if err := drv.Delete(ctx, m.ref(e.name)); err != nil {
		return deadlined(ctx, err)
	}
	e.admitted.Store(false)
	m.forward.ReleaseAll(e.name)
	if e.rec.Deleted.ID != "" {
		m.step("delete:answer")
		if err := m.keepAnswer(e.rec.Deleted, nil); err != nil {
			m.log.Error("answer not kept", "sandbox", e.name, "err", err)
		}
	}
	m.step("delete:record")
	if err := m.store.Remove(e.name); err != nil {
		return err
	}
	m.step("delete:done")
	m.forget(e)
	m.log.Info("deleted", "sandbox", e.name)
	return nil
}
