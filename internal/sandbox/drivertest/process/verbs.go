package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// failed says which operation failed on which sandbox.
func failed(operation string, ref sandbox.Ref, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %w", operation, ref.ID, err)
}

// Create implements sandbox.Driver.
func (d *Driver) Create(ctx context.Context, ref sandbox.Ref, spec sandbox.Spec) error {
	return failed("create", ref, d.create(ctx, ref, spec))
}

func (d *Driver) create(ctx context.Context, ref sandbox.Ref, spec sandbox.Spec) error {
	b, err := d.box(ref)
	if err != nil {
		return err
	}
	if !filepath.IsAbs(ref.Dir) {
		return fmt.Errorf("folder %q is not absolute", ref.Dir)
	}
	m, err := b.lock(ctx)
	if err != nil {
		return err
	}
	defer m.release()
	o, _, err := b.observe()
	switch {
	case err != nil:
		return err
	case o.State != sandbox.StateAbsent && o.State != sandbox.StateBroken:
		return nil
	}
	if err := d.Validate(ctx, spec); err != nil {
		return err
	}
	// Half of a sandbox may be there, half made or half deleted.
	if err := os.RemoveAll(b.dir); err != nil {
		return err
	}
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		return err
	}
	return b.save("made.json", made{Dir: ref.Dir, Spec: spec})
}

// Start implements sandbox.Driver.
func (d *Driver) Start(ctx context.Context, ref sandbox.Ref) error {
	return failed("start", ref, d.start(ctx, ref))
}

func (d *Driver) start(ctx context.Context, ref sandbox.Ref) error {
	b, err := d.box(ref)
	if err != nil {
		return err
	}
	m, err := b.lock(ctx)
	if err != nil {
		return err
	}
	defer m.release()
	o, _, err := b.observe()
	switch {
	case err != nil:
		return err
	case o.State == sandbox.StateAbsent:
		return sandbox.ErrNotFound
	case o.State == sandbox.StateBroken:
		return fmt.Errorf("%w: half of it is missing; delete it", sandbox.ErrState)
	case o.State == sandbox.StateRunning:
		return nil
	}
	if err := b.bury(o); err != nil {
		return err
	}
	return d.launch(ctx, m)
}

// Stop implements sandbox.Driver.
func (d *Driver) Stop(ctx context.Context, ref sandbox.Ref, grace time.Duration) error {
	return failed("stop", ref, d.stop(ctx, ref, grace))
}

func (d *Driver) stop(ctx context.Context, ref sandbox.Ref, grace time.Duration) error {
	b, err := d.box(ref)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	o, l, err := b.observe()
	if err != nil || o.State != sandbox.StateRunning {
		return err
	}
	if err := b.requestStop(l.Number, grace); err != nil {
		return err
	}
	return b.awaitEnd(ctx, l.Number)
}

// requestStop tells a life's shim to stop its workload. If there is no such
// shim any more, that is as good.
func (b box) requestStop(number int, grace time.Duration) error {
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
func (b box) awaitEnd(ctx context.Context, number int) error {
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

// Delete implements sandbox.Driver.
func (d *Driver) Delete(ctx context.Context, ref sandbox.Ref) error {
	return failed("delete", ref, d.remove(ctx, ref))
}

func (d *Driver) remove(ctx context.Context, ref sandbox.Ref) error {
	b, err := d.box(ref)
	if err != nil {
		return err
	}
	m, err := b.lock(ctx)
	if err != nil {
		return err
	}
	defer m.release()
	if err := b.endShim(ctx); err != nil {
		return err
	}
	dirs := []string{ref.Dir}
	var asked made
	if found, err := b.load("made.json", &asked); err == nil && found && asked.Dir != ref.Dir {
		dirs = append(dirs, asked.Dir)
	}
	for _, dir := range dirs {
		if filepath.IsAbs(dir) {
			if err := os.RemoveAll(filepath.Join(dir, "guest")); err != nil {
				return err
			}
		}
	}
	faults, _ := os.ReadFile(b.path("shim.log"))
	// First of all it ceases to be a sandbox; if the rest is cut short, what
	// is there counts as broken, and Delete can be repeated.
	if err := os.Remove(b.path("made.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.RemoveAll(b.dir); err != nil {
		return err
	}
	if len(faults) > 0 {
		return fmt.Errorf("it is deleted, but its shim had a fault: %s", faults)
	}
	return nil
}

// endShim kills a sandbox and returns once its shim is gone.
func (b box) endShim(ctx context.Context) error {
	// A shim that does not do as it is told is stopped, or a fault of ours.
	patience := time.After(5 * time.Second)
	var present life
	if found, err := b.load("life.json", &present); err != nil || !found {
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
		case <-patience:
			timer.Stop()
			if err := b.killShim(pid); err != nil {
				return err
			}
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
}

// killShim kills a process, if it is the one that holds the lock.
func (b box) killShim(pid int) error {
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
