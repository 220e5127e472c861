package manager

import (
	"context"
	"fmt"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/store"
)

// guard watches over the present life of a sandbox and acts on its end. It
// needs the operation lock.
func (m *Manager) guard(drv sandbox.Driver, e *entry) {
	e.unguard()
	ctx, cancel := context.WithCancel(m.life)
	e.stopGuard = cancel
	generation := e.rec.Generation
	if !e.rec.Paused { // else nobody inside answers
		l := &link{ctx: ctx, guest: m.guest(drv, e.name), generation: generation, kick: make(chan struct{}, 1)}
		e.link.Store(l)
		m.work.Go(func() { m.tend(e, l) })
		ready := newSpares(generation)
		e.spares.Store(ready)
		m.work.Go(func() { ready.keep(ctx, l.guest) })
	}
	m.work.Go(func() {
		defer cancel()
		pause := 100 * time.Millisecond
		for {
			obs, err := drv.Wait(ctx, m.ref(e.name))
			if err == nil && obs.State != sandbox.StateRunning {
				m.lifeEnded(ctx, drv, e, generation)
				return
			}
			// The backend does not answer. What runs goes on running.
			select {
			case <-time.After(pause):
				pause = min(2*pause, 10*time.Second)
			case <-ctx.Done():
				return
			}
		}
	})
}

// unguard ends the watch over a life that is to be ended.
func (e *entry) unguard() {
	if e.stopGuard != nil {
		e.stopGuard()
		e.stopGuard = nil
	}
}

// lifeEnded acts on the end of a life, unless it was asked for or is past.
func (m *Manager) lifeEnded(ctx context.Context, drv sandbox.Driver, e *entry, generation uint64) {
	if e.lock(ctx) != nil {
		return
	}
	defer e.unlock()
	if ctx.Err() != nil || e.rec.Generation != generation || e.rec.Desired != store.DesiredRunning || e.rec.Pending != store.PendingNone {
		return
	}
	obs, err := m.inspect(ctx, drv, e)
	if err != nil {
		m.see(e, enter(PhaseUnknown, "DRIVER_UNAVAILABLE", err.Error()))
		m.retryLater(e)
		return
	}
	if obs.State == sandbox.StateRunning {
		m.renew(e)
		return
	}
	m.ended(e, obs)
}

// renew notes that somebody restarted the sandbox from outside: a new life,
// and so a boot of its own, which gives it what its workload needs.
func (m *Manager) renew(e *entry) {
	m.log.Warn("restarted from outside", "sandbox", e.name)
	e.unguard()
	m.forward.CutOff(e.name, e.rec.Generation)
	e.admitted.Store(true)
	if err := m.newLife(e); err != nil {
		m.log.Error("record not written", "sandbox", e.name, "err", err)
		m.retryLater(e)
		return
	}
	m.bootLater(e)
}

// newLife notes durably that what runs is a life of its own, to be brought up.
func (m *Manager) newLife(e *entry) error {
	return m.put(e, func(r *store.Record) {
		r.Desired, r.Pending, r.HostBoot = store.DesiredRunning, store.PendingBoot, m.hostBoot
		r.Generation++
		r.Reason, r.Failure, r.Paused, r.Hibernated = "", "", false, false
	}, nil)
}

// ended acts on a workload that ended by itself: start it again if the restart
// policy says so, or note how it ended. It needs the operation lock.
func (m *Manager) ended(e *entry, obs sandbox.Observation) {
	e.unguard()
	m.forward.CutOff(e.name, e.rec.Generation)
	e.admitted.Store(false)
	code := obs.ExitCode
	message := "the workload exited with status " + exitText(obs)
	if obs.State != sandbox.StateExited {
		code, message = 1, "its artefacts were removed from outside"
	}
	if since := obs.FinishedAt.Sub(obs.StartedAt); !obs.StartedAt.IsZero() && since >= freshStart {
		e.retries = 0
	}
	m.see(e, func(s *Sandbox) { observed(s, obs) })
	policy := e.rec.Spec.Restart
	if policy.Applies(code, e.retries) {
		m.backoff(e, message)
		return
	}
	reason := "EXITED"
	if policy.Applies(code, 0) {
		reason, message = "RETRIES_EXHAUSTED", fmt.Sprintf("%s, after %d restarts", message, e.retries)
	}
	phase, failure := PhaseStopped, ""
	if code != 0 {
		phase, failure = PhaseFailed, message
	}
	err := m.put(e, func(r *store.Record) {
		r.Desired, r.Pending, r.Reason, r.Failure = store.DesiredStopped, store.PendingNone, reason, failure
		r.Paused = false
	}, enter(phase, reason, message))
	if err != nil {
		// The next start of the agent comes to the same end.
		m.log.Error("record not written", "sandbox", e.name, "err", err)
		m.see(e, enter(phase, reason, message))
	}
	m.log.Info("ended", "sandbox", e.name, "generation", e.rec.Generation, "exit_code", obs.ExitCode)
}

// backoff shows a sandbox as waiting for its restart, and restarts it then.
func (m *Manager) backoff(e *entry, message string) {
	pause := e.rec.Spec.Restart.Backoff(e.retries)
	e.retries++
	m.see(e, func(s *Sandbox) {
		enter(PhaseBackoff, "RESTARTING", message)(s)
		s.NextRestartAt = time.Now().Add(pause)
	})
	m.log.Info("restart later", "sandbox", e.name, "pause", pause, "restart_count", e.retries)
	m.after(e, pause, func() {
		m.fly(e, func(ctx context.Context) error { return m.boot(ctx, e, byItself) })
	})
}

// retryLater tries again to bring the sandbox to what its record says, after a
// pause that grows with each failure.
func (m *Manager) retryLater(e *entry) {
	pause := min(time.Second<<min(e.trouble, 5), 30*time.Second)
	e.trouble++
	m.after(e, pause, func() {
		if e.lock(m.life) != nil {
			return
		}
		defer e.unlock()
		m.reconcile(m.life, e)
	})
}
