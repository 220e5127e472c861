//go:build linux

package reach

import (
	"context"
	"errors"
	"math"
	"net"
	"net/netip"
	"syscall"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

const (
	dialTimeout = 10 * time.Second
	// maxOwn is how many of the sandbox's own addresses are tried.
	maxOwn = 16
)

// connection is a *net.TCPConn or a *net.UDPConn.
type connection interface {
	net.Conn
	syscall.Conn
}

// dial connects to a port of this sandbox, wherever in it that is bound. If
// nothing is there the error wraps ECONNREFUSED.
func (s *Service) dial(ctx context.Context, number uint32, udp bool) (connection, error) {
	port, err := validPort(number)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	if udp {
		return s.dialUDP(ctx, port)
	}
	return dialTCP(ctx, port)
}

func validPort(port uint32) (uint16, error) {
	if port == 0 || port > math.MaxUint16 {
		return 0, failure(guestv1.Failure_CODE_INVALID, "port %d: not 1 to 65535", port)
	}
	return uint16(port), nil
}

// dialTCP tries the loopback addresses and then the sandbox's other ones. What
// it says went wrong is what the first said: 127.0.0.1 is always there, and
// speaks for a port that nothing listens on at all.
func dialTCP(ctx context.Context, port uint16) (*net.TCPConn, error) {
	dialer := net.Dialer{KeepAlive: -1} // of no use within one machine
	try := func(address netip.Addr) (*net.TCPConn, error) {
		return dialer.DialTCP(ctx, "tcp", netip.AddrPort{}, netip.AddrPortFrom(address, port))
	}
	conn, err := try(loopback4)
	if err == nil || !elsewhere(err) {
		return conn, err
	}
	if conn, second := try(loopback6); second == nil || !elsewhere(second) {
		return conn, second
	}
	for _, address := range ownAddresses() {
		if conn, other := try(address); other == nil {
			return conn, nil
		}
	}
	return nil, err
}

var (
	loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	loopback6 = netip.IPv6Loopback()
)

// elsewhere reports whether an error is that of one address.
func elsewhere(err error) bool {
	for _, errno := range []syscall.Errno{
		syscall.ECONNREFUSED, syscall.EADDRNOTAVAIL, syscall.ENETUNREACH,
		syscall.EHOSTUNREACH, syscall.EAFNOSUPPORT, syscall.ENETDOWN,
	} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// ownAddresses are those of the sandbox's interfaces but loopback, as far as
// they can be found out. Link-local ones, which mean nothing without their
// interface, are not among them.
func ownAddresses() []netip.Addr {
	interfaces, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	var own []netip.Addr
	for _, entry := range interfaces {
		network, ok := entry.(*net.IPNet)
		if !ok {
			continue
		}
		address, ok := netip.AddrFromSlice(network.IP)
		if address = address.Unmap(); ok && !address.IsLoopback() && !address.IsLinkLocalUnicast() && len(own) < maxOwn {
			own = append(own, address)
		}
	}
	return own
}

// dialUDP connects to where a socket is bound to the port: UDP has no refusal
// of its own, so the kernel's table is asked.
func (s *Service) dialUDP(ctx context.Context, port uint16) (*net.UDPConn, error) {
	var dialer net.Dialer
	refused := error(&net.OpError{Op: "dial", Net: "udp", Addr: &net.UDPAddr{IP: loopback4.AsSlice(), Port: int(port)}, Err: syscall.ECONNREFUSED})
	for _, address := range s.boundTo(port) {
		conn, err := dialer.DialUDP(ctx, "udp", netip.AddrPort{}, netip.AddrPortFrom(address, port))
		if err == nil || !elsewhere(err) {
			return conn, err
		}
		refused = err
	}
	return nil, refused
}

// boundTo returns the addresses at which a UDP port is reached, the best first.
func (s *Service) boundTo(port uint16) []netip.Addr {
	found, err := s.sockets(protocolUDP)
	if err != nil {
		return []netip.Addr{loopback4}
	}
	var four, six bool
	var addresses []netip.Addr
	for _, socket := range found {
		switch {
		case socket.port != port:
		case socket.address == loopback4 || socket.address == netip.IPv4Unspecified():
			four = true
		case socket.address == loopback6 || socket.address == netip.IPv6Unspecified():
			six = true
		case len(addresses) < maxOwn:
			addresses = append(addresses, socket.address)
		}
	}
	if six {
		addresses = append([]netip.Addr{loopback6, loopback4}, addresses...)
	}
	if four {
		addresses = append([]netip.Addr{loopback4}, addresses...)
	}
	return addresses
}
