package main

import (
	"errors"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// peerOf is the process at the other end of a socket: SO_PEERCRED in unix(7). 0
// if it cannot be seen from here.
func peerOf(fd int) int {
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return 0
	}
	return int(peer.Pid)
}

// hasEnded reports whether a process has, also one whose parent has not asked
// for how it ended.
func hasEnded(process *os.Process) bool {
	ended := false
	err := process.WithHandle(func(pidfd uintptr) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0) //nolint:gosec // a descriptor
		ended = err == nil && n == 1
	})
	if err != nil { // without pidfd_open(2), or gone before it was held
		return errors.Is(process.Signal(syscall.Signal(0)), os.ErrProcessDone)
	}
	return ended
}
