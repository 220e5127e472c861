package manager

import (
	"context"
	"sync"
	"time"

	"github.com/choiros/agent/internal/hostclock"
)

// wakeLimit is how long a guest may be silent after the host has slept until
// connections that lead to it over its channel are closed: it was seen to take
// long on a Mac, and now and then for ever (lima-vm/lima issue 1609).
const wakeLimit = time.Minute

// tendClocks does what is due after the host has slept, or its clock was set,
// until the manager ends. Guests' clocks stood still or are as wrong as the
// host's was; see package hostclock. It is the agent's task and no shim's: what
// there is to look after, forwards and their connections, is the agent's, and
// one that did not run meanwhile sets the clocks of what it adopts.
func (m *Manager) tendClocks() {
	if err := hostclock.Watch(m.life, m.cfg.ClockScan, m.cfg.Clock, m.rouse); err != nil {
		m.log.Error("the host's sleep goes unnoticed", "err", err)
	}
}

// roused counts what was found after a sleep.
type roused struct {
	clocks int // that were set
	silent int // guests that did not answer
	closed int // connections into those
}

// rouse has every guest that runs answer and know the time, and every port
// listen. What broke is logged with its sandbox, and shown as ever.
func (m *Manager) rouse(jump hostclock.Jump) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(m.life, m.wakeLimit)
	defer cancel()
	var (
		all   sync.WaitGroup
		mu    sync.Mutex
		found roused
	)
	m.mu.RLock()
	for _, e := range m.entries {
		all.Go(func() {
			one := m.rouseOne(ctx, e)
			mu.Lock()
			defer mu.Unlock()
			found.clocks += one.clocks
			found.silent += one.silent
			found.closed += one.closed
		})
	}
	m.mu.RUnlock()
	ports := m.forward.Verify(ctx)
	all.Wait()
	if m.life.Err() != nil {
		return
	}
	log := m.log.With(
		"took", time.Since(began).Round(time.Millisecond), "clocks_set", found.clocks, "guests_silent", found.silent,
		"connections_closed", found.closed, "ports_listening", ports.Listening, "ports_rebuilt", ports.Rebuilt, "ports_blocked", ports.Blocked)
	if jump.Slept != 0 {
		log.Info("the host slept", "slept", jump.Slept.Round(time.Second))
		return
	}
	log.Info("the clock of the host was set", "by", jump.Set.Round(time.Millisecond))
}

// rouseOne does it for one sandbox.
func (m *Manager) rouseOne(ctx context.Context, e *entry) (found roused) {
	l := e.link.Load()
	if s := e.snap.Load(); s != nil && s.Phase == PhaseStarting {
		return m.rouseEarly(ctx, e, s)
	}
	if l == nil || l.ctx.Err() != nil {
		return found
	}
	before := m.traffic(e)
	r := l.rouse()
	select {
	case <-r.answered:
		if r.clock == nil {
			found.clocks = 1
		}
	case <-l.ctx.Done():
	case <-ctx.Done():
		// Whoever has the operation lock for long keeps it from being told, and
		// not from answering.
		if l.answers() || l.ctx.Err() != nil {
			return found
		}
		found.silent, found.closed = 1, before.reset()
		m.log.Warn("guest is silent since the host slept", "sandbox", e.name, "connections_closed", found.closed)
	}
	return found
}

// rouseEarly sets the clock of a guest that is on its way to be ready: one that
// does not answer yet is told the time when it does.
func (m *Manager) rouseEarly(ctx context.Context, e *entry, s *Sandbox) (found roused) {
	drv, err := m.driver(s.Spec.Driver)
	if err != nil {
		return found
	}
	ctx, cancel := context.WithTimeout(ctx, clockLimit)
	defer cancel()
	if m.guest(drv, e.name).SetTime(ctx, time.Now()) == nil {
		found.clocks = 1
	}
	return found
}
