package manager

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/store"
)

// entry is one sandbox in memory.
type entry struct {
	name string
	// op is the operation lock: full while held. Waiters are served in turn.
	op chan struct{}
	// reconciled is closed once the sandbox was compared with the host, or was
	// made by this process.
	reconciled chan struct{}
	// snap is what callers see; nil while there is nothing to see.
	snap atomic.Pointer[Sandbox]
	// final is the last snap of a sandbox that is gone.
	final atomic.Pointer[Sandbox]
	// activity was last seen then, by the clock that the host's sleep halts too:
	// nobody is idle in his sleep, nor when the wall clock is set.
	activity atomic.Pointer[time.Time]
	// holds are the connections and calls that keep it from being idle.
	holds atomic.Int64
	// spares are those of the present life, or of one that is past.
	spares atomic.Pointer[spares]
	// link is to the guest of the present life, or of one that is past; nil:
	// there was none yet.
	link atomic.Pointer[link]
	// admitted is true while the sandbox counts as one that runs.
	admitted atomic.Bool

	visiting sync.Mutex
	visits   map[*Visit]struct{}

	// Guarded by op.
	rec       store.Record
	gone      bool       // removed from the map for good
	made      bool       // this process made its artefacts and has not started them
	retries   uint32     // restarts in a row by policy
	trouble   uint32     // failures in a row to reach the intent
	exposures []Exposure // as seen last
	// stopGuard ends the watch over the present life; nil: there is none.
	stopGuard context.CancelFunc

	mu     sync.Mutex
	given  given
	flight *flight            // the boot under way
	alarm  context.CancelFunc // ends the timer that is set, if any
	ending *ending            // the driver's Stop under way, if any
	// awaited are those who wait for the lock to stop it, with the latest time
	// that each would let the workload live until.
	awaited map[*time.Time]struct{}
}

// newEntry returns an entry whose operation lock is held.
func newEntry(name string) *entry {
	e := &entry{
		name: name, op: make(chan struct{}, 1), reconciled: make(chan struct{}), awaited: map[*time.Time]struct{}{},
		visits: map[*Visit]struct{}{},
	}
	e.op <- struct{}{}
	return e
}

// lock takes the operation lock. If the sandbox has gone meanwhile it returns
// an error that wraps sandbox.ErrNotFound.
func (e *entry) lock(ctx context.Context) error {
	select {
	case e.op <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if e.gone {
		e.unlock()
		return fmt.Errorf("sandbox %s: %w", e.name, sandbox.ErrNotFound)
	}
	return nil
}

func (e *entry) unlock() { <-e.op }

func (e *entry) touch(at time.Time) { e.activity.Store(&at) }

// lastActivity is now while anybody holds the sandbox.
func (e *entry) lastActivity() time.Time {
	if e.holds.Load() > 0 {
		return time.Now()
	}
	if at := e.activity.Load(); at != nil {
		return *at
	}
	return time.Time{}
}

// view returns the sandbox as it is now, the caller's to keep.
func (e *entry) view() *Sandbox {
	last := e.snap.Load()
	if last == nil {
		last = e.final.Load() // gone since it was looked up
	}
	view := *last
	view.LastActivityAt = e.lastActivity()
	return &view
}

// put changes the record durably and then, in the same step for callers, what
// is seen of it. Both functions may be nil. It needs the operation lock.
func (m *Manager) put(e *entry, change func(*store.Record), see func(*Sandbox)) error {
	rec := e.rec
	if change != nil {
		change(&rec)
	}
	if err := m.store.Put(rec); err != nil {
		return fmt.Errorf("%w: %w", sandbox.ErrExhausted, err)
	}
	e.rec = rec
	m.publish(e, see)
	return nil
}

// publish shows callers a new state of a sandbox: what its record says, and
// what see changes of the last observation.
func (m *Manager) publish(e *entry, see func(*Sandbox)) {
	m.feed.add(e, func(s *Sandbox) {
		rec := e.rec
		s.Name, s.UID, s.Spec, s.Labels = rec.Name, rec.UID, rec.Spec, rec.Labels
		s.Desired, s.Generation, s.Resources = Desired(rec.Desired), rec.Generation, rec.Resources
		s.Endpoints = nil
		for _, l := range rec.Leases {
			s.Endpoints = append(s.Endpoints, endpointOf(l))
		}
		s.Exposures = e.exposures
		s.CreatedAt, s.UpdatedAt, s.created = rec.CreatedAt, rec.UpdatedAt, rec.Created
		if see != nil {
			see(s)
		}
	})
}

// enter is a change of phase.
func enter(phase Phase, reason, message string) func(*Sandbox) {
	return func(s *Sandbox) {
		s.Phase, s.Reason, s.Message = phase, reason, message
		s.NextRestartAt = time.Time{}
		if phase != PhaseReady && phase != PhasePaused {
			s.ReadyAt = time.Time{}
			s.GuestdVersion, s.Detected = "", nil
		}
	}
}

// observed is what a driver's observation changes.
func observed(s *Sandbox, obs sandbox.Observation) {
	if !obs.StartedAt.IsZero() {
		s.StartedAt = obs.StartedAt
	}
	if obs.State == sandbox.StateExited && !obs.Saved {
		s.Exit = &Exit{Code: obs.ExitCode, At: obs.FinishedAt, OOMKilled: obs.OOMKilled}
	}
}

// flight is one boot, shared by all who wait for it.
type flight struct {
	cancel context.CancelCauseFunc
	done   chan struct{} // closed once err is set
	err    error
}

// fly begins a flight, or returns the one under way. work runs with the
// operation lock held.
func (m *Manager) fly(e *entry, work func(ctx context.Context) error) (f *flight, began bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.flight != nil {
		return e.flight, false
	}
	ctx, cancel := context.WithCancelCause(m.life)
	f = &flight{cancel: cancel, done: make(chan struct{})}
	e.flight = f
	e.disarm()
	m.work.Go(func() {
		defer cancel(nil)
		err := e.lock(ctx)
		if err == nil {
			err = work(ctx)
			// Off before the lock is free: whoever takes it next and wants a
			// boot begins one of its own.
			e.land(f, err)
			e.unlock()
			return
		}
		e.land(f, err)
	})
	return f, true
}

func (e *entry) land(f *flight, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f.err = err
	if e.flight == f {
		e.flight = nil
	}
	close(f.done)
}

// interrupt ends a boot that is under way and a timer that is set, because
// something else was asked for.
func (e *entry) interrupt(cause error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.flight != nil {
		e.flight.cancel(cause)
	}
	e.disarm()
}

// disarm ends the timer. It needs e.mu.
func (e *entry) disarm() {
	if e.alarm != nil {
		e.alarm()
		e.alarm = nil
	}
}

// after calls act once the pause is over, unless the entry is interrupted or
// another timer is set first.
func (m *Manager) after(e *entry, pause time.Duration, act func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.disarm()
	ctx, cancel := context.WithTimeout(m.life, pause)
	e.alarm = cancel
	m.work.Go(func() {
		defer cancel()
		<-ctx.Done()
		if ctx.Err() == context.DeadlineExceeded && m.life.Err() == nil {
			act()
		}
	})
}
