package manager

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/store"
)

// reconcilers is how many records are compared with the host at once.
const reconcilers = 16

// reconcileAll compares every record with the host, then removes what has no
// record. Boots that it finds necessary go on in the background.
func (m *Manager) reconcileAll() {
	began := time.Now()
	queue := make(chan *entry, len(m.loaded))
	for _, e := range m.loaded {
		queue <- e
	}
	close(queue)
	count := len(m.loaded)
	m.loaded = nil
	var workers sync.WaitGroup
	for range reconcilers {
		workers.Go(func() {
			for e := range queue {
				m.reconcile(m.life, e)
				close(e.reconciled)
				e.unlock()
			}
		})
	}
	workers.Wait()
	close(m.reconciled)
	if m.life.Err() != nil {
		return
	}
	m.log.Info("reconciled", "sandboxes", count, "took", time.Since(began))
	for _, q := range m.store.Quarantined() {
		m.log.Error("record set aside", "sandbox", q.Name, "path", q.Path, "err", q.Reason)
	}
	m.sweepUntilDone()
}

// reconcile brings one sandbox to what its record says, or begins to. It needs
// the operation lock.
func (m *Manager) reconcile(ctx context.Context, e *entry) {
	drv, err := m.driver(e.rec.Spec.Driver)
	if err != nil {
		m.see(e, enter(PhaseUnknown, "DRIVER_MISSING", err.Error()))
		m.log.Error("driver missing", "sandbox", e.name, "driver", e.rec.Spec.Driver)
		return
	}
	if e.rec.Desired == store.DesiredDeleted {
		m.see(e, enter(PhaseDeleting, "", ""))
		if err := m.finishDelete(ctx, e); err != nil {
			m.unavailable(e, PhaseDeleting, err)
		}
		return
	}
	obs, err := m.inspect(ctx, drv, e)
	if err != nil {
		m.unavailable(e, PhaseUnknown, err)
		return
	}
	m.see(e, func(s *Sandbox) { observed(s, obs) })
	if err := m.settleEgress(ctx, drv, e, obs); err != nil {
		m.unavailable(e, PhaseUnknown, err)
		return
	}
	switch {
	case e.rec.Pending == store.PendingCreate:
		m.resumeCreate(ctx, e)
	case e.rec.Pending == store.PendingHibernate:
		if err := m.settleHibernate(ctx, drv, e, nil); err != nil {
			m.log.Warn("hibernation not finished", "sandbox", e.name, "err", err)
		}
	case e.rec.Pending == store.PendingStop:
		m.resumeStop(ctx, drv, e)
	case e.rec.Desired == store.DesiredRunning:
		m.resumeRun(ctx, drv, e, obs)
	case obs.State == sandbox.StateRunning:
		m.log.Warn("running though it was stopped", "sandbox", e.name)
		e.rec.Grace = DefaultGrace
		m.resumeStop(ctx, drv, e)
	default:
		if e.rec.Hibernated && !obs.Saved {
			m.loseHibernation(ctx, drv, e)
		}
		m.settle(e)
	}
}

// unavailable shows that the driver did not answer, and tries again later.
func (m *Manager) unavailable(e *entry, phase Phase, err error) {
	if m.life.Err() != nil {
		return
	}
	if e.trouble == 0 {
		m.log.Warn("driver does not answer", "sandbox", e.name, "err", err)
	}
	m.see(e, enter(phase, "DRIVER_UNAVAILABLE", err.Error()))
	m.retryLater(e)
}

// resumeCreate finishes a creation, or undoes it if it cannot be finished.
func (m *Manager) resumeCreate(ctx context.Context, e *entry) {
	err := m.makeArtefacts(ctx, e)
	switch {
	case err == nil && e.rec.Desired == store.DesiredRunning:
		m.bootLater(e)
	case err == nil:
		if err := m.put(e, func(r *store.Record) { r.Pending = store.PendingNone }, enter(PhaseStopped, "", "")); err != nil {
			m.log.Error("record not written", "sandbox", e.name, "err", err)
		}
	case passes(err) || m.life.Err() != nil:
		m.unavailable(e, PhaseUnknown, err)
	default:
		m.log.Warn("create failed", "sandbox", e.name, "err", err)
		if err := m.rollback(ctx, e); err != nil {
			m.log.Error("clean-up failed", "sandbox", e.name, "err", err)
		}
	}
}

// resumeStop finishes a stop, and the boot after it if it was for a restart.
func (m *Manager) resumeStop(ctx context.Context, drv sandbox.Driver, e *entry) {
	m.see(e, enter(PhaseStopping, e.rec.Reason, e.rec.Failure))
	if err := m.halt(ctx, drv, e); err != nil {
		return // halt tries again
	}
	if e.rec.Desired == store.DesiredRunning {
		m.bootLater(e)
		return
	}
	if err := m.stopped(e); err != nil {
		m.log.Error("stop not finished", "sandbox", e.name, "err", err)
	}
}

// resumeRun adopts a sandbox that runs as it should, and deals with one that
// does not.
func (m *Manager) resumeRun(ctx context.Context, drv sandbox.Driver, e *entry, obs sandbox.Observation) {
	rebooted := e.rec.HostBoot != m.hostBoot
	switch {
	case obs.State == sandbox.StateRunning && rebooted:
		m.renew(e)
	case e.rec.Pending == store.PendingBoot:
		m.bootLater(e)
	case obs.State == sandbox.StateRunning:
		m.adopt(ctx, drv, e, obs)
	case obs.State != sandbox.StateExited || rebooted:
		m.bootLater(e)
	default:
		m.ended(e, obs)
	}
}

// adopt takes over a sandbox that was ready and runs. If it is not paused as its
// record says, or paused as it does not, the pause or its end is finished.
func (m *Manager) adopt(ctx context.Context, drv sandbox.Driver, e *entry, obs sandbox.Observation) {
	e.admitted.Store(true)
	e.trouble = 0
	phase, reason := PhaseReady, ""
	if e.rec.Paused || obs.Paused {
		phase, reason = PhasePaused, paused
	}
	m.see(e, func(s *Sandbox) {
		enter(phase, reason, "")(s)
		s.ReadyAt, s.Exit = obs.StartedAt, nil
	})
	m.log.Info("adopted", "sandbox", e.name, "generation", e.rec.Generation, "paused", obs.Paused)
	m.lookAgain(e)
	switch {
	case e.rec.Paused == obs.Paused:
		m.guard(drv, e)
		m.tellTime(e)
	case e.rec.Paused:
		_ = m.finishPause(ctx, e) // it says in the log, and in the phase, what it came to
	default:
		m.fly(e, func(ctx context.Context) error { return m.boot(ctx, e, byItself) })
	}
}

// bootLater begins a boot that takes the operation lock once it is free.
func (m *Manager) bootLater(e *entry) {
	m.see(e, enter(PhaseStarting, "", ""))
	m.fly(e, func(ctx context.Context) error { return m.boot(ctx, e, byItself) })
}

// sweepUntilDone removes artefacts that have no record, trying again while a
// driver does not answer.
func (m *Manager) sweepUntilDone() {
	for pause := time.Second; ; pause = min(2*pause, time.Minute) {
		err := m.sweep()
		if err == nil {
			return
		}
		m.log.Warn("sweep not complete", "err", err)
		select {
		case <-time.After(pause):
		case <-m.life.Done():
			return
		}
	}
}

// sweep removes artefacts that are this agent's and have no record. Those of a
// quarantined record are left: somebody may want them back.
func (m *Manager) sweep() error {
	var errs []error
	for _, drv := range m.cfg.Drivers {
		ctx, cancel := context.WithTimeout(m.life, deleteDeadline)
		names, err := drv.List(ctx)
		errs = append(errs, err)
		for _, name := range names {
			errs = append(errs, m.removeOrphan(name, func() error { return drv.Delete(ctx, m.ref(name)) }))
		}
		cancel()
	}
	if err := errors.Join(errs...); err != nil {
		return err // the folders may still be needed
	}
	stray, err := m.store.StrayDirs()
	errs = append(errs, err)
	for _, name := range stray {
		errs = append(errs, m.removeOrphan(name, func() error { return m.store.RemoveStray(name) }))
	}
	return errors.Join(errs...)
}

// removeOrphan removes something that has no record, holding its name so that
// no sandbox is made under it meanwhile.
func (m *Manager) removeOrphan(name string, remove func() error) error {
	quarantined := slices.ContainsFunc(m.store.Quarantined(), func(q store.Quarantined) bool { return q.Name == name })
	m.mu.Lock()
	if quarantined || m.entries[name] != nil {
		m.mu.Unlock()
		return nil
	}
	e := newEntry(name)
	m.entries[name] = e
	m.mu.Unlock()
	m.log.Warn("removing what has no record", "sandbox", name)
	err := remove()
	m.forget(e)
	e.unlock()
	return err
}
