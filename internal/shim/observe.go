package shim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// Observe returns what is true of a sandbox and, if it runs, its life. Of one
// that is just being made or removed it may say that it is broken.
func (b Box) Observe() (sandbox.Observation, Life, error) {
	none := func(s sandbox.State) (sandbox.Observation, Life, error) {
		return sandbox.Observation{State: s}, Life{}, nil
	}
	fail := func(err error) (sandbox.Observation, Life, error) {
		return sandbox.Observation{}, Life{}, err
	}
	if _, err := os.Stat(b.Path(madeRecord)); errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(b.Dir); errors.Is(err, fs.ErrNotExist) {
			return none(sandbox.StateAbsent)
		}
		return none(sandbox.StateBroken)
	} else if err != nil {
		return fail(err)
	}
	var present Life
	if found, err := b.Load(lifeRecord, &present); err != nil {
		return fail(err)
	} else if !found {
		return none(sandbox.StateCreated)
	}
	if o, ended, err := b.ended(present); ended || err != nil {
		return o, Life{}, err
	}
	if _, alive, err := b.alive(); err != nil {
		return fail(err)
	} else if alive {
		return sandbox.Observation{State: sandbox.StateRunning, StartedAt: present.StartedAt, Paused: present.Paused, Detail: present.Progress}, present, nil
	}
	// Between the two looks it may have written its end and gone.
	if o, ended, err := b.ended(present); ended || err != nil {
		return o, Life{}, err
	}
	o := sandbox.Observation{
		State:     sandbox.StateExited,
		StartedAt: present.StartedAt,
		ExitCode:  128 + int(syscall.SIGKILL),
		Detail:    "its shim was killed",
	}
	if boot, err := BootID(); err == nil && boot != present.Boot {
		o.Detail = "the host was restarted"
	}
	if info, err := os.Stat(b.Path(lifeRecord)); err == nil {
		o.FinishedAt = info.ModTime() // no earlier than that is all that is known
	}
	if o.FinishedAt.Before(o.StartedAt) { // files are dated by a coarser clock
		o.FinishedAt = o.StartedAt
	}
	return o, Life{}, nil
}

// ended returns how a life, or a later one, ended, if it has.
func (b Box) ended(l Life) (sandbox.Observation, bool, error) {
	var e endOf
	if found, err := b.Load(endRecord, &e); err != nil || !found || e.Life.Number < l.Number {
		return sandbox.Observation{}, false, err
	}
	return sandbox.Observation{
		State:      sandbox.StateExited,
		StartedAt:  e.Life.StartedAt,
		FinishedAt: e.FinishedAt,
		ExitCode:   e.ExitCode,
		OOMKilled:  e.OOMKilled,
		Detail:     e.Detail,
	}, true, nil
}

// bury writes the end of a life that was found to have ended, if its shim was
// not able to. The next life begins with a lock held, and until it has a
// record of its own it must not be taken for this one.
func (b Box) bury(o sandbox.Observation) error {
	var last Life
	if found, err := b.Load(lifeRecord, &last); err != nil || !found {
		return err
	}
	if _, ended, err := b.ended(last); err != nil || ended {
		return err
	}
	return b.Save(endRecord, endOf{last, End{FinishedAt: o.FinishedAt, ExitCode: o.ExitCode, Detail: o.Detail}})
}

// Settled is Observe, but that of a sandbox found broken it waits out whoever
// is making or deleting it just now.
func (b Box) Settled(ctx context.Context) (sandbox.Observation, Life, error) {
	if err := ctx.Err(); err != nil {
		return sandbox.Observation{}, Life{}, err
	}
	o, l, err := b.Observe()
	if err != nil || o.State != sandbox.StateBroken {
		return o, l, err
	}
	m, err := b.Lock(ctx)
	if err != nil {
		return sandbox.Observation{}, Life{}, err
	}
	defer m.Release()
	return b.Observe()
}

// Wait returns how the present life ended once it has; see sandbox.Driver. A
// wait that does not end costs a goroutine and a file descriptor, and no
// thread.
func (b Box) Wait(ctx context.Context) (sandbox.Observation, error) {
	for {
		o, l, err := b.Settled(ctx)
		if err != nil || o.State != sandbox.StateRunning {
			return o, err
		}
		if err := b.awaitEnd(ctx, l.Number); err != nil {
			return sandbox.Observation{}, err
		}
		if o, ended, err := b.ended(l); ended || err != nil {
			return o, err
		}
		// It left no word. The lock that says whether it lives may be given up
		// a moment after the FIFO is.
		select {
		case <-ctx.Done():
			return sandbox.Observation{}, ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

// alive reports whether a shim lives, and which process the kernel says it is.
//
// The lock is one of fcntl(2)'s record locks: they belong to a process, end
// with it, are not inherited, and can be asked for without being taken.
func (b Box) alive() (pid int, alive bool, err error) {
	f, err := os.Open(b.Path(aliveLock))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	defer f.Close()
	lock := syscall.Flock_t{Type: syscall.F_WRLCK}
	if err := syscall.FcntlFlock(f.Fd(), syscall.F_GETLK, &lock); err != nil {
		return 0, false, fmt.Errorf("query %s: %w", f.Name(), err)
	}
	return int(lock.Pid), lock.Type != syscall.F_UNLCK, nil
}
