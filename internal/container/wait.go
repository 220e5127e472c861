package container

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containers/podman/v5/libpod/define"
	"github.com/containers/podman/v5/pkg/bindings/system"
	"github.com/containers/podman/v5/pkg/domain/entities/types"

	"github.com/choiros/agent/internal/sandbox"
)

const (
	// streamLinger is for how long the stream of events is kept when nobody
	// waits any more: somebody often does again.
	streamLinger = 5 * time.Second
	// reviewInterval is how often all that are waited for are looked at,
	// whatever the events say. Podman's events can be turned off, rotated
	// away, or never written when it is killed.
	reviewInterval = time.Minute
	// blindInterval is the same while there is no stream.
	blindInterval = 5 * time.Second
	// eventOverlap is how far a stream begins in the past. A log file is read
	// from where it ends a moment after Podman has answered, so that an event
	// written meanwhile would be lost.
	eventOverlap = 10 * time.Second
	// inspectsAtOnce bounds how many waits look at their sandbox at a time.
	inspectsAtOnce = 8
)

var errClosed = fmt.Errorf("%w: the driver was closed", sandbox.ErrUnavailable)

// endWatcher tells waits when to look whether their sandbox has ended. One
// stream of events serves all; it runs while somebody waits.
type endWatcher struct {
	driver *Driver
	looks  chan struct{} // a token for each look under way
	closed chan struct{}

	mu      sync.Mutex
	waits   map[string]map[chan struct{}]struct{} // by sandbox
	total   int
	stop    context.CancelFunc // ends the stream; nil: there is none
	done    chan struct{}      // closed once it has ended
	idle    *time.Timer
	isEnded bool
}

func (w *endWatcher) init(d *Driver) {
	w.driver = d
	w.looks = make(chan struct{}, inspectsAtOnce)
	w.closed = make(chan struct{})
	w.waits = map[string]map[chan struct{}]struct{}{}
}

// close ends the stream and all waits.
func (w *endWatcher) close() {
	w.mu.Lock()
	if !w.isEnded {
		w.isEnded = true
		close(w.closed)
	}
	done := w.halt()
	w.mu.Unlock()
	if done != nil {
		<-done
	}
}

// halt begins to end the stream and returns what is closed when it has. The
// caller holds mu.
func (w *endWatcher) halt() (done chan struct{}) {
	if w.idle != nil {
		w.idle.Stop()
		w.idle = nil
	}
	if w.stop == nil {
		return nil
	}
	w.stop()
	w.stop = nil
	return w.done
}

// join registers a wait. wake gets a value when it is time to look.
func (w *endWatcher) join(id string) (wake chan struct{}, leave func()) {
	wake = make(chan struct{}, 1)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.waits[id] == nil {
		w.waits[id] = map[chan struct{}]struct{}{}
	}
	w.waits[id][wake] = struct{}{}
	w.total++
	if w.idle != nil {
		w.idle.Stop()
		w.idle = nil
	}
	if w.stop == nil && !w.isEnded {
		ctx, cancel := context.WithCancel(context.Background())
		before := w.done // an earlier stream may still be ending
		w.stop, w.done = cancel, make(chan struct{})
		go w.run(ctx, before, w.done)
	}
	return wake, func() { w.leave(id, wake) }
}

func (w *endWatcher) leave(id string, wake chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.waits[id], wake)
	if len(w.waits[id]) == 0 {
		delete(w.waits, id)
	}
	w.total--
	if w.total == 0 && w.stop != nil {
		w.idle = time.AfterFunc(streamLinger, w.expire)
	}
}

// expire ends the stream if nobody has come to wait.
func (w *endWatcher) expire() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.total == 0 {
		w.halt()
	}
}

// wake tells the waits for a sandbox to look.
func (w *endWatcher) wake(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for wait := range w.waits[id] {
		select {
		case wait <- struct{}{}:
		default: // it has been told
		}
	}
}

// run follows Podman's events, connecting again when the stream ends, until
// ctx does.
func (w *endWatcher) run(ctx context.Context, before, done chan struct{}) {
	defer close(done)
	if before != nil {
		<-before
	}
	reviews := make(chan struct{})
	go func() {
		defer close(reviews)
		w.reviewAtIntervals(ctx)
	}()
	const first, most = 100 * time.Millisecond, 5 * time.Second
	backoff := first
	since := time.Now()
	for ctx.Err() == nil {
		begun := time.Now()
		connected := w.follow(ctx, since.Add(-eventOverlap))
		if connected {
			backoff = first
			since = begun
		}
		// Whether or not it was a restart: it may take another moment.
		if pause(ctx, backoff) != nil {
			break
		}
		backoff = min(2*backoff, most)
		w.review(ctx)
	}
	<-reviews
}

// follow reads one stream of events to its end and reports whether it began.
func (w *endWatcher) follow(ctx context.Context, since time.Time) (connected bool) {
	d := w.driver
	c, err := d.connect(ctx)
	if err != nil {
		return false
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Only the answer has a deadline. The stream has none.
	answer := time.AfterFunc(readLimit, cancel)
	failed := new(failure)
	events := make(chan types.Event)
	err = system.Events(callContext{Context: ctx, values: c.values, failed: failed}, events, nil,
		new(system.EventsOptions).WithStream(true).WithSince(since.UTC().Format(time.RFC3339Nano)).
			WithFilters(map[string][]string{
				"type":  {"container"},
				"label": {labelOwner + "=" + d.cfg.Owner},
				"event": {"died", "remove"},
			}))
	answer.Stop()
	if err != nil {
		if failed.err != nil {
			d.conn.CompareAndSwap(c, nil)
		}
		return false
	}
	// The bindings close the channel when the stream ends, and block for ever
	// on what nobody receives.
	for event := range events {
		attributes := event.Actor.Attributes
		if id, _, ok := d.ours(attributes["name"], attributes); ok {
			w.wake(id)
		}
	}
	return true
}

// reviewAtIntervals is for what the events do not tell.
func (w *endWatcher) reviewAtIntervals(ctx context.Context) {
	interval := reviewInterval
	if facts := w.driver.host.Load(); facts != nil && facts.noEvents {
		interval = blindInterval
	}
	for pause(ctx, interval) == nil {
		w.review(ctx)
	}
}

// review wakes the waits for all sandboxes that do not run.
func (w *endWatcher) review(ctx context.Context) {
	w.mu.Lock()
	total := w.total
	w.mu.Unlock()
	if total == 0 {
		return
	}
	found, err := w.driver.artefacts(ctx, "")
	if err != nil {
		return // it is tried again, and the stream's end says the same
	}
	conn := w.driver.conn.Load()
	running := map[string]bool{}
	for _, a := range found {
		if conn != nil && conn.sees && isGone(a.pid) {
			continue // see Driver.isAbandoned
		}
		if a.whole && (a.state == define.ContainerStateRunning.String() || a.state == define.ContainerStateStopping.String()) {
			running[a.sandboxID] = true
		}
	}
	w.mu.Lock()
	var ids []string
	for id := range w.waits {
		if !running[id] {
			ids = append(ids, id)
		}
	}
	w.mu.Unlock()
	for _, id := range ids {
		w.wake(id)
	}
}

// Wait implements sandbox.Driver.
func (d *Driver) Wait(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
	o, err := d.wait(ctx, ref.ID)
	return withOOM(ref, o), op("wait for", ref.ID, err)
}

func (d *Driver) wait(ctx context.Context, id string) (sandbox.Observation, error) {
	// Registered before the first look: what happens after it is told.
	wake, leave := d.ends.join(id)
	defer leave()
	o, err := d.look(ctx, id)
	backoff := 100 * time.Millisecond
	for first := true; ; first = false {
		switch {
		case err == nil && o.State != sandbox.StateRunning:
			return o, nil
		case err != nil && (first || !errors.Is(err, sandbox.ErrUnavailable)):
			return sandbox.Observation{}, err
		case err != nil:
			// Podman is being restarted. It will have the answer.
			if err := pause(ctx, backoff); err != nil {
				return sandbox.Observation{}, err
			}
			backoff = min(2*backoff, 5*time.Second)
		default:
			select {
			case <-wake:
			case <-d.ends.closed:
				return sandbox.Observation{}, errClosed
			case <-ctx.Done():
				return sandbox.Observation{}, ctx.Err()
			}
		}
		select {
		case <-d.ends.closed:
			return sandbox.Observation{}, errClosed
		default:
		}
		o, err = d.look(ctx, id)
	}
}

// look is Inspect, for a few at a time.
func (d *Driver) look(ctx context.Context, id string) (sandbox.Observation, error) {
	select {
	case d.ends.looks <- struct{}{}:
	case <-ctx.Done():
		return sandbox.Observation{}, ctx.Err()
	}
	defer func() { <-d.ends.looks }()
	return d.observe(ctx, id)
}
