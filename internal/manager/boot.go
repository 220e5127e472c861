package manager

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/store"
)

// freshStart is how long a life must have been for the next restart to count
// as the first again.
const freshStart = 10 * time.Minute

// retryPause is what a caller is told to wait when the host is full.
const retryPause = 30 * time.Second

// errRestarting is why a restart ends a boot; who waited for that boot waits
// for the next.
var errRestarting = fmt.Errorf("restart: %w", sandbox.ErrSuperseded)

// Ensure returns once the sandbox is ready. If it is, that takes no lock and
// no I/O. If there is none, create makes it; nil: ErrNotFound.
func (m *Manager) Ensure(ctx context.Context, name string, create *CreateRequest) (*Sandbox, error) {
	for {
		s, err := m.Start(ctx, name)
		if create == nil || !errors.Is(err, sandbox.ErrNotFound) {
			return s, err
		}
		req := *create
		req.Name, req.Start, req.ValidateOnly = name, true, false
		s, err = m.Create(ctx, req)
		if !errors.Is(err, sandbox.ErrExists) {
			return s, err
		}
	}
}

// Start boots a sandbox and returns once it is ready. All concurrent callers
// share one boot, which none of them ends by leaving.
func (m *Manager) Start(ctx context.Context, name string) (*Sandbox, error) {
	e, err := m.find(name)
	if err != nil {
		return nil, err
	}
	e.touch(time.Now())
	for {
		if e.snap.Load().isReady() {
			return e.view(), nil
		}
		if s := e.snap.Load(); !s.isPaused() { // to let it go on is no boot
			if err := m.mayBoot(name); err != nil {
				return nil, err
			}
		}
		f, _ := m.fly(e, func(ctx context.Context) error { return m.boot(ctx, e, byRequest) })
		select {
		case <-f.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		switch {
		case errors.Is(f.err, errRestarting):
			continue
		case f.err != nil:
			return nil, f.err
		}
		if s := e.snap.Load(); s == nil {
			return nil, fmt.Errorf("sandbox %s: %w", name, sandbox.ErrNotFound)
		}
		return e.view(), nil
	}
}

func (s *Sandbox) isReady() bool { return s != nil && s.Phase == PhaseReady }

// mayBoot refuses while the host is draining.
func (m *Manager) mayBoot(name string) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.draining {
		return &sandbox.RetryError{Err: fmt.Errorf("start %s: %w", name, sandbox.ErrDraining), After: retryPause}
	}
	return nil
}

// origin says who wants a boot.
type origin int

const (
	// byRequest: a caller waits for it; if it fails it is given up.
	byRequest origin = iota
	// byItself: the restart policy, or an intent found after a restart; if it
	// fails for want of something, it is tried again.
	byItself
)

// boot makes a sandbox run and become ready, from whatever state it is in. It
// needs the operation lock.
func (m *Manager) boot(ctx context.Context, e *entry, from origin) error {
	switch s := e.snap.Load(); {
	case s.isReady():
		return nil
	case s.isPaused():
		return m.resume(ctx, e)
	}
	if e.rec.Desired == store.DesiredDeleted {
		return fmt.Errorf("start %s: it is being deleted: %w", e.name, sandbox.ErrState)
	}
	if from == byRequest {
		e.retries = 0
	}
	drv, err := m.driver(e.rec.Spec.Driver)
	if err != nil {
		return err
	}
	seen := m.look(ctx, e.rec.Spec.Mounts) // while the rest is prepared
	defer seen()
	obs := sandbox.Observation{State: sandbox.StateCreated}
	if !e.made {
		if obs, err = m.inspect(ctx, drv, e); err != nil {
			return m.bootFailed(ctx, drv, e, from, refused(err))
		}
	}
	e.made = false
	if err := m.settleEgress(ctx, drv, e, obs); err != nil {
		return m.bootFailed(ctx, drv, e, from, refused(err))
	}
	set, err := m.resolve(ctx, e)
	if err != nil {
		return m.bootFailed(ctx, drv, e, from, refused(err))
	}
	defer set.Wipe()
	m.noteExposures(e, seen())
	if obs.Paused { // by somebody else, before it was ready
		if _, err := m.letGo(ctx, e); err != nil {
			return m.bootFailed(ctx, drv, e, from, err)
		}
	}
	if obs.State != sandbox.StateRunning {
		if obs, err = m.launch(ctx, drv, e, obs); err != nil {
			return m.bootFailed(ctx, drv, e, from, err)
		}
	}
	e.admitted.Store(true)
	if e.rec.Pending != store.PendingBoot {
		// Somebody started it, and no boot of this agent's has the number of
		// that life.
		if err := m.newLife(e); err != nil {
			return err
		}
	}
	err = m.awaitReady(ctx, drv, e, secretValues(set))
	if errors.Is(err, errStale) {
		obs, err = m.afresh(ctx, drv, e, secretValues(set))
	}
	if err != nil {
		return m.bootFailed(ctx, drv, e, from, err)
	}
	e.noteGiven(e.rec.Spec, set)
	m.step("boot:done")
	err = m.put(e, func(r *store.Record) {
		r.Desired, r.Pending, r.Paused, r.Hibernated = store.DesiredRunning, store.PendingNone, false, false
	}, m.becomeReady(e, obs))
	if err != nil {
		// It runs and its intent is on disk as a boot under way: the next
		// start of the agent finds it so and adopts it.
		m.log.Error("record not written", "sandbox", e.name, "err", err)
		m.see(e, m.becomeReady(e, obs))
	}
	m.log.Info("ready", "sandbox", e.name, "generation", e.rec.Generation)
	m.guard(drv, e)
	return nil
}

func (m *Manager) becomeReady(e *entry, obs sandbox.Observation) func(*Sandbox) {
	e.trouble = 0
	now := time.Now()
	e.touch(now)
	return func(s *Sandbox) {
		enter(PhaseReady, "", "")(s)
		s.StartedAt, s.ReadyAt, s.Exit = obs.StartedAt, now, nil
		s.RestartCount = e.retries
	}
}

// see publishes an observation alone.
func (m *Manager) see(e *entry, change func(*Sandbox)) { m.publish(e, change) }

func (m *Manager) inspect(ctx context.Context, drv sandbox.Driver, e *entry) (sandbox.Observation, error) {
	ctx, cancel := context.WithTimeout(ctx, inspectDeadline)
	defer cancel()
	obs, err := drv.Inspect(ctx, m.ref(e.name))
	return obs, deadlined(ctx, err)
}

// launch takes a sandbox that does not run to one that does: admission, turn,
// intent, action.
func (m *Manager) launch(ctx context.Context, drv sandbox.Driver, e *entry, obs sandbox.Observation) (sandbox.Observation, error) {
	resources, err := m.resources(e.rec.Spec)
	if err != nil {
		return obs, refused(err)
	}
	if err := m.checkMounts(e.rec.Spec.Mounts); err != nil {
		return obs, refused(err)
	}
	m.see(e, enter(PhaseStarting, "", ""))
	release, err := m.slots.acquire(ctx, func() {
		m.see(e, enter(PhaseStarting, "QUEUED", "waiting for other boots to finish"))
	})
	if err != nil {
		return obs, err
	}
	defer release()
	if err := m.admit(e); err != nil {
		return obs, refused(err)
	}
	before := e.rec.Resources
	m.step("boot:intent")
	err = m.put(e, func(r *store.Record) {
		r.Desired, r.Pending, r.HostBoot = store.DesiredRunning, store.PendingBoot, m.hostBoot
		r.Generation++
		r.Reason, r.Failure, r.Resources, r.Paused = "", "", resources, false
	}, enter(PhaseStarting, "", ""))
	if err != nil {
		return obs, refused(err)
	}
	m.log.Info("starting", "sandbox", e.name, "generation", e.rec.Generation)
	if err := m.prepare(ctx, drv, e, obs.State, before); err != nil {
		return obs, err
	}
	m.step("boot:launch")
	started, cancel := context.WithTimeout(ctx, startDeadline)
	defer cancel()
	if err := drv.Start(started, m.ref(e.name)); err != nil {
		return obs, deadlined(started, err)
	}
	m.step("boot:launched")
	if seen, err := m.inspect(ctx, drv, e); err == nil && !seen.StartedAt.IsZero() {
		return seen, nil // for when it started; that it ended, the guard tells
	}
	return sandbox.Observation{State: sandbox.StateRunning, StartedAt: time.Now()}, nil
}

// prepare brings the artefacts in line with the record: made if somebody
// removed them, made anew if they are broken, resized if the class changed.
func (m *Manager) prepare(ctx context.Context, drv sandbox.Driver, e *entry, state sandbox.State, before sandbox.Resources) error {
	switch state {
	case sandbox.StateBroken:
		ctx, cancel := context.WithTimeout(ctx, deleteDeadline)
		defer cancel()
		if err := drv.Delete(ctx, m.ref(e.name)); err != nil {
			return deadlined(ctx, err)
		}
		return m.makeArtefacts(ctx, e)
	case sandbox.StateAbsent:
		return m.makeArtefacts(ctx, e)
	}
	if e.rec.Resources == before {
		return nil
	}
	resizer, ok := drv.(sandbox.Resizer)
	if !ok {
		return sandbox.Unsupportedf("spec.machine_class", "its resources changed, and driver %s cannot change a sandbox's; make it anew", e.rec.Spec.Driver)
	}
	ctx, cancel := context.WithTimeout(ctx, createDeadline)
	defer cancel()
	return deadlined(ctx, resizer.Resize(ctx, m.ref(e.name), e.rec.Resources))
}

// endedError is a workload that ended before it was ready.
type endedError struct{ obs sandbox.Observation }

func (e *endedError) Error() string {
	text := "the workload ended before it was ready, with status " + exitText(e.obs)
	if e.obs.Detail != "" {
		text += ": " + e.obs.Detail
	}
	return text
}

func (e *endedError) Unwrap() error { return sandbox.ErrEnded }

func exitText(obs sandbox.Observation) string {
	if obs.OOMKilled {
		return fmt.Sprintf("%d (out of memory)", obs.ExitCode)
	}
	return fmt.Sprint(obs.ExitCode)
}

// refusedError is a boot that was refused before anything was touched.
type refusedError struct{ error }

func (e refusedError) Unwrap() error { return e.error }

func refused(err error) error { return refusedError{err} }

// bootFailed leaves a sandbox whose boot failed in a clear state and returns
// the error for the caller.
func (m *Manager) bootFailed(ctx context.Context, drv sandbox.Driver, e *entry, from origin, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		// Superseded, or the agent stops: who ended it deals with the rest.
		return fmt.Errorf("start %s: %w", e.name, cause)
	}
	early, wasRefused := errors.AsType[refusedError](err)
	if wasRefused {
		err = fmt.Errorf("start %s: %w", e.name, early.error)
	}
	wasMeantToRun := e.rec.Desired == store.DesiredRunning && e.rec.Pending == store.PendingNone
	if passes(err) && (from == byItself || wasRefused && wasMeantToRun) {
		m.bootAgainLater(e, err)
		return err
	}
	if wasRefused {
		m.refuse(e, err)
		return err
	}
	m.log.Warn("boot failed", "sandbox", e.name, "generation", e.rec.Generation, "err", err)
	if ended, ok := errors.AsType[*endedError](err); ok {
		m.ended(e, ended.obs)
		return fmt.Errorf("start %s: %w", e.name, err)
	}
	if errors.Is(err, sandbox.ErrNotReady) && e.rec.Spec.Restart.Applies(1, e.retries) {
		return errors.Join(err, m.stopFailed(ctx, drv, e, err, true))
	}
	return errors.Join(err, m.stopFailed(ctx, drv, e, err, false))
}

// bootAgainLater keeps the intent of a boot that failed for want of something
// that may come back.
func (m *Manager) bootAgainLater(e *entry, cause error) {
	e.admitted.Store(false)
	waiting := enter(PhaseBackoff, sandbox.FailureOf(cause).Reason, cause.Error())
	err := m.put(e, func(r *store.Record) {
		if r.Pending == store.PendingNone {
			r.Pending = store.PendingBoot
		}
	}, waiting)
	if err != nil {
		m.see(e, waiting)
	}
	m.retryLater(e)
}

// passes reports whether an error may be gone the next time.
func passes(err error) bool {
	for _, sentinel := range []error{sandbox.ErrUnavailable, sandbox.ErrExhausted, sandbox.ErrDraining, sandbox.ErrTimeout} {
		if errors.Is(err, sentinel) {
			return true
		}
	}
	return false
}

// refuse puts the phase back to what it was before a boot that was refused:
// whatever the record and the last exit say.
func (m *Manager) refuse(e *entry, err error) {
	m.settle(e)
	if e.rec.Pending != store.PendingNone || e.rec.Desired == store.DesiredRunning {
		// A create with start, or a restart, also by policy, that got no further.
		putErr := m.put(e, func(r *store.Record) {
			r.Desired, r.Pending, r.Failure = store.DesiredStopped, store.PendingNone, err.Error()
		}, enter(PhaseFailed, "REFUSED", err.Error()))
		if putErr != nil {
			m.log.Error("record not written", "sandbox", e.name, "err", putErr)
		}
	}
}

// settle shows a sandbox that does not run as what its record says.
func (m *Manager) settle(e *entry) {
	e.admitted.Store(false)
	phase, reason := PhaseStopped, e.rec.Reason
	switch {
	case e.rec.Failure != "":
		phase = PhaseFailed
	case e.rec.Hibernated:
		phase = PhaseHibernated
	}
	m.see(e, enter(phase, reason, e.rec.Failure))
}

// stopFailed stops what a failed boot left running, and gives up or, if again
// is set, tries again by the restart policy.
func (m *Manager) stopFailed(ctx context.Context, drv sandbox.Driver, e *entry, cause error, again bool) error {
	reason := sandbox.FailureOf(cause).Reason
	err := m.put(e, func(r *store.Record) {
		r.Pending, r.Grace, r.Reason, r.Failure = store.PendingStop, rollbackGrace, reason, cause.Error()
		r.Hibernated = false
		if !again {
			r.Desired = store.DesiredStopped
		}
	}, enter(PhaseStopping, reason, cause.Error()))
	if err != nil {
		return err
	}
	if err := m.halt(ctx, drv, e); err != nil {
		return fmt.Errorf("stop it after that: %w", err)
	}
	if again {
		// The record goes on saying "stop, then run", which is what a new
		// agent would have to do.
		m.backoff(e, cause.Error())
		return nil
	}
	return m.stopped(e)
}
