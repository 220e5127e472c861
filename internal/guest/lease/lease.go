// Package lease has one interface of a machine's given an address by a DHCP
// server (RFC 2131), and keeps it for as long as the server lets it.
//
// It does not believe what a server says: on a network of several machines
// each of them can play the server. What it takes are plain IPv4 addresses,
// and nothing else of an answer. It sets nothing up itself, asks for no name
// and runs no script.
package lease

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

const (
	// leastTime is the shortest lease that is taken: a shorter one would have
	// the machine ask all the time.
	leastTime = time.Minute
	// mostTime is how long one is kept without asking, whatever was said.
	mostTime = 24 * time.Hour
	// An MTU beyond these is left out: RFC 1122 asks for the one, and no
	// Ethernet has more than the other.
	leastMTU, mostMTU = 576, 9000
	// maxNameservers is how many the C library asks; see resolv.conf(5).
	maxNameservers = 3
)

// Lease is what a server gives.
type Lease struct {
	// Address with the length of the network's prefix.
	Address netip.Prefix
	// Gateway is in that network; invalid: there is none.
	Gateway     netip.Addr
	Nameservers []netip.Addr // at most 3
	MTU         uint32       // 0: nothing is said of it
}

// terms are a lease, and until when.
type terms struct {
	Lease
	server netip.Addr
	// From when the lease is given on: when to ask the server for more time,
	// when to ask any, and when it is over.
	renew, rebind, expire time.Duration
}

// read reads the acknowledgement of a lease.
func read(ack *dhcpv4.DHCPv4) (terms, error) {
	var t terms
	var err error
	if t.server, err = host(ack.ServerIdentifier()); err != nil {
		return t, fmt.Errorf("server: %w", err)
	}
	if t.Address, err = address(ack); err != nil {
		return t, fmt.Errorf("address: %w", err)
	}
	if routers := ack.Router(); len(routers) > 0 {
		if t.Gateway, err = host(routers[0]); err == nil {
			err = checkIn(t.Address, t.Gateway)
		}
		if err == nil && t.Gateway == t.Address.Addr() {
			err = errors.New("it is the machine's own")
		}
		if err != nil {
			return t, fmt.Errorf("gateway: %w", err)
		}
	}
	for _, server := range ack.DNS() {
		if a, err := host(server); err == nil && len(t.Nameservers) < maxNameservers {
			t.Nameservers = append(t.Nameservers, a)
		}
	}
	if mtu, err := dhcpv4.GetUint16(dhcpv4.OptionInterfaceMTU, ack.Options); err == nil && mtu >= leastMTU && mtu <= mostMTU {
		t.MTU = uint32(mtu)
	}
	given := ack.IPAddressLeaseTime(0)
	if given < leastTime {
		return t, fmt.Errorf("it is given for %s, less than %s", given, leastTime)
	}
	t.expire = min(given, mostTime)
	t.renew, t.rebind = t.expire/2, t.expire*7/8 // RFC 2131, 4.4.5
	renew, rebind := ack.IPAddressRenewalTime(0), ack.IPAddressRebindingTime(0)
	if leastTime/2 <= renew && renew < rebind && rebind < t.expire {
		t.renew, t.rebind = renew, rebind
	}
	return t, nil
}

// address is the one that is given.
func address(ack *dhcpv4.DHCPv4) (netip.Prefix, error) {
	a, err := host(ack.YourIPAddr)
	if err != nil {
		return netip.Prefix{}, err
	}
	ones, bits := ack.SubnetMask().Size()
	if bits != 32 || ones < 8 || ones > 30 {
		return netip.Prefix{}, fmt.Errorf("%s has the mask %s, which is that of no network", a, ack.SubnetMask())
	}
	prefix := netip.PrefixFrom(a, ones)
	return prefix, checkIn(prefix, a)
}

// checkIn refuses what is no host's address within a network.
func checkIn(network netip.Prefix, a netip.Addr) error {
	first := network.Masked().Addr()
	if !network.Contains(a) || a == first || a == last(network) {
		return fmt.Errorf("%s is none of a host in %s", a, network.Masked())
	}
	return nil
}

// last is the broadcast address of a network.
func last(network netip.Prefix) netip.Addr {
	a := network.Addr().As4()
	mask := net.CIDRMask(network.Bits(), 32)
	for i := range a {
		a[i] |= ^mask[i]
	}
	return netip.AddrFrom4(a)
}

// host is an address that one host can have.
func host(ip net.IP) (netip.Addr, error) {
	a, ok := netip.AddrFromSlice(ip.To4())
	switch {
	case !ok:
		return a, errors.New("there is none")
	case a.As4()[0] == 0 || a.As4()[0] >= 224 || a.IsLoopback() || a.IsLinkLocalUnicast():
		return netip.Addr{}, fmt.Errorf("%s is no address of a host", a)
	}
	return a, nil
}
