package drivertest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

func adoptsRunning(t *testing.T, s *suite) {
	b := s.box(t)
	b.create("ready-after", "0s", "/data/ready")
	o := b.startSleeper() // whose opener has been closed, and whose context has ended
	b.undisturbed(o)
	waiting := b.background("Wait", func(ctx context.Context, d sandbox.Driver) (sandbox.Observation, error) {
		return d.Wait(ctx, b.ref)
	})
	b.stop(long)
	if a := within(t, s.Patience, waiting, "Wait"); a.err != nil || a.value.State != sandbox.StateExited || a.value.ExitCode != 0 {
		t.Errorf("Wait on an adopted one says %+v, %v; want exited with 0", a.value, a.err)
	}
}

func adoptsDead(t *testing.T, s *suite) {
	b := s.box(t)
	b.create("exit", "42")
	b.start()
	// Nobody waits for it. It is found dead.
	s.eventually(t, "Inspect says exited", func() bool { return b.inspect().State == sandbox.StateExited })
	first := b.exited(42)
	if o := b.wait(); o.ExitCode != 42 || !o.FinishedAt.Equal(first.FinishedAt) {
		t.Errorf("Wait says %+v, Inspect says %+v", o, first)
	}
	if again := b.exited(42); !same(again, first) {
		t.Errorf("Inspect says %+v, and before said %+v", again, first)
	}
}

func exitCodes(t *testing.T, s *suite) {
	for _, code := range sample(s, []string{"0", "1", "2", "100", "126", "127", "143", "255"}) {
		t.Run(code, func(t *testing.T) {
			b := s.box(t)
			b.create("exit", code, "10ms")
			b.start()
			o := b.wait()
			if want := atoi(t, code); o.State != sandbox.StateExited || o.ExitCode != want {
				t.Errorf("Wait says %+v, want exited with %d", o, want)
			} else {
				b.exited(want)
			}
		})
	}
}

func endsAtOnce(t *testing.T, s *suite) {
	for range s.times(5) {
		b := s.box(t)
		b.create("exit", "4")
		b.start()
		if o := b.wait(); o.State != sandbox.StateExited || o.ExitCode != 4 {
			t.Errorf("Wait says %+v, want exited with 4", o)
		}
	}
}

func stopAsksFirst(t *testing.T, s *suite) {
	b := s.box(t)
	b.sleeper()
	b.stop(long) // and yet within patience, which is less
	b.exited(0)
}

func stopKillsAfterGrace(t *testing.T, s *suite) {
	b := s.box(t)
	b.stubborn()
	const grace = time.Second
	begun := time.Now()
	b.stop(grace)
	if took := time.Since(begun); took < grace || took > grace+s.soon {
		t.Errorf("Stop with a grace of %s took %s", grace, took)
	}
	b.exited(137)
}

func zeroGraceKills(t *testing.T, s *suite) {
	// One that would end by itself, were it asked.
	b := s.box(t)
	b.sleeper()
	b.stop(0)
	b.exited(137)

	stubborn := s.box(t)
	stubborn.stubborn()
	stubborn.stop(0)
	stubborn.exited(137)
}

func stopOfStopped(t *testing.T, s *suite) {
	for _, grace := range []time.Duration{0, long} {
		b := s.box(t)
		b.create("exit", "6")
		b.stop(grace)
		b.want(sandbox.StateCreated)
		b.start()
		b.wait()
		o := b.exited(6)
		b.stop(grace)
		if again := b.exited(6); !same(again, o) {
			t.Errorf("Stop of one that had ended made %+v of %+v", again, o)
		}
	}
}

func stopCancelled(t *testing.T, s *suite) {
	b := s.box(t)
	b.stubborn()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	// It may go on to its end, so that is not too far off.
	a := step(t, s, ctx, "cancelled Stop", func(ctx context.Context, d sandbox.Driver) (struct{}, error) {
		return struct{}{}, d.Stop(ctx, b.ref, 2*time.Second)
	})
	if a.err == nil && a.took < 2*time.Second {
		t.Errorf("Stop of one that takes no notice of it succeeded; it now is %+v", b.inspect())
	}
	if a.took > s.soon {
		t.Errorf("Stop took %s, though its context ended after 200 ms", a.took)
	}
	b.stop(0)
	b.exited(137)
}

func shortStopOvertakes(t *testing.T, s *suite) {
	b := s.box(t)
	b.stubborn()
	patient := b.background("Stop", func(ctx context.Context, d sandbox.Driver) (sandbox.Observation, error) {
		return sandbox.Observation{}, d.Stop(ctx, b.ref, long)
	})
	b.stop(0)
	b.exited(137)
	if a := within(t, s.Patience, patient, "the long Stop"); a.err != nil && !errors.Is(a.err, sandbox.ErrSuperseded) {
		t.Errorf("the Stop that was overtaken: %v", a.err)
	}
}

func deleteOvertakesStop(t *testing.T, s *suite) {
	b := s.box(t)
	b.stubborn()
	patient := b.background("Stop", func(ctx context.Context, d sandbox.Driver) (sandbox.Observation, error) {
		return sandbox.Observation{}, d.Stop(ctx, b.ref, long)
	})
	b.delete()
	b.wantGone()
	if a := within(t, s.Patience, patient, "the long Stop"); a.err != nil && !errors.Is(a.err, sandbox.ErrSuperseded) {
		t.Errorf("the Stop that was overtaken by Delete: %v", a.err)
	}
}
