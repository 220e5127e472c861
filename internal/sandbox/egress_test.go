package sandbox

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
)

func list(rules ...EgressRule) Egress { return Egress{Mode: EgressList, Rules: rules} }

func TestEgressValidateNamesTheField(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 64)
	for _, c := range []struct {
		field  string
		egress Egress
	}{
		{"e.mode", Egress{Mode: "maybe"}},
		{"e.rules", Egress{Rules: []EgressRule{{Name: "a.example"}}}},
		{"e.rules", Egress{Mode: EgressDeny, Rules: []EgressRule{{Name: "a.example"}}}},
		{"e.rules", list(make([]EgressRule, maxEgressRules+1)...)},
		{"e.rules[0]", list(EgressRule{})},
		{"e.rules[1]", list(EgressRule{Name: "a.example"}, EgressRule{Protocol: EgressTCP})},
		{"e.rules[0].cidr", list(EgressRule{Name: "a.example", CIDR: "10.0.0.0/8"})},
		{"e.rules[0].name", list(EgressRule{Name: "*"})},
		{"e.rules[0].name", list(EgressRule{Name: "*."})},
		{"e.rules[0].name", list(EgressRule{Name: "a.*.example"})},
		{"e.rules[0].name", list(EgressRule{Name: "*.*.example"})},
		{"e.rules[0].name", list(EgressRule{Name: "*a.example"})},
		{"e.rules[0].name", list(EgressRule{Name: ".example"})},
		{"e.rules[0].name", list(EgressRule{Name: "a..example"})},
		{"e.rules[0].name", list(EgressRule{Name: "-a.example"})},
		{"e.rules[0].name", list(EgressRule{Name: "a-.example"})},
		{"e.rules[0].name", list(EgressRule{Name: "a b.example"})},
		{"e.rules[0].name", list(EgressRule{Name: "ä.example"})},
		{"e.rules[0].name", list(EgressRule{Name: "a.example:443"})},
		{"e.rules[0].name", list(EgressRule{Name: "https://a.example"})},
		{"e.rules[0].name", list(EgressRule{Name: long + ".example"})},
		{"e.rules[0].name", list(EgressRule{Name: strings.Repeat("a.", 127) + "example"})},
		{"e.rules[0].name", list(EgressRule{Name: "192.0.2.1"})},
		{"e.rules[0].name", list(EgressRule{Name: "*.2.1"})},
		{"e.rules[0].cidr", list(EgressRule{CIDR: "192.0.2.1"})},
		{"e.rules[0].cidr", list(EgressRule{CIDR: "192.0.2.1/24"})},
		{"e.rules[0].cidr", list(EgressRule{CIDR: "192.0.2.0/33"})},
		{"e.rules[0].cidr", list(EgressRule{CIDR: "2001:db8::/32"})},
		{"e.rules[0].cidr", list(EgressRule{CIDR: "::ffff:192.0.2.0/120"})},
		{"e.rules[0].cidr", list(EgressRule{CIDR: "a.example"})},
		{"e.rules[0].protocol", list(EgressRule{Name: "a.example", Protocol: "sctp"})},
		{"e.rules[0].ports", list(EgressRule{Name: "a.example", Ports: make([]PortRange, maxEgressPorts+1)})},
		{"e.rules[0].ports[0].from", list(EgressRule{Name: "a.example", Ports: []PortRange{{To: 5}}})},
		{"e.rules[0].ports[1].to", list(EgressRule{Name: "a.example", Ports: []PortRange{{From: 1}, {From: 5, To: 4}}})},
	} {
		err := c.egress.Validate("e")
		if bad, ok := errors.AsType[*FieldError](err); !ok || bad.Field != c.field || !errors.Is(err, ErrInvalid) {
			t.Errorf("%+.80v: got %v, want a refusal of %s", c.egress, err, c.field)
		}
	}
}

func TestEgressValidateAcceptsAndNormalizes(t *testing.T) {
	t.Parallel()
	e := list(
		EgressRule{Name: "Registry.Example.COM."}, EgressRule{Name: "*.Example.com"}, EgressRule{Name: "registry"},
		EgressRule{Name: "_dns.xn--bcher-kva.example"}, EgressRule{CIDR: "0.0.0.0/0"},
		EgressRule{CIDR: "10.1.2.3/32", Protocol: EgressUDP, Ports: []PortRange{{From: 1, To: 65535}, {From: 53}}})
	if err := e.Validate("e"); err != nil {
		t.Fatal(err)
	}
	got := []string{e.Rules[0].Name, e.Rules[1].Name}
	if want := []string{"registry.example.com", "*.example.com"}; !slices.Equal(got, want) {
		t.Errorf("names: %v, want %v", got, want)
	}
	for _, e := range []Egress{{}, {Mode: EgressAllow, DenyPrivate: true}, {Mode: EgressDeny}, {Mode: EgressList}} {
		if err := e.Validate("e"); err != nil {
			t.Errorf("%+v: %v", e, err)
		}
	}
}

func TestEgressJSONNamesStay(t *testing.T) {
	t.Parallel()
	text, err := json.Marshal(Egress{Mode: EgressList, DenyPrivate: true, Rules: []EgressRule{
		{Name: "a.example", Ports: []PortRange{{From: 80}, {From: 443, To: 444}}, Protocol: EgressTCP}, {CIDR: "10.0.0.0/8"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"mode":"list","rules":[{"name":"a.example","ports":[{"from":80},{"from":443,"to":444}],"protocol":"tcp"},` +
		`{"cidr":"10.0.0.0/8"}],"deny_private":true}`
	if string(text) != want {
		t.Errorf("got  %s\nwant %s", text, want)
	}
	if text, _ := json.Marshal(Egress{}); string(text) != "{}" {
		t.Errorf("the zero policy is %s", text)
	}
}

func TestEgressCloneSharesNothing(t *testing.T) {
	t.Parallel()
	e := list(EgressRule{Name: "a.example", Ports: []PortRange{{From: 1}}})
	c := e.Clone()
	c.Rules[0].Name, c.Rules[0].Ports[0].From = "b.example", 2
	if e.Rules[0].Name != "a.example" || e.Rules[0].Ports[0].From != 1 {
		t.Errorf("the original changed: %+v", e)
	}
}

func TestPortRangeContains(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		r    PortRange
		port uint16
		want bool
	}{
		{PortRange{From: 80}, 80, true},
		{PortRange{From: 80}, 81, false},
		{PortRange{From: 80}, 79, false},
		{PortRange{From: 80, To: 82}, 82, true},
		{PortRange{From: 80, To: 82}, 83, false},
		{PortRange{From: 80, To: 82}, 1, false},
		{PortRange{From: 1, To: 65535}, 65535, true},
	} {
		if got := c.r.Contains(c.port); got != c.want {
			t.Errorf("%+v contains %d: %v", c.r, c.port, got)
		}
	}
}
