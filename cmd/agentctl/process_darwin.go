package main

import (
	"errors"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// peerPID is the process at the other end of a connection: LOCAL_PEERPID in
// sys/un.h. 0 if it is not told.
func peerPID(conn *net.UnixConn) int {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) {
		if peer, err := unix.GetsockoptInt(int(fd), unix.SOL_LOCAL, unix.LOCAL_PEERPID); err == nil {
			pid = peer
		}
	})
	return pid
}

// hasEnded reports whether a process has. launchd, whose child the agent is
// once who started it has gone, asks at once how it ended.
func hasEnded(process *os.Process) bool {
	return errors.Is(process.Signal(syscall.Signal(0)), os.ErrProcessDone)
}
