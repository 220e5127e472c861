package vm

import (
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// clone makes to share the blocks of from, where the file system can.
func clone(to, from *os.File) error { return unix.IoctlFileClone(int(to.Fd()), int(from.Fd())) }

// nextData returns where the next data of a file begins, at or after at, and
// where it ends; both are size if there is none. See lseek(2).
func nextData(file *os.File, at, size int64) (data, end int64, err error) {
	data, err = file.Seek(at, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return size, size, nil
	}
	if err != nil {
		return at, size, nil //nolint:nilerr // A file system that does not know its holes.
	}
	end, err = file.Seek(data, unix.SEEK_HOLE)
	if err != nil {
		return data, size, nil //nolint:nilerr // As above.
	}
	_, err = file.Seek(0, io.SeekStart)
	return data, min(end, size), err
}

// isLocked reports whether another process has a lock on a file, as QEMU has on
// the images that it uses: open file description locks, see fcntl(2).
func isLocked(file *os.File) (bool, error) {
	lock := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(file.Fd(), unix.F_OFD_GETLK, &lock); err != nil {
		return false, &os.PathError{Op: "query the lock of", Path: file.Name(), Err: err}
	}
	return lock.Type != unix.F_UNLCK, nil
}
