package forward

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

var (
	errInUse      = errors.New("in use by another program")
	errNoAddress  = errors.New("no address of this host")
	errNotAllowed = errors.New("not allowed")
)

// probe returns nil if nobody listens on the port, whatever the address: who
// says localhost may mean 127.0.0.1 or ::1, and a port that answers at another
// address is taken in the eyes of people. The error wraps errInUse,
// errNoAddress or errNotAllowed.
//
// It binds for a moment without listening. TCP sockets do that with
// SO_REUSEADDR, as any listener does: then what is left of closed connections
// (TIME_WAIT) is no hindrance, but on Linux a listener is one, at any address
// that overlaps. Other systems let a listener at one address be overlaid by
// one at an overlapping other, so there each usual address is tried.
func probe(udp bool, at netip.AddrPort) error {
	port := at.Port()
	addrs := []netip.Addr{at.Addr(), netip.IPv6Unspecified(), netip.IPv4Unspecified()}
	if runtime.GOOS != "linux" {
		addrs = append(addrs, netip.IPv6Loopback(), netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	}
	for i, addr := range addrs {
		err := bindOnce(udp, netip.AddrPortFrom(addr, port))
		switch {
		case err == nil:
		case errors.Is(err, unix.EADDRINUSE):
			return errInUse
		case i > 0: // such as a host without IPv6
		case errors.Is(err, unix.EADDRNOTAVAIL), errors.Is(err, unix.EAFNOSUPPORT):
			return errNoAddress
		case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
			return errNotAllowed
		default:
			return err
		}
	}
	return nil
}

// bindOnce binds and closes again. At :: it binds for IPv4 too.
func bindOnce(udp bool, at netip.AddrPort) error {
	family, kind := unix.AF_INET, unix.SOCK_STREAM
	var name unix.Sockaddr
	if addr := at.Addr(); addr.Is4() {
		name = &unix.SockaddrInet4{Port: int(at.Port()), Addr: addr.As4()}
	} else {
		name6 := &unix.SockaddrInet6{Port: int(at.Port()), Addr: addr.As16()}
		if zone := addr.Zone(); zone != "" {
			device, err := net.InterfaceByName(zone)
			if err != nil {
				return unix.EADDRNOTAVAIL
			}
			name6.ZoneId = uint32(device.Index)
		}
		family, name = unix.AF_INET6, name6
	}
	if udp {
		kind = unix.SOCK_DGRAM
	}
	// Not every system has SOCK_CLOEXEC.
	syscall.ForkLock.RLock()
	fd, err := unix.Socket(family, kind, 0)
	if err == nil {
		unix.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	if family == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0); err != nil {
			return fmt.Errorf("IPV6_V6ONLY: %w", err)
		}
	}
	if !udp {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return fmt.Errorf("SO_REUSEADDR: %w", err)
		}
	}
	return unix.Bind(fd, name)
}
