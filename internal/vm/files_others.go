//go:build !linux

package vm

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// clone shares no blocks: see copySparse.
func clone(_, _ *os.File) error { return errors.ErrUnsupported }

// nextData takes all for data: zeros become holes all the same.
func nextData(_ *os.File, at, size int64) (data, end int64, err error) { return at, size, nil }

// isLocked reports whether another process has a lock on a file.
func isLocked(file *os.File) (bool, error) {
	lock := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(file.Fd(), unix.F_GETLK, &lock); err != nil {
		return false, &os.PathError{Op: "query the lock of", Path: file.Name(), Err: err}
	}
	return lock.Type != unix.F_UNLCK, nil
}
