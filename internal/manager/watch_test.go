package manager

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

// mirror is a client's copy of the state, kept by a Watch.
type mirror struct {
	mu      sync.Mutex
	seen    map[string]*Sandbox
	pending map[string]*Sandbox // since a reset; nil: in sync
	last    Version
	resets  int
	syncs   int
}

func (r *mirror) apply(ev Event) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case ev.Reset:
		r.pending = map[string]*Sandbox{}
		r.seen = r.pending
		r.resets++
	case ev.Sync:
		r.syncs++
	case ev.Changed != nil:
		r.seen[ev.Changed.Name] = ev.Changed
	case ev.Deleted != nil:
		delete(r.seen, ev.Deleted.Name)
	default:
		return errors.New("an empty event")
	}
	if ev.Version != (Version{}) {
		r.last = ev.Version
	}
	return nil
}

func (r *mirror) names() map[string]Phase {
	r.mu.Lock()
	defer r.mu.Unlock()
	names := map[string]Phase{}
	for name, s := range r.seen {
		names[name] = s.Phase
	}
	return names
}

// watch follows in the background until the returned stop is called.
func (h *host) watch(r *mirror, opts WatchOptions) (stop func()) {
	h.t.Helper()
	if r.seen == nil {
		r.seen = map[string]*Sandbox{}
	}
	ctx, cancel := context.WithCancel(h.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := h.m.Watch(ctx, opts, r.apply); !errors.Is(err, context.Canceled) && !errors.Is(err, sandbox.ErrUnavailable) {
			h.t.Errorf("Watch: %v", err)
		}
	}()
	return func() { cancel(); <-done }
}

func (h *host) awaitMirror(r *mirror, want map[string]Phase) {
	h.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !maps.Equal(r.names(), want); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			h.t.Fatalf("the mirror is %v; want %v", r.names(), want)
		}
	}
}

func TestWatchTellsTheStateThenEveryChange(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("a", process.Spec("sleep"))
	var r mirror
	stop := h.watch(&r, WatchOptions{})
	defer stop()
	h.awaitMirror(&r, map[string]Phase{"a": PhaseReady})
	h.create("b", process.Spec("sleep"))
	h.awaitMirror(&r, map[string]Phase{"a": PhaseReady, "b": PhaseReady})
	if err := h.m.Delete(t.Context(), "a", 0, false, Request{}); err != nil {
		t.Fatal(err)
	}
	h.awaitMirror(&r, map[string]Phase{"b": PhaseReady})
	if r.syncs != 1 || r.resets != 0 {
		t.Errorf("%d syncs and %d resets; want 1 and 0", r.syncs, r.resets)
	}
}

func TestWatchResumesWithoutLosingAChange(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("a", process.Spec("sleep"))
	var r mirror
	h.watchOnce(&r, map[string]Phase{"a": PhaseReady})
	h.create("b", process.Spec("sleep"))
	if err := h.m.Delete(t.Context(), "a", 0, false, Request{}); err != nil {
		t.Fatal(err)
	}
	stop := h.watch(&r, WatchOptions{Resume: r.last})
	h.awaitMirror(&r, map[string]Phase{"b": PhaseReady})
	stop()
	if r.resets != 0 {
		t.Errorf("%d resets; the change was still kept", r.resets)
	}
	// What is no longer kept, and a version of another run, begin afresh.
	for range backlog {
		h.m.publish(h.entry("b"), nil)
	}
	stop = h.watch(&r, WatchOptions{Resume: r.last})
	h.awaitReset(&r, 1)
	stop()
	h.restart()
	stop = h.watch(&r, WatchOptions{Resume: r.last})
	h.awaitReset(&r, 2)
	h.awaitMirror(&r, map[string]Phase{"b": PhaseReady})
	stop()
}

func (h *host) entry(name string) *entry {
	h.m.mu.RLock()
	defer h.m.mu.RUnlock()
	return h.m.entries[name]
}

func (h *host) watchOnce(r *mirror, want map[string]Phase) {
	h.t.Helper()
	stop := h.watch(r, WatchOptions{})
	defer stop()
	h.awaitMirror(r, want)
}

func (h *host) awaitReset(r *mirror, resets int) {
	h.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		r.mu.Lock()
		got := r.resets
		r.mu.Unlock()
		if got == resets {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%d resets; want %d", got, resets)
		}
	}
}

func TestSlowWatcherIsResetAndEndsUpRight(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("a", process.Spec("sleep"))
	r := mirror{seen: map[string]*Sandbox{}}
	hold, synced := make(chan struct{}), make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	var once sync.Once
	go func() {
		done <- h.m.Watch(ctx, WatchOptions{}, func(ev Event) error {
			err := r.apply(ev)
			if ev.Sync {
				once.Do(func() { close(synced); <-hold })
			}
			return err
		})
	}()
	<-synced
	h.create("b", process.Spec("sleep"))
	for range backlog + 10 {
		h.m.publish(h.entry("a"), nil)
	}
	if err := h.m.Delete(t.Context(), "a", 0, false, Request{}); err != nil {
		t.Fatal(err)
	}
	close(hold)
	h.awaitMirror(&r, map[string]Phase{"b": PhaseReady})
	cancel()
	<-done
	if r.resets != 1 {
		t.Errorf("%d resets; want 1", r.resets)
	}
}

func TestWatchSelects(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	label := func(name, app string) {
		t.Helper()
		_, err := h.m.Create(t.Context(), CreateRequest{Name: name, Spec: process.Spec("sleep"), Labels: map[string]string{"app": app}})
		if err != nil {
			t.Fatal(err)
		}
	}
	label("a", "web")
	label("b", "db")
	sel, err := ParseSelector("app=web")
	if err != nil {
		t.Fatal(err)
	}
	var byLabel, byName mirror
	defer h.watch(&byLabel, WatchOptions{Selector: sel})()
	defer h.watch(&byName, WatchOptions{Name: "c"})()
	h.awaitMirror(&byLabel, map[string]Phase{"a": PhaseStopped})
	relabelled := map[string]string{"app": "db"}
	if _, err := h.m.Update(t.Context(), UpdateRequest{Name: "a", Labels: &relabelled}); err != nil {
		t.Fatal(err)
	}
	h.awaitMirror(&byLabel, map[string]Phase{})
	relabelled["app"] = "web"
	if _, err := h.m.Update(t.Context(), UpdateRequest{Name: "b", Labels: &relabelled}); err != nil {
		t.Fatal(err)
	}
	h.awaitMirror(&byLabel, map[string]Phase{"b": PhaseStopped})
	label("c", "x")
	h.awaitMirror(&byName, map[string]Phase{"c": PhaseStopped})
}

func TestSelector(t *testing.T) {
	t.Parallel()
	labels := map[string]string{"app": "web", "tier": ""}
	for text, want := range map[string]bool{
		"": true, " ": true, "app=web": true, "app==web": true, "app=db": false, "app!=db": true, "app!=web": false,
		"app": true, "!app": false, "none": false, "!none": true, "none!=x": true, "tier=": true, "tier=x": false,
		"app=web,!none": true, "app=web, none": false,
	} {
		sel, err := ParseSelector(text)
		if err != nil || sel.Matches(labels) != want {
			t.Errorf("%q: %v, %v; want %v", text, sel.Matches(labels), err, want)
		}
	}
	for _, text := range []string{",", "=", "!", "a=b,", "a b=c", "a=\x00", "(a)"} {
		if _, err := ParseSelector(text); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q: %v; want a refusal", text, err)
		}
	}
}

func FuzzParseSelector(f *testing.F) {
	for _, s := range []string{"a=b", "!a", "a!=b,c", "", "==", "a=b=c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		sel, err := ParseSelector(text)
		if err != nil && !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q: %v", text, err)
		}
		sel.Matches(map[string]string{"a": "b"})
	})
}

func FuzzParseVersion(f *testing.F) {
	for _, s := range []string{"", "abc.1", "abc.", ".1", "a.b.c", "x.18446744073709551616"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		v, err := ParseVersion(text)
		if err != nil {
			return
		}
		if again, err := ParseVersion(v.String()); err != nil || again != v {
			t.Errorf("%q became %v, %v", text, again, err)
		}
	})
}

func TestListPages(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	for i := range 7 {
		if _, err := h.m.Create(t.Context(), CreateRequest{Name: fmt.Sprint("s", i), Spec: process.Spec("sleep")}); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for after, more := "", true; more; {
		var page []*Sandbox
		var err error
		if page, more, err = h.m.List(t.Context(), Selector{}, after, 3); err != nil {
			t.Fatal(err)
		}
		if len(page) > 3 || len(page) == 0 {
			t.Fatalf("a page of %d", len(page))
		}
		for _, s := range page {
			got = append(got, s.Name)
		}
		after = got[len(got)-1]
	}
	if fmt.Sprint(got) != "[s0 s1 s2 s3 s4 s5 s6]" {
		t.Errorf("pages: %v", got)
	}
}
