package drivertest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

func pauseTests() []test {
	return []test{
		{"PauseHaltsAndResumeGoesOn", pauseHalts},
		{"PauseOfWhatDoesNotRun", pauseOfNotRunning},
		{"StopOfPaused", stopOfPaused},
		{"ZeroGraceStopOfPaused", killOfPaused},
		{"DeleteOfPaused", deleteOfPaused},
	}
}

func (b *box) tryPause() error {
	b.t.Helper()
	return b.do("Pause", func(ctx context.Context, d sandbox.Driver) error { return d.(sandbox.Pauser).Pause(ctx, b.ref) })
}

func (b *box) tryResume() error {
	b.t.Helper()
	return b.do("Resume", func(ctx context.Context, d sandbox.Driver) error { return d.(sandbox.Pauser).Resume(ctx, b.ref) })
}

// paused wants a sandbox to be halted, or not to be.
func (b *box) paused(want bool) {
	b.t.Helper()
	if o := b.want(sandbox.StateRunning); o.Paused != want {
		b.t.Errorf("Inspect says %+v; want Paused: %v", o, want)
	}
}

// stillness is how long a paused sandbox is watched. What was printed before
// has the first half of it to be heard of.
const stillness = 400 * time.Millisecond

func pauseHalts(t *testing.T, s *suite) {
	b := s.box(t)
	b.create("print-loop", "5ms")
	b.start()
	b.printed("line 2")
	life := b.want(sandbox.StateRunning)
	waiting := b.background("Wait", func(ctx context.Context, d sandbox.Driver) (sandbox.Observation, error) {
		return d.Wait(ctx, b.ref)
	})
	for range 2 {
		b.paused(false)
		b.must("Pause", b.tryPause())
		b.paused(true)
		b.must("Pause of a paused one", b.tryPause())
		from := time.Now()
		for time.Since(from) < stillness {
			b.paused(true)
		}
		b.silent(from.Add(stillness/2), time.Now())
		b.undisturbed(life)
		b.must("Resume", b.tryResume())
		b.paused(false)
		b.must("Resume of one that is not paused", b.tryResume())
		b.goesOn(time.Now())
	}
	b.undisturbed(life)
	b.stop(0)
	if a := within(t, s.Patience, waiting, "Wait"); a.err != nil || a.value.State != sandbox.StateExited {
		t.Errorf("Wait over two pauses says %+v, %v; want exited", a.value, a.err)
	}
}

// keepsLogs reports whether there is anything to tell a workload's life by.
func (b *box) keepsLogs() bool {
	b.t.Helper()
	d := b.s.open(b.t)
	defer b.s.close(b.t, d)
	_, ok := d.(sandbox.LogSource)
	return ok
}

// silent wants nothing to have been printed in between.
func (b *box) silent(from, to time.Time) {
	b.t.Helper()
	if !b.keepsLogs() {
		return
	}
	opts := everything()
	opts.Since = from
	for _, l := range b.logs(opts) {
		if l.at.Before(to) {
			b.t.Errorf("it was paused, and %s after that printed %q", l.at.Sub(from), l.text)
			return
		}
	}
}

// goesOn waits until something is printed.
func (b *box) goesOn(from time.Time) {
	b.t.Helper()
	if !b.keepsLogs() {
		return
	}
	opts := everything()
	opts.Since = from
	b.happens("the workload goes on printing", func() bool { return len(b.logs(opts)) > 0 })
}

func pauseOfNotRunning(t *testing.T, s *suite) {
	b := s.box(t)
	want := func(sentinel error) {
		t.Helper()
		for verb, err := range map[string]error{"Pause": b.tryPause(), "Resume": b.tryResume()} {
			if !errors.Is(err, sentinel) {
				t.Errorf("%s of one that is %s: %v; want an error that wraps %q", verb, b.inspect().State, err, sentinel)
			}
		}
	}
	want(sandbox.ErrNotFound)
	b.create("ready-after", "0s", "/data/ready")
	want(sandbox.ErrState)
	b.startSleeper()
	b.stop(long)
	want(sandbox.ErrState)
	b.exited(0)
}

func stopOfPaused(t *testing.T, s *suite) {
	b := s.box(t)
	b.sleeper()
	b.must("Pause", b.tryPause())
	b.stop(long) // and yet within patience, which is less: it was heard
	b.exited(0)
	b.startSleeper() // a new life is not paused
	b.paused(false)
	b.stop(long)
	b.exited(0)
}

func killOfPaused(t *testing.T, s *suite) {
	b := s.box(t)
	b.sleeper()
	b.must("Pause", b.tryPause())
	b.stop(0)
	b.want(sandbox.StateExited)
}

func deleteOfPaused(t *testing.T, s *suite) {
	b := s.box(t)
	b.sleeper()
	b.must("Pause", b.tryPause())
	b.delete()
	b.wantGone()
}
