//go:build linux

package machine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/lease"
)

// leaseLimit is how long a boot waits for a first lease. After it the machine
// goes on without a network, and KeepLease goes on asking.
const leaseLimit = 10 * time.Second

// lease has a server give the interface its address.
func (mk *maker) lease(link *netlink, n *guestv1.Network) error {
	mac, err := net.ParseMAC(n.GetMac())
	if err != nil {
		return err
	}
	index, err := mk.findInterface(n.GetMac())
	if err == nil {
		err = link.up(index, 0)
	}
	if err != nil {
		return fmt.Errorf("interface %s: %w", mac, err)
	}
	s := &leased{index: index, resolv: mk.resolvPath()}
	mk.keeper = lease.New(lease.Config{
		MAC: mac, Apply: s.apply,
		Open: func() (net.PacketConn, error) {
			i, err := net.InterfaceByIndex(int(index))
			if err != nil {
				return nil, err
			}
			return nclient4.NewRawUDPConn(i.Name, nclient4.ClientPort)
		},
		Say: func(format string, args ...any) { fmt.Fprintf(os.Stderr, "guestd: network: "+format+"\n", args...) },
	})
	mk.note("ask for an address")
	ctx, cancel := context.WithTimeout(context.Background(), leaseLimit)
	defer cancel()
	if err := mk.keeper.Ask(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "guestd: network: no address within %s, it goes on without: %v\n", leaseLimit, err)
	}
	return nil
}

// KeepLease keeps the address that a server gave the machine, or gets one, until
// its context ends. Of a machine whose address nobody gives it returns at once.
func (m *Made) KeepLease(ctx context.Context) {
	if m.keeper != nil {
		m.keeper.Keep(ctx)
	}
}

// leased sets an interface up as a lease says.
type leased struct {
	index  uint32
	resolv string
	now    *lease.Lease // nil: nothing is set up
}

// apply changes what differs from what is set up. What somebody inside made of
// it meanwhile stays, unless the server says something else than before.
func (s *leased) apply(l *lease.Lease) error {
	link, err := openNetlink()
	if err != nil {
		return err
	}
	defer link.close()
	if s.now != nil && (l == nil || l.Address != s.now.Address) {
		if err := link.deleteAddress(s.index, s.now.Address); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("take back address %s: %w", s.now.Address, err)
		}
		s.now = nil
	}
	if l == nil {
		return nil
	}
	before := s.now
	if before == nil {
		if err := link.addAddress(s.index, l.Address); err != nil {
			return fmt.Errorf("address %s: %w", l.Address, err)
		}
		before = &lease.Lease{Address: l.Address}
		s.now = before // so that it is taken back if the rest fails
	}
	if l.MTU != before.MTU {
		if err := link.up(s.index, l.MTU); err != nil {
			return fmt.Errorf("MTU %d: %w", l.MTU, err)
		}
	}
	if l.Gateway != before.Gateway && l.Gateway.IsValid() {
		if err := link.addDefaultRoute(s.index, l.Gateway); err != nil {
			return fmt.Errorf("gateway %s: %w", l.Gateway, err)
		}
	}
	if !slices.Equal(l.Nameservers, before.Nameservers) {
		if err := replaceFile(s.resolv, resolvFile(texts(l.Nameservers))); err != nil {
			return err
		}
	}
	s.now = l
	return nil
}

func texts(addresses []netip.Addr) []string {
	var all []string
	for _, a := range addresses {
		all = append(all, a.String())
	}
	return all
}
