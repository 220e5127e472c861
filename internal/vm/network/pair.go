package network

import (
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Of the receiving buffer VZFileHandleNetworkDeviceAttachment wants at least
// twice the size of the sending one, and better four times. A kernel that
// allows less gives what it allows.
const (
	sendBuffer    = 1 << 20
	receiveBuffer = 4 * sendBuffer
)

// Pair makes a link: two connected sockets that carry Ethernet frames, one a
// datagram. Ours is for Config.Link, theirs for the machine. The caller closes
// both.
func Pair() (ours, theirs *os.File, err error) {
	syscall.ForkLock.RLock()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err == nil {
		unix.CloseOnExec(fds[0])
		unix.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, fmt.Errorf("make a network link: %w", os.NewSyscallError("socketpair", err))
	}
	for _, fd := range fds {
		// Both sides work with whatever they get.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer)
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	}
	return os.NewFile(uintptr(fds[0]), "network link"), os.NewFile(uintptr(fds[1]), "network link of the machine"), nil
}
