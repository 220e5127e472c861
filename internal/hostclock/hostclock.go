// Package hostclock notices that the host has slept, and that its wall clock
// was set.
//
// It compares three clocks of the kernel's: the wall clock, which is set at
// will; one that counts on in the host's sleep; and one that stands still then,
// which is also Go's monotonic clock and what Go's timers go by. What the
// second gains on the third is sleep, and what the first gains on the second
// is the clock being set, by NTP in one step or by a person. A host that is
// itself a virtual machine and was halted from outside knows of no sleep: all
// its clocks stood still, and it looks as if its wall clock were set once
// something does so.
//
// The package refuses to tell when the host is about to sleep, which takes a
// framework on macOS and D-Bus on Linux, and to act on anything.
package hostclock

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Interval is the usual pause between two looks: what happened is noticed that
// much later at most, in time that the host is awake.
const Interval = 5 * time.Second

// Least is what is told of. Less than that is not forgotten, but told of once
// it adds up: many short sleeps do, and so does what a clock of macOS's drifts
// while NTP slews the other.
const Least = time.Second

// precise is how far apart the clocks may be read: Least is a hundred times
// that.
const precise = 10 * time.Millisecond

// Reading is the host's clocks at one moment.
type Reading struct {
	Wall    time.Duration // since 1970
	Elapsed time.Duration // since some moment, with the host's sleep
	Awake   time.Duration // since some moment, without it
}

// Jump is what passed that programs of the host did not live through.
type Jump struct {
	// Slept is how long the host slept. At least Least, or 0.
	Slept time.Duration
	// Set is by how much the wall clock was set, besides; negative: back. At
	// least Least either way, or 0.
	Set time.Duration
}

// Read reads the host's clocks. The error is for kernels that lack one.
func Read() (Reading, error) {
	var r Reading
	// A program that is stopped in between, or a host that is put to sleep, has
	// read one moment's clock here and another's there.
	for range 10 {
		before, err := clock(elapsedClock)
		if err != nil {
			return Reading{}, err
		}
		if r.Awake, err = clock(awakeClock); err != nil {
			return Reading{}, err
		}
		if r.Wall, err = clock(unix.CLOCK_REALTIME); err != nil {
			return Reading{}, err
		}
		if r.Elapsed, err = clock(elapsedClock); err != nil {
			return Reading{}, err
		}
		if r.Elapsed-before < precise {
			break
		}
	}
	return r, nil
}

func clock(id int32) (time.Duration, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(id, &t); err != nil {
		return 0, fmt.Errorf("read clock %d of the host: %w", id, err)
	}
	return time.Duration(t.Nano()), nil
}

// Watch reads the clocks every interval and calls see with each jump, from this
// goroutine, until ctx ends. What happens during a call is told of after it. If
// the clocks cannot be read Watch returns why.
func Watch(ctx context.Context, interval time.Duration, read func() (Reading, error), see func(Jump)) error {
	past, err := read()
	if err != nil {
		return err
	}
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		now, err := read()
		if err != nil {
			return err
		}
		var jump Jump
		if jump, past = past.jump(now); jump != (Jump{}) {
			see(jump)
		}
	}
}

// jump is what happened until a later reading, and the reading to compare the
// next with: what was too little to be told of is kept.
func (r Reading) jump(now Reading) (Jump, Reading) {
	jump := Jump{
		Slept: (now.Elapsed - now.Awake) - (r.Elapsed - r.Awake),
		Set:   (now.Wall - now.Elapsed) - (r.Wall - r.Elapsed),
	}
	kept := now
	if jump.Slept < Least {
		kept.Awake += jump.Slept
		jump.Slept = 0
	}
	if jump.Set.Abs() < Least {
		kept.Wall -= jump.Set
		jump.Set = 0
	}
	return jump, kept
}
