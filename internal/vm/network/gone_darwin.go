package network

import "golang.org/x/sys/unix"

// setGoneLimit: see TCP_RXT_CONNDROPTIME in netinet/tcp.h.
func setGoneLimit(fd int) error {
	return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_RXT_CONNDROPTIME, int(goneLimit.Seconds()))
}
