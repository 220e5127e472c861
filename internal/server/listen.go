package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrListening says that somebody else serves a socket.
var ErrListening = errors.New("another agent listens there")

// ListenUnix listens on a unix socket of mode 0660 that belongs to the group
// that access names, if it names one. The socket's folder is made if need be,
// closed to everybody else. A socket that a killed agent left is replaced, one
// that somebody listens on is not: ErrListening.
//
// A lock beside the socket, PATH.lock, held until the listener is closed,
// keeps two agents that start at the same moment from replacing each other's.
func ListenUnix(ctx context.Context, path string, access Access) (net.Listener, error) {
	listener, err := listenUnix(ctx, path, access)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return listener, nil
}

func listenUnix(ctx context.Context, path string, access Access) (_ net.Listener, err error) {
	var address unix.RawSockaddrUnix
	if longest := len(address.Path) - 1; len(path) > longest {
		return nil, fmt.Errorf("the path is %d bytes long; a socket's has at most %d", len(path), longest)
	}
	if err := makeFolder(filepath.Dir(path), access); err != nil {
		return nil, err
	}
	lock, err := lockFile(path + ".lock")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Close())
		}
	}()
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	var config net.ListenConfig
	listener, err := config.Listen(ctx, "unix", path)
	if err != nil {
		if op, ok := errors.AsType[*net.OpError](err); ok {
			err = op.Err // the path is named already
		}
		return nil, err
	}
	// Who connects before the mode is set is looked at like anybody else.
	if err := grant(path, access, 0o660); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return &unixListener{UnixListener: listener.(*net.UnixListener), lock: lock}, nil
}

// makeFolder makes the socket's folder unless there is one. Where anybody could
// have been first, as below /tmp, it has to be this user's or root's. Its
// parents are made too, for the agent alone.
func makeFolder(dir string, access Access) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); errors.Is(err, fs.ErrExist) {
		return checkOwner(dir)
	} else if err != nil {
		return err
	}
	if access.gid < 0 {
		return nil
	}
	return grant(dir, access, 0o750)
}

// checkOwner refuses a folder in which somebody else could put a socket in the
// place of this one.
func checkOwner(dir string) error {
	parent, err := os.Stat(filepath.Dir(dir))
	if err != nil || parent.Mode().Perm()&0o002 == 0 {
		return err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if ok && stat.Uid != 0 && int(stat.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to user %d, who could put another socket there", dir, stat.Uid)
	}
	return nil
}

// grant gives a file to the group, if there is one, and sets its mode.
func grant(path string, access Access, mode fs.FileMode) error {
	if access.gid >= 0 {
		if err := os.Chown(path, -1, access.gid); err != nil {
			return err
		}
	}
	return os.Chmod(path, mode)
}

func lockFile(path string) (*os.File, error) {
	lock, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrListening
		}
		return nil, errors.Join(err, lock.Close())
	}
	return lock, nil
}

// removeStale removes a socket that nobody listens on.
func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return errors.New("there is a file that is not a socket; remove it or choose another path")
	}
	dialer := net.Dialer{Timeout: time.Second}
	conn, err := dialer.DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		return errors.Join(ErrListening, conn.Close())
	case errors.Is(err, syscall.ECONNREFUSED):
		return os.Remove(path)
	default:
		// A full backlog (EAGAIN) or no permission: somebody may be there.
		return fmt.Errorf("%w, or it cannot be told: %w", ErrListening, err)
	}
}

// unixListener removes the socket and gives the lock back when closed.
type unixListener struct {
	*net.UnixListener
	lock *os.File
}

func (l *unixListener) Close() error {
	// The socket goes first: nobody may take its place before it has gone.
	err := l.UnixListener.Close()
	if closing := l.lock.Close(); err == nil {
		err = closing
	}
	return err
}
