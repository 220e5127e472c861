package lease

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/insomniacslk/dhcp/dhcpv4"
)

// ackOf is an acknowledgement that is as it should be, but for what is changed.
func ackOf(t *testing.T, change ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	t.Helper()
	ack, err := dhcpv4.New(append([]dhcpv4.Modifier{
		dhcpv4.WithMessageType(dhcpv4.MessageTypeAck),
		dhcpv4.WithYourIP(net.IPv4(192, 168, 64, 7)),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(192, 168, 64, 1))),
		dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
		dhcpv4.WithOption(dhcpv4.OptRouter(net.IPv4(192, 168, 64, 1))),
		dhcpv4.WithOption(dhcpv4.OptDNS(net.IPv4(192, 168, 64, 1))),
		dhcpv4.WithLeaseTime(3600),
	}, change...)...)
	if err != nil {
		t.Fatal(err)
	}
	return ack
}

func seconds(code dhcpv4.GenericOptionCode, d time.Duration) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.Option{Code: code, Value: dhcpv4.Duration(d)})
}

const (
	renewalTime   = dhcpv4.GenericOptionCode(58)
	rebindingTime = dhcpv4.GenericOptionCode(59)
)

func usual() terms {
	server := netip.MustParseAddr("192.168.64.1")
	return terms{
		Lease:  Lease{Address: netip.MustParsePrefix("192.168.64.7/24"), Gateway: server, Nameservers: []netip.Addr{server}},
		server: server, renew: 30 * time.Minute, rebind: 52*time.Minute + 30*time.Second, expire: time.Hour,
	}
}

func TestLeaseIsRead(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change []dhcpv4.Modifier
		want   func(*terms)
	}{
		"usual":          {nil, func(*terms) {}},
		"no gateway":     {[]dhcpv4.Modifier{dhcpv4.WithoutOption(dhcpv4.OptionRouter)}, func(w *terms) { w.Gateway = netip.Addr{} }},
		"no nameservers": {[]dhcpv4.Modifier{dhcpv4.WithoutOption(dhcpv4.OptionDomainNameServer)}, func(w *terms) { w.Nameservers = nil }},
		"nameservers that are none, and too many": {
			[]dhcpv4.Modifier{dhcpv4.WithOption(dhcpv4.OptDNS(net.IPv4zero, net.IPv4(127, 0, 0, 1), net.IPv4(224, 0, 0, 1), net.IPv4(169, 254, 1, 1),
				net.IPv4(9, 9, 9, 9), net.IPv4(8, 8, 8, 8), net.IPv4(1, 1, 1, 1), net.IPv4(4, 4, 4, 4)))},
			func(w *terms) {
				w.Nameservers = []netip.Addr{netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("8.8.8.8"), netip.MustParseAddr("1.1.1.1")}
			},
		},
		"MTU":               {[]dhcpv4.Modifier{dhcpv4.WithGeneric(dhcpv4.OptionInterfaceMTU, []byte{0x05, 0x78})}, func(w *terms) { w.MTU = 1400 }},
		"a small MTU":       {[]dhcpv4.Modifier{dhcpv4.WithGeneric(dhcpv4.OptionInterfaceMTU, []byte{0, 68})}, func(*terms) {}},
		"a large MTU":       {[]dhcpv4.Modifier{dhcpv4.WithGeneric(dhcpv4.OptionInterfaceMTU, []byte{0xff, 0xff})}, func(*terms) {}},
		"half an MTU":       {[]dhcpv4.Modifier{dhcpv4.WithGeneric(dhcpv4.OptionInterfaceMTU, []byte{5})}, func(*terms) {}},
		"for ever":          {[]dhcpv4.Modifier{dhcpv4.WithLeaseTime(1<<32 - 1)}, func(w *terms) { w.renew, w.rebind, w.expire = 12*time.Hour, 21*time.Hour, 24*time.Hour }},
		"its own times":     {[]dhcpv4.Modifier{seconds(renewalTime, 10*time.Minute), seconds(rebindingTime, 20*time.Minute)}, func(w *terms) { w.renew, w.rebind = 10*time.Minute, 20*time.Minute }},
		"times upside down": {[]dhcpv4.Modifier{seconds(renewalTime, 20*time.Minute), seconds(rebindingTime, 10*time.Minute)}, func(*terms) {}},
		"times too late":    {[]dhcpv4.Modifier{seconds(renewalTime, time.Hour), seconds(rebindingTime, 2*time.Hour)}, func(*terms) {}},
		"times at once":     {[]dhcpv4.Modifier{seconds(renewalTime, time.Second), seconds(rebindingTime, 2*time.Second)}, func(*terms) {}},
	} {
		want := usual()
		c.want(&want)
		got, err := read(ackOf(t, c.change...))
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(terms{}), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); err != nil || diff != "" {
			t.Errorf("%s: %v\n%s", name, err, diff)
		}
	}
}

func TestLeaseThatIsNoneIsRefused(t *testing.T) {
	t.Parallel()
	yours := func(a, b, c, d byte) dhcpv4.Modifier { return dhcpv4.WithYourIP(net.IPv4(a, b, c, d)) }
	router := func(a, b, c, d byte) dhcpv4.Modifier {
		return dhcpv4.WithOption(dhcpv4.OptRouter(net.IPv4(a, b, c, d)))
	}
	for name, c := range map[string]struct {
		change dhcpv4.Modifier
		says   string
	}{
		"no server":                {dhcpv4.WithoutOption(dhcpv4.OptionServerIdentifier), "server: there is none"},
		"a group for a server":     {dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(224, 0, 0, 1))), "server: 224.0.0.1 is no address of a host"},
		"no address":               {yours(0, 0, 0, 0), "address: 0.0.0.0 is no address of a host"},
		"the loopback":             {yours(127, 0, 0, 1), "is no address of a host"},
		"everybody":                {yours(255, 255, 255, 255), "is no address of a host"},
		"a link-local address":     {yours(169, 254, 169, 254), "is no address of a host"},
		"the network itself":       {yours(192, 168, 64, 0), "is none of a host in 192.168.64.0/24"},
		"all of the network":       {yours(192, 168, 64, 255), "is none of a host in 192.168.64.0/24"},
		"no mask":                  {dhcpv4.WithoutOption(dhcpv4.OptionSubnetMask), "mask"},
		"the mask of all there is": {dhcpv4.WithNetmask(net.CIDRMask(0, 32)), "mask"},
		"the mask of one host":     {dhcpv4.WithNetmask(net.CIDRMask(32, 32)), "mask"},
		"a mask with holes":        {dhcpv4.WithNetmask(net.IPMask{255, 0, 255, 0}), "mask"},
		"a mask that is short":     {dhcpv4.WithGeneric(dhcpv4.OptionSubnetMask, []byte{255, 255}), "mask"},
		"a gateway elsewhere":      {router(10, 0, 0, 1), "gateway: 10.0.0.1 is none of a host in 192.168.64.0/24"},
		"itself for a gateway":     {router(192, 168, 64, 7), "gateway: it is the machine's own"},
		"the loopback for one":     {router(127, 0, 0, 1), "gateway: 127.0.0.1 is no address of a host"},
		"no time":                  {dhcpv4.WithoutOption(dhcpv4.OptionIPAddressLeaseTime), "given for 0s"},
		"too short a time":         {dhcpv4.WithLeaseTime(59), "given for 59s, less than 1m0s"},
	} {
		if got, err := read(ackOf(t, c.change)); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %+v, %v, want %q", name, got, err, c.says)
		}
	}
}

// FuzzRead looks whether what is taken of an answer is always what a host can have.
func FuzzRead(f *testing.F) {
	ack, err := dhcpv4.New(dhcpv4.WithMessageType(dhcpv4.MessageTypeAck), dhcpv4.WithYourIP(net.IPv4(10, 0, 0, 2)),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(10, 0, 0, 1))), dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
		dhcpv4.WithOption(dhcpv4.OptRouter(net.IPv4(10, 0, 0, 1))), dhcpv4.WithOption(dhcpv4.OptDNS(net.IPv4(10, 0, 0, 1))), dhcpv4.WithLeaseTime(600))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(ack.ToBytes())
	f.Fuzz(func(t *testing.T, message []byte) {
		ack, err := dhcpv4.FromBytes(message)
		if err != nil {
			return
		}
		l, err := read(ack)
		if err != nil {
			return
		}
		if !l.Address.IsValid() || !l.Address.Addr().Is4() || l.Gateway.IsValid() && !l.Address.Contains(l.Gateway) || len(l.Nameservers) > 3 {
			t.Errorf("taken: %+v", l)
		}
		if l.renew < leastTime/2 || l.rebind <= l.renew || l.expire <= l.rebind || l.expire > mostTime {
			t.Errorf("taken: %+v", l)
		}
	})
}
