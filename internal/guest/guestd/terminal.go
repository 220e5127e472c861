//go:build linux

package guestd

import (
	"fmt"
	"math"
	"os"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

// openTerminal returns the two ends of a new terminal: the agent's, and the
// command's as a descriptor that the caller closes.
func openTerminal(size *guestv1.TerminalSize) (master *os.File, slave int, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, -1, fmt.Errorf("open a terminal: /dev/ptmx: %w", err)
	}
	master = os.NewFile(uintptr(fd), "ptmx")
	slave, err = openSlave(fd)
	if err == nil && size.GetColumns() > 0 {
		err = resize(master, size)
	}
	if err != nil {
		master.Close()
		if slave >= 0 {
			_ = unix.Close(slave)
		}
		return nil, -1, fmt.Errorf("open a terminal: %w", err)
	}
	return master, slave, nil
}

// openSlave needs no path, for that may lead to another instance of devpts; see
// TIOCGPTPEER in ioctl_tty(2).
func openSlave(master int) (int, error) {
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		return -1, err
	}
	slave, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return -1, errno
	}
	return int(slave), nil
}

// resize sets the size of a terminal; who runs in it gets SIGWINCH.
func resize(master *os.File, size *guestv1.TerminalSize) error {
	winsize := unix.Winsize{
		Col: uint16(min(size.GetColumns(), math.MaxUint16)), //nolint:gosec // Just bounded.
		Row: uint16(min(size.GetRows(), math.MaxUint16)),    //nolint:gosec // Just bounded.
	}
	return control(master, func(fd int) error { return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &winsize) })
}

// endOfInput returns what to type for the reader of a terminal to see its end:
// nothing where it reads characters and not lines. The first only ends a line
// that was begun; see VEOF in termios(3).
func endOfInput(master *os.File, lineBegun bool) []byte {
	var settings *unix.Termios
	err := control(master, func(fd int) (err error) {
		settings, err = unix.IoctlGetTermios(fd, unix.TCGETS)
		return err
	})
	if err != nil || settings.Lflag&unix.ICANON == 0 {
		return nil
	}
	end := settings.Cc[unix.VEOF]
	if lineBegun {
		return []byte{end, end}
	}
	return []byte{end}
}

// control does something to a file's descriptor without making it block.
func control(file *os.File, do func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var doErr error
	if err := raw.Control(func(fd uintptr) { doErr = do(int(fd)) }); err != nil {
		return err
	}
	return doErr
}
