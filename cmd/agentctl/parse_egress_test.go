package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

func TestEgressIsReadAndWritten(t *testing.T) {
	t.Parallel()
	list := func(rules ...*agentv1.EgressRule) *agentv1.Egress {
		return &agentv1.Egress{Mode: agentv1.Egress_MODE_LIST, Rules: rules}
	}
	ports := func(numbers ...uint32) (ranges []*agentv1.PortRange) {
		for i := 0; i < len(numbers); i += 2 {
			ranges = append(ranges, &agentv1.PortRange{From: numbers[i], To: numbers[i+1]})
		}
		return ranges
	}
	for text, want := range map[string]*agentv1.Egress{
		"allow":              {Mode: agentv1.Egress_MODE_ALLOW},
		"deny":               {Mode: agentv1.Egress_MODE_DENY},
		"allow,deny-private": {Mode: agentv1.Egress_MODE_ALLOW, DenyPrivate: true},
		"example.com":        list(&agentv1.EgressRule{Name: "example.com"}),
		"*.example.com:443/tcp": list(&agentv1.EgressRule{
			Name: "*.example.com", Ports: ports(443, 0), Protocol: agentv1.EgressRule_PROTOCOL_TCP,
		}),
		"10.0.0.0/8:53+8000-8999/udp": list(&agentv1.EgressRule{
			Cidr: "10.0.0.0/8", Ports: ports(53, 0, 8000, 8999), Protocol: agentv1.EgressRule_PROTOCOL_UDP,
		}),
		"0.0.0.0/0,xn--caf-dma.example:80": list(&agentv1.EgressRule{Cidr: "0.0.0.0/0"},
			&agentv1.EgressRule{Name: "xn--caf-dma.example", Ports: ports(80, 0)}),
	} {
		got, err := parseEgress(text)
		if diff := cmp.Diff(want, got, protocmp.Transform()); err != nil || diff != "" {
			t.Errorf("%s: %v (-want +got):\n%s", text, err, diff)
			continue
		}
		if back := strings.Join(egressWords(got), ","); back != text {
			t.Errorf("%s is written as %s", text, back)
		}
	}
	for text, want := range map[string]string{
		"deny-private":           "allow,deny-private",
		"192.0.2.7":              "192.0.2.7/32",
		" example.com:443 , a.b": "example.com:443,a.b",
	} {
		if got, err := parseEgress(text); err != nil || strings.Join(egressWords(got), ",") != want {
			t.Errorf("%s: %v, %v; want %s", text, got, err, want)
		}
	}
	for _, text := range []string{
		"", ",", "allow,deny", "allow,example.com", "example.com,deny", ":443", "/tcp", "example.com:", "example.com:0",
		"example.com:65536", "example.com:9-8", "example.com:1-", "example.com:80+", "example.com/icmp", "10.0.0.0/8/9",
		"2001:db8::/32", "10.0.0.0/33",
	} {
		if got, err := parseEgress(text); err == nil {
			t.Errorf("%q was taken for %v", text, got)
		}
	}
}

func FuzzEgress(f *testing.F) {
	for _, seed := range []string{"allow", "deny,deny-private", "*.example.com:443/tcp,10.0.0.0/8:53+8000-8999/udp", "192.0.2.7"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		e, err := parseEgress(text)
		if err != nil {
			return
		}
		again, err := egressOf(egressWords(e))
		if diff := cmp.Diff(e, again, protocmp.Transform()); err != nil || diff != "" {
			t.Errorf("%q is read back otherwise: %v\n%s", text, err, diff)
		}
	})
}
