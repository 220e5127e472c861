package main

import (
	"errors"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// peerOf is the process at the other end of a socket: LOCAL_PEERPID in
// sys/un.h. 0 if it is not told.
func peerOf(fd int) int {
	pid, err := unix.GetsockoptInt(fd, unix.SOL_LOCAL, unix.LOCAL_PEERPID)
	if err != nil {
		return 0
	}
	return pid
}

// hasEnded reports whether a process has. launchd, whose child the agent is
// once who started it has gone, asks at once how it ended.
func hasEnded(process *os.Process) bool {
	return errors.Is(process.Signal(syscall.Signal(0)), os.ErrProcessDone)
}
