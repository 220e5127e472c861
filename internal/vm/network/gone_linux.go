package network

import "golang.org/x/sys/unix"

// setGoneLimit: see TCP_USER_TIMEOUT in tcp(7).
func setGoneLimit(fd int) error {
	return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(goneLimit.Milliseconds()))
}
