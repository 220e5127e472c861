package drivertest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// moments are when to cancel: before, in the midst of, and after whatever a
// driver does, be it fast or slow.
func moments() []time.Duration {
	return []time.Duration{
		0, 200 * time.Microsecond, time.Millisecond, 4 * time.Millisecond,
		15 * time.Millisecond, 60 * time.Millisecond, 250 * time.Millisecond,
	}
}

// cancelled makes a call whose context ends at a moment, and which is to
// return soon after. It may have succeeded, or not.
func (b *box) cancelled(moment time.Duration, what string, call func(ctx context.Context, d sandbox.Driver) error) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), moment)
	defer cancel()
	a := step(b.t, b.s, ctx, "cancelled "+what, func(ctx context.Context, d sandbox.Driver) (struct{}, error) {
		return struct{}{}, call(ctx, d)
	})
	if a.took > moment+b.s.soon {
		b.t.Errorf("%s took %s, though its context ended after %s", what, a.took, moment)
	}
}

func everyVerbCancelled(t *testing.T, s *suite) {
	b := s.box(t)
	o := b.sleeper()
	spec := b.spec("exit", "9")
	type call = func(ctx context.Context, d sandbox.Driver) error
	for _, verb := range []struct {
		name string
		call call
	}{
		{"Probe", func(ctx context.Context, d sandbox.Driver) error { _, err := d.Probe(ctx); return err }},
		{"List", func(ctx context.Context, d sandbox.Driver) error { _, err := d.List(ctx); return err }},
		{"Inspect", func(ctx context.Context, d sandbox.Driver) error { _, err := d.Inspect(ctx, b.ref); return err }},
		{"Wait", func(ctx context.Context, d sandbox.Driver) error { _, err := d.Wait(ctx, b.ref); return err }},
		{"Create", func(ctx context.Context, d sandbox.Driver) error { return d.Create(ctx, b.ref, spec) }},
		{"Start", func(ctx context.Context, d sandbox.Driver) error { return d.Start(ctx, b.ref) }},
		{"Dial", func(ctx context.Context, d sandbox.Driver) error {
			conn, err := d.Dial(ctx, b.ref, 7000)
			if err == nil {
				err = conn.Close()
			}
			return err
		}},
		{"Logs", func(ctx context.Context, d sandbox.Driver) error {
			source, ok := d.(sandbox.LogSource)
			if !ok {
				return nil
			}
			follow := everything()
			follow.Follow = true
			return source.Logs(ctx, b.ref, follow, func(sandbox.LogEntry) error { return nil })
		}},
	} {
		b.cancelled(0, verb.name, verb.call)
		b.undisturbed(o)
	}
	b.cancelled(0, "Stop", func(ctx context.Context, d sandbox.Driver) error { return d.Stop(ctx, b.ref, long) })
	b.stop(long)
	b.exited(0)
}

func createCancelled(t *testing.T, s *suite) {
	for _, moment := range sample(s, moments()) {
		cut := func() *box {
			b := s.box(t)
			spec := b.spec("exit", "3")
			b.cancelled(moment, "Create", func(ctx context.Context, d sandbox.Driver) error { return d.Create(ctx, b.ref, spec) })
			b.consistent()
			return b
		}
		// Repeating completes it.
		b := cut()
		b.create("exit", "3")
		b.want(sandbox.StateCreated)
		if !b.listed() {
			t.Error("List does not find what was created at the second attempt")
		}
		b.start()
		b.wait()
		b.exited(3)

		// And what was begun can be thrown away.
		b = cut()
		b.delete()
		b.wantGone()
	}
}

func startCancelled(t *testing.T, s *suite) {
	for _, moment := range sample(s, moments()) {
		cut := func() *box {
			b := s.box(t)
			b.create("ready-after", "0s", "/data/ready")
			b.cancelled(moment, "Start", func(ctx context.Context, d sandbox.Driver) error { return d.Start(ctx, b.ref) })
			b.consistent()
			return b
		}
		b := cut()
		b.start()
		b.want(sandbox.StateRunning)
		b.stop(0)
		b.exited(137)

		b = cut()
		b.delete()
		b.wantGone()
	}
}

func deleteCancelled(t *testing.T, s *suite) {
	for _, moment := range sample(s, moments()) {
		b := s.box(t)
		b.stubborn()
		b.cancelled(moment, "Delete", func(ctx context.Context, d sandbox.Driver) error { return d.Delete(ctx, b.ref) })
		b.delete()
		b.wantGone()
	}
}

// atOnce makes a call from several goroutines, each with a driver of its own,
// and returns their errors.
func (s *suite) atOnce(t *testing.T, n int, what string, call func(ctx context.Context, d sandbox.Driver, i int) error) []error {
	t.Helper()
	drivers := make([]sandbox.Driver, n)
	for i := range drivers {
		drivers[i] = s.open(t)
		defer s.close(t, drivers[i])
	}
	ctx, cancel := context.WithTimeout(t.Context(), s.Patience)
	defer cancel()
	errs := make([]error, n)
	back := async(func() (struct{}, error) {
		var all sync.WaitGroup
		begin := make(chan struct{})
		for i, d := range drivers {
			all.Go(func() {
				<-begin
				errs[i] = call(ctx, d, i)
			})
		}
		close(begin)
		all.Wait()
		return struct{}{}, nil
	})
	within(t, s.Patience+s.soon, back, what)
	return errs
}

func sameVerbAtOnce(t *testing.T, s *suite) {
	const n = 12
	b := s.box(t)
	spec := b.spec("ready-after", "0s", "/data/ready")
	succeed := func(what string, call func(ctx context.Context, d sandbox.Driver) error) {
		t.Helper()
		for _, err := range s.atOnce(t, n, what, func(ctx context.Context, d sandbox.Driver, _ int) error { return call(ctx, d) }) {
			if err != nil {
				t.Fatalf("%s, one of %d at once: %v", what, n, err)
			}
		}
	}
	succeed("Create", func(ctx context.Context, d sandbox.Driver) error { return d.Create(ctx, b.ref, spec) })
	b.want(sandbox.StateCreated)
	succeed("Start", func(ctx context.Context, d sandbox.Driver) error { return d.Start(ctx, b.ref) })
	b.configure()
	b.wrote("ready")
	o := b.want(sandbox.StateRunning)
	succeed("Inspect", func(ctx context.Context, d sandbox.Driver) error {
		now, err := d.Inspect(ctx, b.ref)
		if err == nil && !same(now, o) {
			err = fmt.Errorf("it is %+v, not %+v", now, o)
		}
		return err
	})
	succeed("Stop", func(ctx context.Context, d sandbox.Driver) error { return d.Stop(ctx, b.ref, long) })
	b.exited(0)
	succeed("Wait", func(ctx context.Context, d sandbox.Driver) error {
		o, err := d.Wait(ctx, b.ref)
		if err == nil && (o.State != sandbox.StateExited || o.ExitCode != 0) {
			err = fmt.Errorf("it is %+v", o)
		}
		return err
	})
	b.start()
	succeed("Delete", func(ctx context.Context, d sandbox.Driver) error { return d.Delete(ctx, b.ref) })
	b.wantGone()
}

func differentSandboxesAtOnce(t *testing.T, s *suite) {
	n := s.times(8)
	boxes, specs := make([]*box, n), make([]sandbox.Spec, n)
	for i := range boxes {
		boxes[i] = s.box(t)
		specs[i] = boxes[i].spec("exit", fmt.Sprint(i))
	}
	errs := s.atOnce(t, n, "lives of different sandboxes", func(ctx context.Context, d sandbox.Driver, i int) error {
		ref := boxes[i].ref
		for _, call := range []func() error{
			func() error { return d.Create(ctx, ref, specs[i]) },
			func() error { return d.Start(ctx, ref) },
			func() error { return s.configured(ctx, d, ref, 1) },
			func() error {
				if o, err := d.Wait(ctx, ref); err != nil || o.ExitCode != i {
					return fmt.Errorf("waited: %+v, %w", o, err)
				}
				return nil
			},
			func() error { return d.Start(ctx, ref) },
			func() error { return d.Stop(ctx, ref, long) },
			func() error { return d.Delete(ctx, ref) },
		} {
			if err := call(); err != nil {
				return err
			}
		}
		return nil
	})
	for i, err := range errs {
		if err != nil {
			t.Errorf("sandbox %d: %v", i, err)
		}
	}
	for _, b := range boxes {
		b.wantGone()
	}
}

// anyVerbsAtOnce has several callers do as they like with one sandbox. What
// they get are answers or errors that say why not, and in the end it is as
// good as any other.
func anyVerbsAtOnce(t *testing.T, s *suite) {
	b := s.box(t)
	spec := b.spec("ready-after", "0s", "/data/ready")
	allowed := []error{
		sandbox.ErrNotFound, sandbox.ErrState, sandbox.ErrExists,
		sandbox.ErrSuperseded, sandbox.ErrEnded,
	}
	seed := rand.Uint64()
	errs := s.atOnce(t, 6, "verbs at random", func(ctx context.Context, d sandbox.Driver, i int) error {
		random := rand.New(rand.NewPCG(seed, uint64(i)))
		for range 12 {
			var err error
			verb := []string{"Create", "Create", "Start", "Start", "Stop", "Delete", "Inspect", "List"}[random.IntN(8)]
			switch verb {
			case "Create":
				err = d.Create(ctx, b.ref, spec)
			case "Start":
				err = d.Start(ctx, b.ref)
			case "Stop":
				err = d.Stop(ctx, b.ref, time.Duration(random.IntN(2))*long)
			case "Delete":
				err = d.Delete(ctx, b.ref)
			case "Inspect":
				_, err = d.Inspect(ctx, b.ref)
			case "List":
				_, err = d.List(ctx)
			}
			if err != nil && !slices.ContainsFunc(allowed, func(e error) bool { return errors.Is(err, e) }) {
				return fmt.Errorf("%s: %w", verb, err)
			}
		}
		return nil
	})
	for _, err := range errs {
		if err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
	}
	b.delete()
	b.wantGone()
	b.create("exit", "8")
	b.start()
	b.wait()
	b.exited(8)
}
