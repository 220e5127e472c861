package forward

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDecide(t *testing.T) {
	t.Parallel()
	found := []Found{
		{8080, false, "127.0.0.1"},
		{8080, false, "::1"},
		{3000, false, "10.88.0.2"}, // refused there, and fine at the next
		{3000, false, "0.0.0.0"},
		{3001, false, "172.17.0.1"},
		{22, false, "0.0.0.0"},
		{2222, false, "0.0.0.0"},
		{68, true, "0.0.0.0"},
		{53, true, "127.0.0.53"},
		{5353, true, "224.0.0.251"},
		{5355, true, "::"},
		{5355, false, "::"},
		{4000, true, "0.0.0.0"},
		{40000, true, "0.0.0.0"},
		{40000, false, "0.0.0.0"},
		{5000, false, "nonsense"},
		{9000, false, ""},
		{0, false, "0.0.0.0"},
	}
	leases := []Lease{{GuestPort: 22, HostPort: 12000}, {GuestPort: 8080, HostPort: 12001, Auto: true}}
	policy := Policy{Mode: ModeForward, Deny: []PortRange{{Protocol: "tcp", First: 9000, Last: 9010}}}
	got, more := policy.Decide(found, leases)
	want := []Decision{
		{22, false, VerdictDeclared, ""},
		{53, true, VerdictRefuse, "53 (DNS) is never forwarded by itself"},
		{68, true, VerdictRefuse, "udp/67-68 (DHCP) is never forwarded by itself"},
		{2222, false, VerdictForward, ""},
		{3000, false, VerdictForward, ""},
		{3001, false, VerdictRefuse, "it listens at 172.17.0.1 alone, not on the sandbox's loopback"},
		{4000, true, VerdictForward, ""},
		{5000, false, VerdictRefuse, "the sandbox gave no address of it"},
		{5353, true, VerdictRefuse, "udp/5353 (mDNS) is never forwarded by itself"},
		{5355, false, VerdictRefuse, "5355 (LLMNR) is never forwarded by itself"},
		{5355, true, VerdictRefuse, "5355 (LLMNR) is never forwarded by itself"},
		{8080, false, VerdictForward, ""},
		{9000, false, VerdictRefuse, "tcp/9000-9010 is on this host's deny list"},
		{40000, false, VerdictForward, ""},
		{40000, true, VerdictRefuse, "it looks like a client's own port"},
	}
	if diff := cmp.Diff(want, got); diff != "" || more != 0 {
		t.Errorf("%d more; -want +got:\n%s", more, diff)
	}
	if got, _ := (Policy{}).Decide(found, leases); got != nil {
		t.Errorf("while off: %+v", got)
	}
	if got, _ := (Policy{Mode: ModeOffer}).Decide(found[:1], nil); len(got) != 1 || got[0].Verdict != VerdictOffer {
		t.Errorf("offered: %+v", got)
	}
}

func TestThousandsOfPortsAreBounded(t *testing.T) {
	t.Parallel()
	var found []Found
	for port := 1; port < 1<<16; port++ {
		found = append(found, Found{uint16(port), false, "0.0.0.0"}, Found{uint16(port), true, "0.0.0.0"})
	}
	lease := Lease{GuestPort: 30000, HostPort: 12000, Auto: true}
	got, more := Policy{Mode: ModeForward}.Decide(found, []Lease{lease})
	forwarded, kept := 0, false
	for _, d := range got {
		if d.Verdict == VerdictForward {
			forwarded++
			kept = kept || d.Port == 30000 && !d.UDP
		}
	}
	if len(got) != maxDecisions || more != len(found)-maxDecisions || forwarded != MaxAuto || !kept {
		t.Errorf("%d decisions and %d more, %d forwarded, the old one kept: %v", len(got), more, forwarded, kept)
	}
}

func FuzzParsePortRange(f *testing.F) {
	for _, seed := range []string{"22", "tcp/22", "udp/1-65535", "0", "65536", "5-4", "sctp/1", "tcp/", "1-", "-1", " 1", "+1", "1-2-3", strings.Repeat("9", 99)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r, err := ParsePortRange(text)
		if err != nil {
			if len(err.Error()) > 400 {
				t.Errorf("a long error: %v", err)
			}
			return
		}
		again, err := ParsePortRange(r.String())
		if err != nil || again != r || r.First == 0 || r.First > r.Last {
			t.Errorf("%q is %+v is %q is %+v, %v", text, r, r, again, err)
		}
	})
}

func FuzzDecide(f *testing.F) {
	f.Add(uint16(80), true, "::1", uint16(80), false, "fe80::1%eth0")
	f.Add(uint16(0), false, "", uint16(53), true, "\x00")
	f.Fuzz(func(t *testing.T, port uint16, udp bool, address string, other uint16, otherUDP bool, otherAddress string) {
		got, _ := Policy{Mode: ModeForward}.Decide([]Found{{port, udp, address}, {other, otherUDP, otherAddress}}, nil)
		seen := map[string]bool{}
		for _, d := range got {
			id := fmt.Sprint(d.Port, d.UDP)
			if seen[id] || d.Port == 0 || (d.Verdict == VerdictRefuse) != (d.Why != "") || len(d.Why) > 200 {
				t.Errorf("%+v", got)
			}
			seen[id] = true
		}
	})
}
