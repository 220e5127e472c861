package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// openPTY opens both ends of a new pseudoterminal; see pts(4).
func openPTY() (ours, theirs *os.File, err error) {
	ours, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	fd := int(ours.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return nil, nil, err
	}
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		return nil, nil, err
	}
	// Only a descriptor that does not block has reads that closing ends.
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, nil, err
	}
	dup, err := unix.Dup(fd)
	if err != nil {
		return nil, nil, err
	}
	ours.Close()
	ours = os.NewFile(uintptr(dup), "ptmx")
	theirs, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	return ours, theirs, err
}

func setSize(f *os.File, columns, rows uint32) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		set = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: uint16(columns), Row: uint16(rows)})
	})
	if err != nil {
		return err
	}
	return set
}

func (e *fakeExec) resize(size *agentv1.TerminalSize) {
	_ = setSize(e.tty, size.GetColumns(), size.GetRows())
}
