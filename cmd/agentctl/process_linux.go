package main

import (
	"errors"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// peerPID is the process at the other end of a connection: SO_PEERCRED in
// unix(7). 0 if it cannot be seen from here.
func peerPID(conn *net.UnixConn) int {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) {
		if peer, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(peer.Pid)
		}
	})
	return pid
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
