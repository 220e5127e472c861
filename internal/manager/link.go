package manager

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/choiros/agent/internal/forward"
	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/store"
)

const (
	// linkCheck is how often a guestd is greeted.
	linkCheck = 30 * time.Second
	// unreachableAfter is how long a guestd may not answer before that is shown.
	unreachableAfter = 3 * time.Second
	// farewell is how long a guestd that answers may take to end a call that it is
	// asked to. After lastWord it is greeted over a new connection.
	farewell = 20 * time.Second
	lastWord = time.Second
)

// link is how the manager is in touch with the guest of one life.
type link struct {
	ctx        context.Context //nolint:containedctx // it is the life's, ended by unguard
	guest      *guest.Guest
	generation uint64
	// kick has the guest greeted at once.
	kick chan struct{}

	mu  sync.Mutex
	due *rousal // what the guest is still to be told; nil: nothing
}

// rousal is a guest's being told that time has passed.
type rousal struct {
	answered chan struct{} // closed once it did
	// clock is how the setting of its clock went, once it has answered. Of a
	// guest that has its host's it wraps sandbox.ErrDenied.
	clock error
}

// rouse has the guest greeted at once, and its clock set once it answers.
func (l *link) rouse() *rousal {
	l.mu.Lock()
	defer l.mu.Unlock()
	// One that is being told at this moment may be told a time that is past.
	l.due = &rousal{answered: make(chan struct{})}
	select {
	case l.kick <- struct{}{}:
	default:
	}
	return l.due
}

// answers reports whether the guest does, at this moment.
func (l *link) answers() bool {
	ctx, cancel := context.WithTimeout(l.ctx, clockLimit)
	defer cancel()
	_, err := l.guest.Hello(ctx)
	return err == nil
}

// traffic is what goes over a guest channel at some moment: connections into
// the sandbox, and callers' visits.
type traffic struct {
	relayed forward.Relayed
	calls   []net.Conn
}

// traffic is what goes over a sandbox's guest channel now.
func (m *Manager) traffic(e *entry) traffic { return traffic{m.forward.Relayed(e.name), e.calls()} }

// reset ends what still does, and returns how many connections that were.
func (t traffic) reset() int {
	n := t.relayed.Reset()
	for _, call := range t.calls {
		if call.Close() == nil { // else it has ended itself
			n++
		}
	}
	return n
}

// tellTime has a guest's clock set that may have stood still unseen. It needs the
// operation lock.
func (m *Manager) tellTime(e *entry) {
	if !e.rec.Paused { // else it is told when it goes on
		e.link.Load().rouse()
	}
}

// catchUp sets the clock of a guest that has just answered, if that is due.
func (m *Manager) catchUp(e *entry, l *link) {
	l.mu.Lock()
	due := l.due
	l.mu.Unlock()
	if due == nil {
		return
	}
	ctx, cancel := context.WithTimeout(l.ctx, clockLimit)
	defer cancel()
	due.clock = l.guest.SetTime(ctx, time.Now())
	var again *rousal
	if due.clock != nil && !errors.Is(due.clock, sandbox.ErrDenied) && !errors.Is(due.clock, sandbox.ErrUnsupported) {
		m.log.Warn("clock not set", "sandbox", e.name, "err", due.clock)
		again = &rousal{answered: make(chan struct{})} // at the next greeting
	}
	close(due.answered)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.due == due {
		l.due = again
	}
}

// tend keeps in touch with the guest of the present life until that ends: it
// learns which guestd it is, what listens inside, and whether it answers.
func (m *Manager) tend(e *entry, l *link) {
	ctx := l.ctx
	var silentSince time.Time
	for pause := firstCall; ctx.Err() == nil; {
		began := time.Now()
		heard, err := m.listen(e, l)
		switch {
		case ctx.Err() != nil || errors.Is(err, errStranger):
			return
		case heard:
			m.unreachable(ctx, e, nil)
			silentSince = time.Time{}
		case silentSince.IsZero():
			silentSince = began
		}
		if !silentSince.IsZero() && time.Since(silentSince) > unreachableAfter {
			m.unreachable(ctx, e, err)
		}
		// However soon it hangs up, it is not called all the time.
		if pause = min(2*pause, lastLink); time.Since(began) > lastLink {
			pause = firstCall
		}
		select {
		case <-time.After(pause):
		case <-l.kick:
		case <-ctx.Done():
		}
	}
}

// errStranger is a life that this agent did not start.
var errStranger = errors.New("not the life that this agent started")

// listen greets the guest and sees what listens inside until the connection
// ends, or it is time to greet it again: one that hangs does not hang up. heard
// says whether it answered.
func (m *Manager) listen(e *entry, l *link) (heard bool, err error) {
	ctx := l.ctx
	info, err := l.guest.Hello(ctx)
	if err != nil {
		return false, err
	}
	if info.Phase == guest.PhaseWaiting || info.Generation != l.generation && info.Phase == guest.PhaseRunning {
		return true, m.estranged(ctx, e, l.generation)
	}
	m.catchUp(e, l)
	m.unreachable(ctx, e, nil)
	if e.snap.Load().GuestdVersion != info.Version {
		m.whileOpen(ctx, e, func() { m.see(e, func(s *Sandbox) { s.GuestdVersion = info.Version }) })
	}
	again := time.NewTimer(linkCheck)
	defer again.Stop()
	if e.snap.Load().Spec.AutoForward.Mode != sandbox.AutoForwardOff {
		heard, err = m.watchPorts(e, l, again.C)
		if !errors.Is(err, sandbox.ErrUnsupported) {
			return heard, err
		}
		// An older guestd. It goes without.
	}
	select {
	case <-again.C:
	case <-l.kick:
	case <-ctx.Done():
	}
	return true, ctx.Err()
}

// watchPorts sees what listens inside until the guest hangs up, or it is time
// to greet it again. Then the connection is asked for a last sign of life. One
// over which none comes while the guest answers over a new one is dead, and
// with it what went over that channel before: nobody says so of vsock.
func (m *Manager) watchPorts(e *entry, l *link, again <-chan time.Time) (heard bool, err error) {
	ctx, cancel := context.WithCancel(l.ctx)
	leaving, leave := context.WithCancel(ctx)
	ended := make(chan error, 1)
	var waits atomic.Bool // for the guest, which has spoken, and for nobody else
	var watching sync.WaitGroup
	defer func() {
		cancel()
		leave()
		watching.Wait()
	}()
	watching.Go(func() {
		ended <- l.guest.WatchPorts(ctx, leaving, func(listeners []guest.Listener) {
			waits.Store(false)
			m.whileOpen(ctx, e, func() { m.seeListeners(e, listeners) })
			waits.Store(true)
		})
	})
	within := func(limit <-chan time.Time, kick <-chan struct{}) (over bool) {
		select {
		case err = <-ended:
			return true
		case <-limit:
		case <-kick:
		}
		return false
	}
	if within(again, l.kick) {
		return true, err
	}
	before := m.traffic(e)
	leave()
	if within(time.After(lastWord), nil) {
		return true, err
	}
	if _, err := l.guest.Hello(ctx); err != nil {
		return false, err
	}
	m.catchUp(e, l)
	if !within(time.After(m.farewell), nil) && waits.Load() {
		m.log.Warn("the guest channel was cut off", "sandbox", e.name, "connections_closed", before.reset())
	}
	return true, err
}

// whileOpen does something under the operation lock, unless ctx ends first.
func (m *Manager) whileOpen(ctx context.Context, e *entry, work func()) {
	if e.lock(ctx) != nil {
		return
	}
	defer e.unlock()
	if ctx.Err() == nil {
		work()
	}
}

// estranged finds that what runs was not started by this agent: somebody
// restarted it, and it waits to be configured. It gets a new boot.
func (m *Manager) estranged(ctx context.Context, e *entry, generation uint64) error {
	m.whileOpen(ctx, e, func() {
		if e.rec.Generation == generation && e.rec.Desired == store.DesiredRunning && e.rec.Pending == store.PendingNone {
			m.renew(e)
		}
	})
	return errStranger
}

// unreachable shows whether guestd answers.
func (m *Manager) unreachable(ctx context.Context, e *entry, cause error) {
	const reason = "GUEST_UNREACHABLE"
	s := e.snap.Load()
	if (s.Reason == reason) == (cause != nil) {
		return
	}
	m.whileOpen(ctx, e, func() {
		if e.snap.Load().Phase != PhaseReady {
			return
		}
		if cause != nil {
			m.log.Warn("guest does not answer", "sandbox", e.name, "err", cause)
			m.see(e, func(s *Sandbox) { s.Reason, s.Message = reason, cause.Error() })
			return
		}
		m.see(e, func(s *Sandbox) { s.Reason, s.Message = "", "" })
	})
}
