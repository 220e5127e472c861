package drivertest

import (
	"context"
	"errors"
	"runtime"
	"runtime/pprof"
	"strconv"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// background makes a call on a driver opened for it, which is closed when the
// test ends. Its context ends then, or when patience does.
func (b *box) background(what string,
	call func(ctx context.Context, d sandbox.Driver) (sandbox.Observation, error),
) <-chan answer[sandbox.Observation] {
	b.t.Helper()
	d := b.s.open(b.t)
	ctx, cancel := context.WithTimeout(b.t.Context(), b.s.Patience)
	done := make(chan struct{})
	b.t.Cleanup(func() {
		cancel()
		select {
		case <-done:
			b.s.close(b.t, d)
		case <-time.After(b.s.soon):
			b.t.Errorf("%s goes on %s after its context ended", what, b.s.soon)
		}
	})
	return async(func() (sandbox.Observation, error) {
		defer close(done)
		return call(ctx, d)
	})
}

func (b *box) waiting() <-chan answer[sandbox.Observation] {
	b.t.Helper()
	return b.background("Wait", func(ctx context.Context, d sandbox.Driver) (sandbox.Observation, error) {
		return d.Wait(ctx, b.ref)
	})
}

func atoi(t *testing.T, text string) int {
	t.Helper()
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func waitOfCreated(t *testing.T, s *suite) {
	b := s.box(t)
	b.create("sleep")
	if o := b.wait(); o.State != sandbox.StateCreated {
		t.Errorf("Wait for one that never ran says %+v, want created", o)
	}
}

func waitOfExited(t *testing.T, s *suite) {
	b := s.box(t)
	b.create("exit", "11", "200ms")
	b.start()
	if o := b.wait(); o.State != sandbox.StateExited || o.ExitCode != 11 {
		t.Errorf("Wait says %+v, want exited with 11", o)
	}
	o := b.exited(11)
	if again := b.wait(); !same(again, o) {
		t.Errorf("a second Wait says %+v, Inspect says %+v", again, o)
	}
}

func waitOfAbsent(t *testing.T, s *suite) {
	b := s.box(t)
	if o := b.wait(); !same(o, sandbox.Observation{State: sandbox.StateAbsent}) {
		t.Errorf("Wait for an absent one says %+v", o)
	}
	b.create("exit", "1")
	b.start()
	b.wait()
	b.delete()
	if o := b.wait(); o.State != sandbox.StateAbsent {
		t.Errorf("Wait for a deleted one says %+v, want absent", o)
	}
}

func waitReturnsAtEnd(t *testing.T, s *suite) {
	b := s.box(t)
	b.sleeper()
	back := b.waiting()
	b.want(sandbox.StateRunning)
	select {
	case a := <-back:
		t.Fatalf("Wait returned %+v, %v while it runs", a.value, a.err)
	default:
	}
	b.stop(long)
	a := within(t, s.Patience, back, "Wait")
	if o := b.exited(0); a.err != nil || !same(a.value, o) {
		t.Errorf("Wait says %+v, %v; Inspect says %+v", a.value, a.err, o)
	}
}

func waitOfDeleted(t *testing.T, s *suite) {
	b := s.box(t)
	b.sleeper()
	back := b.waiting()
	b.want(sandbox.StateRunning)
	b.delete()
	a := within(t, s.Patience, back, "Wait for one that is deleted")
	killed := a.value.State == sandbox.StateExited && a.value.ExitCode == 137
	if a.err != nil || !killed && a.value.State != sandbox.StateAbsent {
		t.Errorf("Wait for one that is deleted says %+v, %v; want absent, or exited with 137", a.value, a.err)
	}
}

func waitCancelled(t *testing.T, s *suite) {
	b := s.box(t)
	o := b.sleeper()
	const after = 100 * time.Millisecond
	for name, begin := range map[string]func() (context.Context, context.CancelFunc){
		"before": func() (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			return ctx, cancel
		},
		"while": func() (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(after, cancel)
			return ctx, cancel
		},
		"deadline": func() (context.Context, context.CancelFunc) {
			return context.WithTimeout(t.Context(), after)
		},
	} {
		ctx, cancel := begin()
		a := step(t, s, ctx, "cancelled Wait", func(ctx context.Context, d sandbox.Driver) (sandbox.Observation, error) {
			return d.Wait(ctx, b.ref)
		})
		// Whoever carries the deadline on may come to it a moment before ctx does.
		<-ctx.Done()
		if a.err == nil || !errors.Is(a.err, ctx.Err()) {
			t.Errorf("%s: Wait returned %+v, %v; want %v", name, a.value, a.err, ctx.Err())
		}
		if a.took > s.soon {
			t.Errorf("%s: Wait took %s, though its context ended after %s at most", name, a.took, after)
		}
		cancel()
	}
	b.undisturbed(o)
}

func waitsOnSeveral(t *testing.T, s *suite) {
	sandboxes, each := s.times(4), 8
	waits := map[*box][]<-chan answer[sandbox.Observation]{}
	codes := map[*box]int{}
	for i := range sandboxes {
		b := s.box(t)
		b.sleeper()
		for range each {
			waits[b] = append(waits[b], b.waiting())
		}
		codes[b] = i % 2 * 137
	}
	// Those on one are not woken by the end of another.
	for b, backs := range waits {
		for _, back := range backs {
			select {
			case a := <-back:
				t.Fatalf("Wait returned %+v, %v while it runs", a.value, a.err)
			default:
			}
		}
		b.stop(time.Duration(1-codes[b]/137) * long)
		for _, back := range backs {
			if a := within(t, s.Patience, back, "Wait"); a.err != nil || a.value.ExitCode != codes[b] {
				t.Errorf("Wait says %+v, %v; want exit code %d", a.value, a.err, codes[b])
			}
		}
	}
}

// manyWaitsCostLittle measures, so nothing else of the suite runs beside it.
func manyWaitsCostLittle(t *testing.T, s *suite) {
	const waits = 300
	b := s.box(t)
	b.sleeper()
	d := s.open(t)
	if _, err := d.Inspect(t.Context(), b.ref); err != nil {
		t.Fatal(err)
	}
	threads := pprof.Lookup("threadcreate")
	goroutines, started := runtime.NumGoroutine(), threads.Count()
	defer func() { // whatever else comes to light
		// Counted are all that were ever started.
		if n := threads.Count() - started; n > waits/3 {
			t.Errorf("%d waits took %d threads", waits, n)
		}
	}()

	kept, keep := context.WithTimeout(t.Context(), s.Patience)
	defer keep()
	given, giveUp := context.WithCancel(kept)
	defer giveUp()
	backs := make([]<-chan answer[sandbox.Observation], waits)
	for i := range backs {
		ctx := kept
		if i%2 == 0 {
			ctx = given
		}
		backs[i] = async(func() (sandbox.Observation, error) { return d.Wait(ctx, b.ref) })
	}
	// A fresh look takes a while, by when the waits are under way.
	most := 0
	for range 20 {
		b.want(sandbox.StateRunning)
		most = max(most, runtime.NumGoroutine()-goroutines)
	}
	// One goroutine each is the suite's own. A way through a client and a
	// server in this same process takes several more.
	if most > 10*waits {
		t.Errorf("%d waits take %d goroutines", waits, most)
	}
	giveUp()
	for i := 0; i < waits; i += 2 {
		if a := within(t, s.Patience, backs[i], "cancelled Wait"); !errors.Is(a.err, context.Canceled) {
			t.Fatalf("Wait returned %+v, %v; want %v", a.value, a.err, context.Canceled)
		}
	}
	b.stop(long)
	for i := 1; i < waits; i += 2 {
		if a := within(t, s.Patience, backs[i], "Wait"); a.err != nil || a.value.State != sandbox.StateExited || a.value.ExitCode != 0 {
			t.Fatalf("Wait says %+v, %v; want exited with 0", a.value, a.err)
		}
	}
	s.close(t, d)
	s.eventually(t, "the goroutines of all waits have ended", func() bool {
		return runtime.NumGoroutine() < goroutines+waits/10
	})
}
