package manager

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/choiros/agent/internal/sandbox"
)

// backlog is how many changes are kept for those who resume or read slowly.
// Who needs an older one is told to start afresh.
const backlog = 4096

// Version orders the changes of one run of the agent. The zero Version is
// before them all.
type Version struct {
	Epoch string // of the run
	Seq   uint64
}

// String is the form that clients see; opaque to them.
func (v Version) String() string {
	if v == (Version{}) {
		return ""
	}
	return v.Epoch + "." + strconv.FormatUint(v.Seq, 10)
}

// ParseVersion reads what String wrote.
func ParseVersion(s string) (Version, error) {
	if s == "" {
		return Version{}, nil
	}
	epoch, digits, _ := strings.Cut(s, ".")
	seq, err := strconv.ParseUint(digits, 10, 64)
	if err != nil || epoch == "" || len(s) > 64 {
		return Version{}, sandbox.Invalidf("resume_version", "is not a version that this agent hands out")
	}
	return Version{Epoch: epoch, Seq: seq}, nil
}

// WatchOptions selects what is watched.
type WatchOptions struct {
	Selector Selector
	Name     string  // empty: all
	Resume   Version // zero: from the start
}

// Event is one step of a Watch: exactly one of the first four is set.
type Event struct {
	Changed *Sandbox
	Deleted *Sandbox
	Sync    bool
	Reset   bool
	// Version to resume after; zero where resuming would lose something.
	Version Version
}

// feed is the sequence of all changes. Readers keep their own place in it, so
// a slow one costs nothing and holds nobody up.
type feed struct {
	epoch string

	mu      sync.Mutex
	seq     uint64        // of the last change
	changes []change      // the last ones, a ring: seq is at seq%backlog
	moved   chan struct{} // closed at the next change
}

type change struct {
	sandbox *Sandbox
	deleted bool
}

func newFeed() *feed {
	return &feed{epoch: strings.ToLower(rand.Text()[:10]), changes: make([]change, 0, 64), moved: make(chan struct{})}
}

// add gives a sandbox a new state and tells all readers, in one step: no
// reader sees the one without the other.
func (f *feed) add(e *entry, edit func(*Sandbox)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	next := &Sandbox{}
	if old := e.snap.Load(); old != nil {
		*next = *old
	}
	edit(next)
	next.Version = f.append(change{sandbox: next})
	e.snap.Store(next)
}

// remove tells all readers that a sandbox is gone.
func (f *feed) remove(e *entry) {
	f.mu.Lock()
	defer f.mu.Unlock()
	last := *e.snap.Load()
	last.Version = f.append(change{sandbox: &last, deleted: true})
	e.final.Store(&last)
	e.snap.Store(nil)
}

func (f *feed) append(c change) Version {
	f.seq++
	if at := int(f.seq % backlog); at < len(f.changes) {
		f.changes[at] = c
	} else {
		// Position 0 is first filled by change number backlog.
		for len(f.changes) <= at {
			f.changes = append(f.changes, change{})
		}
		f.changes[at] = c
	}
	close(f.moved)
	f.moved = make(chan struct{})
	return Version{f.epoch, f.seq}
}

// since returns the changes after seq, or false if some are no longer kept. If
// there is none yet, moved is closed when there is.
func (f *feed) since(seq uint64) (changes []change, moved <-chan struct{}, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if seq > f.seq || f.seq-seq >= backlog {
		return nil, nil, false
	}
	for ; seq < f.seq; seq++ {
		changes = append(changes, f.changes[(seq+1)%backlog])
	}
	return changes, f.moved, true
}

// Watch calls yield from one goroutine, with the state and then every change,
// until ctx ends or yield fails, and returns that error.
func (m *Manager) Watch(ctx context.Context, opts WatchOptions, yield func(Event) error) error {
	if opts.Name != "" {
		if err := sandbox.ValidateName("name", opts.Name); err != nil {
			return err
		}
	}
	select {
	case <-m.reconciled:
	case <-ctx.Done():
		return ctx.Err()
	}
	w := watcher{m: m, opts: opts, yield: yield}
	if opts.Resume != (Version{}) {
		_, _, kept := m.feed.since(opts.Resume.Seq)
		if opts.Resume.Epoch == m.feed.epoch && kept {
			w.seq = opts.Resume.Seq
			return w.follow(ctx, false)
		}
		if err := yield(Event{Reset: true}); err != nil {
			return err
		}
	}
	if err := w.state(); err != nil {
		return err
	}
	return w.follow(ctx, true)
}

// watcher is one reader's place in the feed.
type watcher struct {
	m     *Manager
	opts  WatchOptions
	yield func(Event) error
	seq   uint64
	// shown are the names the reader has; nil: not known, since it resumed.
	shown map[string]bool
}

// state yields all there is and the marker.
func (w *watcher) state() error {
	w.shown = map[string]bool{}
	f := w.m.feed
	f.mu.Lock()
	w.seq = f.seq
	var all []*Sandbox
	w.m.mu.RLock()
	for _, e := range w.m.entries {
		if snap := e.snap.Load(); snap != nil {
			all = append(all, snap)
		}
	}
	w.m.mu.RUnlock()
	f.mu.Unlock()
	slices.SortFunc(all, func(a, b *Sandbox) int { return cmp.Compare(a.Name, b.Name) })
	for _, s := range all {
		if w.concerns(s) && w.opts.Selector.Matches(s.Labels) {
			w.shown[s.Name] = true
			if err := w.yield(Event{Changed: s}); err != nil {
				return err
			}
		}
	}
	return w.yield(Event{Sync: true, Version: Version{f.epoch, w.seq}})
}

func (w *watcher) concerns(s *Sandbox) bool { return w.opts.Name == "" || w.opts.Name == s.Name }

// follow yields changes for ever. One who resumed gets the marker once it has
// caught up.
func (w *watcher) follow(ctx context.Context, synced bool) error {
	for {
		changes, moved, ok := w.m.feed.since(w.seq)
		if !ok {
			if err := w.yield(Event{Reset: true}); err != nil {
				return err
			}
			if err := w.state(); err != nil {
				return err
			}
			synced = true
			continue
		}
		for _, c := range changes {
			w.seq++
			if err := w.pass(c); err != nil {
				return err
			}
		}
		if !synced {
			synced = true
			if err := w.yield(Event{Sync: true, Version: Version{w.m.feed.epoch, w.seq}}); err != nil {
				return err
			}
		}
		if len(changes) > 0 {
			continue
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		case <-w.m.life.Done():
			return fmt.Errorf("the agent is stopping: %w", sandbox.ErrUnavailable)
		}
	}
}

// pass yields one change as far as it concerns this reader: what does not
// match any more is gone for it.
func (w *watcher) pass(c change) error {
	if !w.concerns(c.sandbox) {
		return nil
	}
	name, version := c.sandbox.Name, Version{w.m.feed.epoch, w.seq}
	if !c.deleted && w.opts.Selector.Matches(c.sandbox.Labels) {
		if w.shown != nil {
			w.shown[name] = true
		}
		return w.yield(Event{Changed: c.sandbox, Version: version})
	}
	if w.shown != nil && !w.shown[name] {
		return nil
	}
	delete(w.shown, name)
	return w.yield(Event{Deleted: c.sandbox, Version: version})
}
