package network

import (
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/sandbox"
)

func list(rules ...sandbox.EgressRule) sandbox.Egress {
	return sandbox.Egress{Mode: sandbox.EgressList, Rules: rules}
}

func TestPolicyConnects(t *testing.T) {
	t.Parallel()
	https := []sandbox.PortRange{{From: 443}}
	mixed := list(
		sandbox.EgressRule{Name: "a.example", Ports: https, Protocol: sandbox.EgressTCP},
		sandbox.EgressRule{Name: "*.b.example"},
		sandbox.EgressRule{CIDR: "10.1.0.0/16", Ports: []sandbox.PortRange{{From: 8000, To: 8010}}},
		sandbox.EgressRule{CIDR: "0.0.0.0/0", Ports: []sandbox.PortRange{{From: 123}}, Protocol: sandbox.EgressUDP})
	closed := mixed.Clone()
	closed.DenyPrivate = true
	for _, c := range []struct {
		egress   sandbox.Egress
		to       string
		protocol sandbox.EgressProtocol
		name     string
		want     bool
	}{
		{sandbox.Egress{}, "203.0.113.1:1", sandbox.EgressTCP, "", true},
		{sandbox.Egress{}, "10.0.0.1:22", sandbox.EgressTCP, "", true},
		{sandbox.Egress{DenyPrivate: true}, "203.0.113.1:1", sandbox.EgressTCP, "", true},
		{sandbox.Egress{DenyPrivate: true}, "10.0.0.1:22", sandbox.EgressTCP, "", false},
		{sandbox.Egress{DenyPrivate: true}, "172.31.0.1:22", sandbox.EgressTCP, "", false},
		{sandbox.Egress{DenyPrivate: true}, "172.32.0.1:22", sandbox.EgressTCP, "", true},
		{sandbox.Egress{DenyPrivate: true}, "192.168.1.1:22", sandbox.EgressTCP, "a.example", false},
		{sandbox.Egress{DenyPrivate: true}, "100.64.0.1:22", sandbox.EgressTCP, "", false},
		{sandbox.Egress{Mode: sandbox.EgressDeny}, "203.0.113.1:1", sandbox.EgressTCP, "a.example", false},
		{list(), "203.0.113.1:1", sandbox.EgressTCP, "", false},
		{mixed, "203.0.113.1:443", sandbox.EgressTCP, "", false},
		{mixed, "203.0.113.1:443", sandbox.EgressTCP, "a.example", true},
		{mixed, "203.0.113.1:443", sandbox.EgressUDP, "a.example", false},
		{mixed, "203.0.113.1:80", sandbox.EgressTCP, "a.example", false},
		{mixed, "203.0.113.1:443", sandbox.EgressTCP, "x.a.example", false},
		{mixed, "203.0.113.1:80", sandbox.EgressUDP, "x.y.b.example", true},
		{mixed, "203.0.113.1:80", sandbox.EgressUDP, "b.example", false},
		{mixed, "203.0.113.1:80", sandbox.EgressUDP, "xb.example", false},
		{mixed, "10.1.2.3:8000", sandbox.EgressTCP, "", true},
		{mixed, "10.1.2.3:8011", sandbox.EgressTCP, "", false},
		{mixed, "10.2.2.3:8000", sandbox.EgressTCP, "", false},
		{mixed, "10.2.2.3:8000", sandbox.EgressTCP, "x.b.example", true},
		{closed, "10.2.2.3:8000", sandbox.EgressTCP, "x.b.example", true}, // 0.0.0.0/0 has it
		{mixed, "203.0.113.1:123", sandbox.EgressUDP, "", true},
		{mixed, "203.0.113.1:123", sandbox.EgressTCP, "", false},
	} {
		p, err := newPolicy(c.egress)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		if c.name != "" {
			names = []string{"other.example", c.name}
		}
		if got := p.connects(netip.MustParseAddrPort(c.to), c.protocol, names); got != c.want {
			t.Errorf("%+v: %s %s %s: %v, want %v", c.egress, c.protocol, c.to, c.name, got, c.want)
		}
	}
}

func TestNoPolicyMakesTheNeverReachableReachable(t *testing.T) {
	t.Parallel()
	all := list(sandbox.EgressRule{CIDR: "0.0.0.0/0"}, sandbox.EgressRule{Name: "*.example"}, sandbox.EgressRule{Name: "localhost"})
	for _, addr := range []string{
		"0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.254", "169.254.169.254", "169.254.0.1", "100.100.100.200",
		"168.63.129.16", "192.0.0.192", "192.168.127.1", "192.168.127.2", "192.168.127.255", "224.0.0.251",
		"239.255.255.250", "240.0.0.1", "255.255.255.255",
	} {
		all.Rules = append(all.Rules, sandbox.EgressRule{CIDR: addr + "/32"})
		for _, egress := range []sandbox.Egress{{}, all} {
			p, err := newPolicy(egress)
			if err != nil {
				t.Fatal(err)
			}
			a := netip.MustParseAddr(addr)
			if p.connects(netip.AddrPortFrom(a, 80), sandbox.EgressTCP, []string{"a.example", "localhost"}) || p.admits(a) {
				t.Errorf("%s is reachable under %s", addr, egress.Mode)
			}
		}
	}
}

func TestPolicyResolves(t *testing.T) {
	t.Parallel()
	p, err := newPolicy(list(sandbox.EgressRule{Name: "A.Example."}, sandbox.EgressRule{Name: "*.b.example"}, sandbox.EgressRule{CIDR: "0.0.0.0/0"}))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{
		"a.example": true, "x.b.example": true, "x.y.b.example": true,
		"": false, "b.example": false, "example": false, "aa.example": false, "x.a.example": false, "a.example.evil": false,
		`x\.b.example`: false, ".b.example": false,
	} {
		if got := p.resolves(name); got != want {
			t.Errorf("%q: %v", name, got)
		}
	}
}

func TestNamesHoldForTheirTTLAndAMinuteAtLeast(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var n names
		a, b := netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2")
		n.remember("short.example", a, 0)
		n.remember("long.example", a, 5*time.Minute)
		n.remember("endless.example", b, 1<<40)
		time.Sleep(minTTL - time.Second)
		if diff := cmp.Diff([]string{"short.example", "long.example"}, n.of(a)); diff != "" {
			t.Errorf("within a minute: %s", diff)
		}
		n.remember("long.example", a, 0) // does not shorten
		time.Sleep(2 * time.Second)
		if diff := cmp.Diff([]string{"long.example"}, n.of(a)); diff != "" {
			t.Errorf("after a minute: %s", diff)
		}
		n.remember("long.example", a, 10*time.Minute)
		time.Sleep(9 * time.Minute)
		if diff := cmp.Diff([]string{"long.example"}, n.of(a)); diff != "" {
			t.Errorf("renewed: %s", diff)
		}
		time.Sleep(24 * time.Hour)
		if got := append(n.of(a), n.of(b)...); len(got) != 0 {
			t.Errorf("a day later: %v", got)
		}
	})
}

func TestNamesAreBounded(t *testing.T) {
	t.Parallel()
	var n names
	first, addr := netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("10.0.0.0")
	n.remember("first.example", first, minTTL)
	for i := range 3 * maxNames {
		addr = addr.Next()
		n.remember(fmt.Sprintf("n%d.example", i), addr, time.Hour)
		if len(n.until) > maxNames || len(n.byAddr) > maxNames {
			t.Fatalf("%d names of %d addresses after %d", len(n.until), len(n.byAddr), i)
		}
	}
	if got := n.of(first); len(got) != 0 {
		t.Errorf("what would be over first was kept: %v", got)
	}
	if got := n.of(addr); len(got) != 1 {
		t.Errorf("the latest was forgotten: %v", got)
	}
	n.keep(func(name string) bool { return name == n.byAddr[addr][0] })
	if len(n.until) != 1 || len(n.byAddr) != 1 {
		t.Errorf("%d names of %d addresses are left of one", len(n.until), len(n.byAddr))
	}
}

func TestRefusalsAreCountedAndBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var r refusals
		for i := range 1000 {
			r.add(fmt.Sprintf("203.0.113.%d", i%100), uint16(i%100), "tcp")
			time.Sleep(time.Millisecond)
		}
		r.add("a.example", 53, "dns")
		r.add("a.example", 53, "dns")
		got := r.list()
		if len(got) != maxRefusals || r.sum() != 1002 {
			t.Fatalf("%d of %d", len(got), r.sum())
		}
		want := []sandbox.Refusal{
			{Destination: "a.example", Port: 53, Protocol: "dns", Count: 2, Last: time.Now()},
			{Destination: "203.0.113.99", Port: 99, Protocol: "tcp", Count: 1, Last: time.Now().Add(-time.Millisecond)},
		}
		if diff := cmp.Diff(want, got[:2]); diff != "" {
			t.Error(diff)
		}
	})
}

func TestOwnHasAddressesAndBroadcast(t *testing.T) {
	t.Parallel()
	host := []netip.Prefix{netip.MustParsePrefix("192.0.2.10/24"), netip.MustParsePrefix("10.9.8.7/9"), netip.MustParsePrefix("203.0.113.6/31")}
	for addr, want := range map[string]bool{
		"192.0.2.10": true, "192.0.2.255": true, "192.0.2.11": false, "10.127.255.255": true, "10.255.255.255": false,
		"203.0.113.6": true, "203.0.113.7": false,
	} {
		if got := own(host, netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: %v", addr, got)
		}
	}
}
