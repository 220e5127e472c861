//go:build linux

package qemu

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// folder is a machine's folder, held open: the names of sockets in it stay
// short whatever its own is (sun_path of unix(7) has 108 bytes).
type folder struct{ file *os.File }

func openFolder(path string) (folder, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return folder{}, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return folder{os.NewFile(uintptr(fd), path)}, nil
}

// name is that of a socket in the folder, for this process alone: proc(5).
func (f folder) name(socket string) string {
	return "/proc/self/fd/" + strconv.Itoa(int(f.file.Fd())) + "/" + socket
}

func (f folder) remove(socket string) error {
	return unix.Unlinkat(int(f.file.Fd()), socket, 0)
}

func newSocket(name string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// connect is a connection to a socket in the folder, blocking: a child's.
func (f folder) connect(socket string) (*os.File, error) {
	file, err := newSocket(socket)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(int(file.Fd()), &unix.SockaddrUnix{Name: f.name(socket)}); err != nil {
		file.Close()
		return nil, os.NewSyscallError("connect "+socket, err)
	}
	return file, nil
}

// pair makes a listener, and one connection that waits to be accepted there,
// which nobody else can make any more: its name is gone.
func (f folder) pair(socket string) (listener, conn *os.File, err error) {
	if listener, err = newSocket(socket); err != nil {
		return nil, nil, err
	}
	err = unix.Bind(int(listener.Fd()), &unix.SockaddrUnix{Name: f.name(socket)})
	if err == nil {
		if err = unix.Listen(int(listener.Fd()), 1); err == nil {
			conn, err = f.connect(socket)
		}
		if gone := f.remove(socket); err == nil {
			err = gone
		}
	}
	if err != nil {
		listener.Close()
		if conn != nil {
			conn.Close()
		}
		return nil, nil, err
	}
	return listener, conn, nil
}

// socketpair is two connected stream sockets.
func socketpair(name string) (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name), nil
}
