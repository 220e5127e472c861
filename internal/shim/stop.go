package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// Stop has the shim stop what it runs and returns when that has ended; see
// sandbox.Driver.
func (b Box) Stop(ctx context.Context, grace time.Duration) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	o, l, err := b.Observe()
	if err != nil || o.State != sandbox.StateRunning {
		return err
	}
	if err := b.requestStop(l.Number, grace); err != nil {
		return err
	}
	return b.awaitEnd(ctx, l.Number)
}

// requestStop tells a life's shim to stop what it runs. If there is no such
// shim any more, that is as good.
func (b Box) requestStop(number int, grace time.Duration) error {
	// Without a reader such an open fails with ENXIO, see fifo(7).
	f, err := os.OpenFile(b.stopFIFO(number), os.O_WRONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENXIO) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := fmt.Fprintf(f, "%d\n", max(grace, 0)); err != nil && !errors.Is(err, syscall.EPIPE) {
		return err
	}
	return nil
}

// awaitEnd returns once a life's shim is gone, or no longer in charge.
func (b Box) awaitEnd(ctx context.Context, number int) error {
	f, err := os.OpenFile(b.lifeFIFO(number), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	undo := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer undo()
	// Nobody ever writes to it: what comes is the end of the file.
	_, err = f.Read(make([]byte, 1))
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return err
}

// patience is how long a shim may take to end that was told to kill what it
// runs. One that takes longer is stopped, or has a fault.
const patience = 5 * time.Second

// End kills a sandbox, if it runs, and returns once its shim is gone.
func (m *Mutex) End(ctx context.Context) error {
	b := m.box
	overdue := time.After(patience)
	var present Life
	if found, err := b.Load(lifeRecord, &present); err != nil || !found {
		return err // a shim that has no life yet holds the mutex
	}
	told := false
	for pause := 100 * time.Microsecond; ; pause = min(2*pause, 5*time.Millisecond) {
		pid, alive, err := b.alive()
		if err != nil || !alive {
			return err
		}
		if !told {
			if err := b.requestStop(present.Number, 0); err != nil {
				return err
			}
			told = true
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-overdue:
			timer.Stop()
			if err := b.kill(pid); err != nil {
				return err
			}
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
}

// kill kills a process, if it is the one that holds the lock.
func (b Box) kill(pid int) error {
	process, err := os.FindProcess(pid) // a pidfd, where there are such
	if err != nil {
		return err
	}
	now, alive, err := b.alive()
	if err == nil && alive && now == pid {
		err = process.Kill()
	}
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	return errors.Join(err, process.Release())
}
