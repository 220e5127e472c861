package shim

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Mutex is the right to change a sandbox. It is a lock of flock(2), so it
// belongs to the open file: whoever inherits the descriptor shares it, and it
// ends when the last one closes it, by dying or otherwise.
type Mutex struct {
	box  Box
	file *os.File
}

// Lock waits for a sandbox's mutex.
func (b Box) Lock(ctx context.Context) (*Mutex, error) {
	pause := 200 * time.Microsecond
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		m, err := b.tryLock()
		if m != nil || err != nil {
			return m, err
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil, ctx.Err()
		case <-timer.C:
		}
		pause = min(2*pause, 5*time.Millisecond)
	}
}

// tryLock returns nil if another holds the mutex.
func (b Box) tryLock() (*Mutex, error) {
	if err := os.MkdirAll(filepath.Dir(b.mutex), 0o700); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(b.mutex, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		file.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, nil
		}
		return nil, &os.PathError{Op: "lock", Path: b.mutex, Err: err}
	}
	// The holder before may have removed the file, and then this is the lock
	// of nothing.
	mine, err := file.Stat()
	if err == nil {
		var current fs.FileInfo
		if current, err = os.Stat(b.mutex); err == nil && os.SameFile(mine, current) {
			return &Mutex{box: b, file: file}, nil
		}
	}
	file.Close()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return nil, nil
}

// Release gives the mutex up, but for those who inherited it. The mutex of a
// sandbox that does not exist is removed.
func (m *Mutex) Release() {
	if _, err := os.Stat(m.box.Dir); errors.Is(err, fs.ErrNotExist) {
		_ = os.Remove(m.box.mutex)
	}
	m.file.Close()
}

// Make makes the sandbox anew, with what is asked for as its record, over
// whatever half of one is there. fill, if it is not nil, makes what else
// belongs in the folder; the sandbox exists once it has succeeded.
func (m *Mutex) Make(record any, fill func() error) error {
	if err := os.RemoveAll(m.box.Dir); err != nil {
		return err
	}
	if err := os.MkdirAll(m.box.Dir, 0o700); err != nil {
		return err
	}
	var err error
	if fill != nil {
		err = fill()
	}
	if err == nil {
		err = m.box.Save(madeRecord, record)
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(m.box.Dir))
	}
	return nil
}

// Remake replaces what is asked for, of a sandbox that exists.
func (m *Mutex) Remake(record any) error { return m.box.Save(madeRecord, record) }

// Unmake removes the sandbox, which does not run any more, and returns what
// its shims printed. First of all it ceases to be one: if the rest is cut
// short what is there counts as broken, and Unmake can be repeated.
func (m *Mutex) Unmake() (faults []byte, err error) {
	faults, _ = os.ReadFile(m.box.Path(faultsFile))
	if err := os.Remove(m.box.Path(madeRecord)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return faults, os.RemoveAll(m.box.Dir)
}
