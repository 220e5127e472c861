package hostclock

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// host has clocks that go with the test's, which synctest advances.
type host struct {
	began      time.Time
	slept, set atomic.Int64
	err        atomic.Pointer[error]
}

func (h *host) read() (Reading, error) {
	awake := time.Since(h.began)
	elapsed := awake + time.Duration(h.slept.Load())
	r := Reading{Wall: elapsed + time.Duration(h.set.Load()) + 1_800_000_000*time.Second, Elapsed: elapsed, Awake: awake}
	if err := h.err.Load(); err != nil {
		return Reading{}, *err
	}
	return r, nil
}

func TestWatchTellsSleepFromAClockThatWasSet(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := &host{began: time.Now()}
		var seen []Jump
		ended := make(chan error, 1)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { ended <- Watch(ctx, Interval, h.read, func(j Jump) { seen = append(seen, j) }) }()
		for _, c := range []struct {
			name       string
			slept, set time.Duration
			want       []Jump
		}{
			{"nothing happens", 0, 0, nil},
			{"a night", 8 * time.Hour, 0, []Jump{{Slept: 8 * time.Hour}}},
			{"nothing happens again", 0, 0, nil},
			{"NTP steps forward", 0, 3 * time.Second, []Jump{{Set: 3 * time.Second}}},
			{"a person sets it back", 0, -time.Hour, []Jump{{Set: -time.Hour}}},
			{"both", time.Minute, -2 * time.Second, []Jump{{Slept: time.Minute, Set: -2 * time.Second}}},
			{"a short sleep", 600 * time.Millisecond, 0, nil},
			{"another adds up", 600 * time.Millisecond, 0, []Jump{{Slept: 1200 * time.Millisecond}}},
			{"a short step", 0, 700 * time.Millisecond, nil},
			{"and back", 0, -700 * time.Millisecond, nil},
			{"two short steps", 0, -700 * time.Millisecond, nil},
			{"add up", 0, -700 * time.Millisecond, []Jump{{Set: -1400 * time.Millisecond}}},
			{"a long sleep beside a short step", time.Hour, 400 * time.Millisecond, []Jump{{Slept: time.Hour}}},
			{"and the rest of it", 0, 600 * time.Millisecond, []Jump{{Set: time.Second}}},
		} {
			seen = nil
			synctest.Wait()
			h.slept.Add(int64(c.slept))
			h.set.Add(int64(c.set))
			time.Sleep(Interval) // the test's time
			synctest.Wait()
			if diff := cmp.Diff(c.want, seen); diff != "" {
				t.Errorf("%s (-want +got):\n%s", c.name, diff)
			}
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func TestSleepWhileAnotherIsLookedIntoIsToldOf(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := &host{began: time.Now()}
		h.slept.Add(int64(time.Minute)) // before there is anybody to tell
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		time.AfterFunc(7*time.Second, func() { h.slept.Add(int64(time.Hour)) })
		var seen []Jump
		if err := Watch(ctx, Interval, h.read, func(j Jump) {
			if seen = append(seen, j); len(seen) == 1 {
				h.slept.Add(int64(2 * time.Hour))
				time.Sleep(time.Minute)
			}
		}); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff([]Jump{{Slept: time.Hour}, {Slept: 2 * time.Hour}}, seen); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})
}

func TestWatchEndsIfThereIsNoClock(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h, gone := &host{began: time.Now()}, errors.New("no such clock")
		time.AfterFunc(time.Minute, func() { h.err.Store(&gone) })
		for range 2 { // as the first and as a later reading
			if err := Watch(t.Context(), Interval, h.read, func(j Jump) { t.Errorf("%+v", j) }); !errors.Is(err, gone) {
				t.Error(err)
			}
		}
	})
}

func TestReadOfThisHost(t *testing.T) {
	t.Parallel()
	before := time.Now()
	first, err := Read()
	if err != nil {
		t.Fatal(err)
	}
	<-time.After(20 * time.Millisecond)
	second, err := Read()
	after := time.Now()
	if err != nil {
		t.Fatal(err)
	}
	if wall := time.Unix(0, int64(first.Wall)); wall.Before(before.Round(0).Add(-Least)) || wall.After(after.Round(0).Add(Least)) {
		t.Errorf("the wall clock says %s between %s and %s", wall, before, after)
	}
	for name, passed := range map[string]time.Duration{"elapsed": second.Elapsed - first.Elapsed, "awake": second.Awake - first.Awake} {
		if passed < 20*time.Millisecond || passed > after.Sub(before)+Least {
			t.Errorf("%s: %s passed, of %s", name, passed, after.Sub(before))
		}
	}
	if jump, _ := first.jump(second); jump != (Jump{}) {
		t.Errorf("out of nothing: %+v", jump)
	}
}
