package process

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// mutex is the right to change a sandbox. It is a lock of flock(2), so it
// belongs to the open file: whoever inherits the descriptor shares it, and it
// ends when the last one closes it, by dying or otherwise.
type mutex struct {
	box  box
	file *os.File
}

// lock waits for a sandbox's mutex.
func (b box) lock(ctx context.Context) (*mutex, error) {
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
func (b box) tryLock() (*mutex, error) {
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
			return &mutex{box: b, file: file}, nil
		}
	}
	file.Close()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return nil, nil
}

// release gives the mutex up, but for those who inherited it. The mutex of a
// sandbox that does not exist is removed.
func (m *mutex) release() {
	if _, err := os.Stat(m.box.dir); errors.Is(err, fs.ErrNotExist) {
		_ = os.Remove(m.box.mutex)
	}
	m.file.Close()
}
