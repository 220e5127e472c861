package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// dialTimeout is how long a host may take to accept. The guest repeats its SYN
// for longer, and so sees a timeout and not a refusal.
const dialTimeout = 30 * time.Second

// A connection whose far side is gone without a word, as after a sleep of the
// host's or in another network, ends within goneLimit of the host's time awake:
// by keepalive where nothing is under way, and where something is because it
// is not acknowledged.
const (
	probeIdle, probeInterval, probeCount = time.Minute, 15 * time.Second, 9

	goneLimit = probeIdle + probeCount*probeInterval
)

// errOwn says that an address is the host's own.
var errOwn = errors.New("the host itself is out of reach")

// hostAddrs are the host's addresses at this moment, with their prefixes.
func hostAddrs() ([]netip.Prefix, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var found []netip.Prefix
	for _, a := range addrs {
		ipNet, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		addr, ok := netip.AddrFromSlice(ipNet.IP)
		if !ok || !addr.Unmap().Is4() {
			continue
		}
		if ones, bits := ipNet.Mask.Size(); bits == 32 {
			found = append(found, netip.PrefixFrom(addr.Unmap(), ones))
		}
	}
	return found, nil
}

// own reports whether addr is one of the host's own addresses, or the
// broadcast address of a network that it is in.
func own(host []netip.Prefix, addr netip.Addr) bool {
	for _, p := range host {
		if p.Addr() == addr || p.Bits() < 31 && broadcast(p) == addr {
			return true
		}
	}
	return false
}

func broadcast(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	for bit := p.Bits(); bit < 32; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	return netip.AddrFrom4(b)
}

// dialHost connects from the host to anything but the host.
func dialHost(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	host, err := hostAddrs()
	if err != nil {
		return nil, fmt.Errorf("look up the host's own addresses: %w", err)
	}
	if own(host, to.Addr()) {
		return nil, errOwn
	}
	// A route may make more addresses local than the interfaces have: a
	// datagram socket tells where the kernel would connect from, and sends
	// nothing.
	conn, err := dialer(withoutBroadcast).DialContext(ctx, "udp4", to.String())
	if err != nil {
		return nil, err
	}
	if err := leavesHost(conn, to); err != nil {
		return nil, err
	}
	if network == "udp" {
		return conn, nil
	}
	conn.Close()
	if conn, err = dialer(endIfGone).DialContext(ctx, "tcp4", to.String()); err != nil {
		return nil, err
	}
	if err := leavesHost(conn, to); err != nil {
		return nil, err
	}
	return conn, nil
}

func dialer(control func(network, address string, raw syscall.RawConn) error) *net.Dialer {
	return &net.Dialer{
		Timeout:         dialTimeout,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: probeIdle, Interval: probeInterval, Count: probeCount},
		Control:         control,
	}
}

// withoutBroadcast has the kernel refuse what a route says to be broadcast,
// which Go's sockets may send.
func withoutBroadcast(_, _ string, raw syscall.RawConn) error {
	var err error
	if control := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 0)
	}); control != nil {
		return control
	}
	return os.NewSyscallError("setsockopt", err)
}

// endIfGone has the kernel end a connection on which it was sent no
// acknowledgement for goneLimit, and not for a quarter of an hour as it would.
func endIfGone(_, _ string, raw syscall.RawConn) error {
	return raw.Control(func(fd uintptr) { _ = setGoneLimit(int(fd)) }) // or else it takes longer
}

// leavesHost closes conn, and says why, if it leads to the host itself: what is
// local is connected to from its own address, or from the loopback.
func leavesHost(conn net.Conn, to netip.AddrPort) error {
	local, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err == nil && local.Addr() != to.Addr() && !local.Addr().IsLoopback() {
		return nil
	}
	conn.Close()
	return errors.Join(err, errOwn)
}
