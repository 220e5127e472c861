package manager

import (
	"cmp"
	"slices"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// stopsPerPass bounds how many sandboxes one look stops for want of memory, so
// that what they free is seen before more are.
const stopsPerPass = 5

// idleGrace is what an idle workload is given to end.
const idleGrace = 30 * time.Second

// pressure shortens idle timeouts as memory runs out: below percent available,
// nobody stays idle for longer than limit.
type pressure struct {
	percent uint64
	limit   time.Duration
}

// pressures are in order of rising percentages.
func pressures() []pressure {
	return []pressure{{15, 0}, {30, 30 * time.Second}, {60, 5 * time.Minute}}
}

// tendIdle looks for idle sandboxes until the manager ends.
func (m *Manager) tendIdle() {
	ticker := time.NewTicker(m.cfg.IdleScan)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			m.stopIdle(time.Now())
		case <-m.life.Done():
			return
		}
	}
}

// stopIdle stops the sandboxes that are idle for longer than they may be. Only
// those that have an idle policy are ever stopped.
func (m *Manager) stopIdle(now time.Time) {
	limit, pressed := m.idleLimit()
	type idler struct {
		e    *entry
		idle time.Duration
		own  bool // past its own timeout
	}
	var idlers []idler
	m.mu.RLock()
	for _, e := range m.entries {
		s := e.snap.Load()
		if !s.isReady() && !s.isPaused() || s.Spec.Idle.Timeout == 0 {
			continue
		}
		if m.forward.OpenConnections(e.name) > 0 {
			e.touch(now)
			continue
		}
		idle := now.Sub(e.lastActivity())
		own := idle > s.Spec.Idle.Timeout
		if own || pressed && idle > limit {
			idlers = append(idlers, idler{e, idle, own})
		}
	}
	m.mu.RUnlock()
	slices.SortFunc(idlers, func(a, b idler) int { return cmp.Compare(b.idle, a.idle) })
	early := 0
	for _, i := range idlers {
		if !i.own {
			if early++; early > stopsPerPass {
				continue
			}
		}
		seen := i.e.lastActivity()
		m.work.Go(func() { m.stopIfIdle(i.e, seen) })
	}
}

// idleLimit is how long anybody may be idle as memory is now.
func (m *Manager) idleLimit() (limit time.Duration, pressed bool) {
	total, available, err := m.cfg.Memory()
	if err != nil || total == 0 {
		return 0, false
	}
	for _, p := range pressures() {
		if available*100 < p.percent*total {
			return p.limit, true
		}
	}
	return 0, false
}

// stopIfIdle stops a sandbox unless there was activity since.
func (m *Manager) stopIfIdle(e *entry, since time.Time) {
	if e.lock(m.life) != nil {
		return
	}
	defer e.unlock()
	before := e.snap.Load()
	if !before.isReady() && !before.isPaused() {
		return
	}
	// Ensure counts as activity first and looks at the phase then. So once
	// the phase is another, either its call is seen here, or it sees that and
	// waits for the next boot.
	m.see(e, enter(PhaseStopping, "IDLE", ""))
	if e.lastActivity().After(since) || m.forward.OpenConnections(e.name) > 0 {
		m.see(e, func(s *Sandbox) {
			enter(before.Phase, before.Reason, before.Message)(s)
			s.ReadyAt = before.ReadyAt
		})
		return
	}
	if e.rec.Spec.Idle.Action == sandbox.IdleHibernate {
		if err := m.hibernate(m.life, e, "IDLE"); err != nil {
			m.log.Error("idle hibernation failed", "sandbox", e.name, "err", err)
		}
		return
	}
	if err := m.stop(m.life, e, idleGrace, "IDLE"); err != nil {
		m.log.Error("idle stop failed", "sandbox", e.name, "err", err)
	}
}
