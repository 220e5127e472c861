package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"

	"github.com/choiros/agent/internal/sandbox"
)

// zone is what the tests' resolver knows.
var zone = []string{
	"a.example. 60 IN A 203.0.113.5",
	"a.example. 60 IN AAAA 2001:db8::5",
	`a.example. 60 IN TXT "hello"`,
	"a.example. 60 IN HTTPS 1 . alpn=h2 ipv4hint=203.0.113.5 ipv6hint=2001:db8::5",
	"alias.example. 60 IN CNAME b.example.",
	"b.example. 60 IN CNAME c.other.",
	"c.other. 60 IN A 203.0.113.5",
	"c.other. 60 IN A 127.0.0.1",
	"rebind.example. 60 IN A 127.0.0.1",
	"rebind.example. 60 IN A 169.254.169.254",
	"private.example. 60 IN A 10.9.8.7",
	"six.example. 60 IN AAAA 2001:db8::6",
}

// ask sends a query over the link.
func (g *guest) ask(network string, m *dns.Msg) *dns.Msg {
	g.Helper()
	var conn net.Conn
	if network == "tcp" {
		conn = g.dial("192.168.127.1:53")
	} else {
		conn = g.dialUDP("192.168.127.1:53")
	}
	defer conn.Close()
	c := dns.Conn{Conn: conn}
	if _, ok := conn.(*gonet.UDPConn); ok {
		c.UDPSize = dns.MaxMsgSize
		raw, err := m.Pack()
		if err != nil {
			g.Fatal(err)
		}
		_, err = conn.Write(raw)
		if err != nil {
			g.Fatal(err)
		}
		buf := make([]byte, dns.MaxMsgSize)
		n, err := conn.Read(buf)
		if err != nil {
			g.Fatalf("ask: %v", err)
		}
		reply := new(dns.Msg)
		if err := reply.Unpack(buf[:n]); err != nil {
			g.Fatal(err)
		}
		return reply
	}
	if err := c.WriteMsg(m); err != nil {
		g.Fatal(err)
	}
	reply, err := c.ReadMsg()
	if err != nil {
		g.Fatalf("ask: %v", err)
	}
	return reply
}

func query(name string, kind uint16) *dns.Msg { return new(dns.Msg).SetQuestion(name, kind) }

// says is what an answer comes to.
func says(m *dns.Msg) string {
	parts := []string{dns.RcodeToString[m.Rcode]}
	for _, rr := range m.Answer {
		parts = append(parts, strings.TrimSpace(strings.TrimPrefix(rr.String(), rr.Header().String())))
	}
	return strings.Join(parts, " ")
}

func TestDNSAnswersAsThePolicySays(t *testing.T) {
	t.Parallel()
	listed := list(sandbox.EgressRule{Name: "a.example"}, sandbox.EgressRule{Name: "alias.example"}, sandbox.EgressRule{CIDR: "10.0.0.0/8"})
	for _, c := range []struct {
		egress sandbox.Egress
		name   string
		kind   uint16
		want   string
	}{
		{sandbox.Egress{}, "a.example.", dns.TypeA, "NOERROR 203.0.113.5"},
		{sandbox.Egress{}, "A.Example.", dns.TypeA, "NOERROR 203.0.113.5"},
		{sandbox.Egress{}, "a.example.", dns.TypeAAAA, "NOERROR"},
		{sandbox.Egress{}, "six.example.", dns.TypeAAAA, "NOERROR"},
		{sandbox.Egress{}, "a.example.", dns.TypeTXT, `NOERROR "hello"`},
		{sandbox.Egress{}, "a.example.", dns.TypeHTTPS, `NOERROR 1 . alpn="h2"`},
		{sandbox.Egress{}, "alias.example.", dns.TypeA, "NOERROR b.example. c.other. 203.0.113.5"},
		{sandbox.Egress{}, "rebind.example.", dns.TypeA, "NOERROR"},
		{sandbox.Egress{}, "private.example.", dns.TypeA, "NOERROR 10.9.8.7"},
		{sandbox.Egress{DenyPrivate: true}, "private.example.", dns.TypeA, "NOERROR"},
		{sandbox.Egress{}, "absent.example.", dns.TypeA, "NXDOMAIN"},
		{sandbox.Egress{}, "absent.example.", dns.TypeAAAA, "NXDOMAIN"},
		{sandbox.Egress{Mode: sandbox.EgressDeny}, "a.example.", dns.TypeA, "REFUSED"},
		{listed, "a.example.", dns.TypeA, "NOERROR 203.0.113.5"},
		{listed, "alias.example.", dns.TypeA, "NOERROR b.example. c.other. 203.0.113.5"},
		{listed, "b.example.", dns.TypeA, "REFUSED"},
		{listed, "c.other.", dns.TypeTXT, "REFUSED"},
		{listed, ".", dns.TypeNS, "REFUSED"},
	} {
		upstream := &resolver{records: zone}
		n, g := start(t, Config{Egress: c.egress, Resolver: upstream})
		for _, network := range []string{"udp", "tcp"} {
			m := g.ask(network, query(c.name, c.kind))
			if got := says(m); got != c.want || !m.RecursionAvailable {
				t.Errorf("%+v: %s %s over %s: %s, want %s", c.egress, c.name, dns.TypeToString[c.kind], network, got, c.want)
			}
		}
		name := strings.ToLower(strings.TrimSuffix(c.name, "."))
		if got, want := refused(n), []string{"dns " + name + ":53 x2"}; c.want == "REFUSED" && !slices.Equal(got, want) {
			t.Errorf("refused: %v, want %v", got, want)
		}
		if c.want == "REFUSED" && len(upstream.asked) > 0 {
			t.Errorf("%s was asked for outside", c.name)
		}
	}
}

func TestNamesOpenTheirAddressesOnTheirPorts(t *testing.T) {
	t.Parallel()
	open := serveTCP(t, echo)
	other := serveTCP(t, echo)
	port := netip.MustParseAddrPort(open).Port()
	n, g := start(t, Config{
		Resolver: &resolver{records: zone},
		Egress:   list(sandbox.EgressRule{Name: "alias.example", Ports: []sandbox.PortRange{{From: port}}, Protocol: sandbox.EgressTCP}),
	})
	if _, err := g.tryDial(open); err == nil {
		t.Error("open before it was asked for")
	}
	if got := says(g.ask("udp", query("alias.example.", dns.TypeA))); !strings.Contains(got, far) {
		t.Fatal(got)
	}
	g.dial(open)
	if _, err := g.tryDial(other); err == nil {
		t.Error("another port is open")
	}
	if got := refused(n); len(got) != 2 {
		t.Errorf("refused: %v", got)
	}
}

func TestSetEgressIsAppliedLive(t *testing.T) {
	t.Parallel()
	addr, udpAddr := serveTCP(t, echo), serveUDP(t, echoUDP)
	n, g := start(t, Config{Resolver: &resolver{records: zone}})
	g.ask("udp", query("a.example.", dns.TypeA))
	conn, flow := g.dial(addr), g.dialUDP(udpAddr)
	alive := func() bool {
		_ = conn.SetDeadline(time.Now().Add(limit))
		_, _ = conn.Write([]byte("x"))
		_, err := conn.Read(make([]byte, 1))
		return err == nil
	}
	_, _ = flow.Write([]byte("x"))
	if _, err := flow.Read(make([]byte, 1)); err != nil || !alive() {
		t.Fatal("not alive", err)
	}
	set := func(e sandbox.Egress) {
		t.Helper()
		if err := n.SetEgress(e); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.SetEgress(sandbox.Egress{Mode: "maybe"}); !errors.Is(err, sandbox.ErrInvalid) || !alive() {
		t.Errorf("a wrong policy: %v", err)
	}
	// What it was resolved from is still allowed.
	set(list(sandbox.EgressRule{Name: "a.example"}, sandbox.EgressRule{Name: "b.example"}))
	if !alive() {
		t.Error("an allowed connection was ended")
	}
	g.dial(addr)
	if s := n.Stats(); s.UDPOpen != 1 || s.TCPOpen != 2 {
		t.Errorf("%+v", s)
	}
	// Nor is what is allowed by another rule.
	set(list(sandbox.EgressRule{CIDR: far + "/32", Protocol: sandbox.EgressTCP}))
	if !alive() {
		t.Error("an allowed connection was ended")
	}
	eventually(t, "the flow is gone", func() bool { return n.Stats().UDPOpen == 0 })
	// The name is forgotten, not to come back.
	set(list(sandbox.EgressRule{Name: "b.example"}))
	if alive() {
		t.Error("a connection that is not allowed goes on")
	}
	set(list(sandbox.EgressRule{Name: "a.example"}))
	if _, err := g.tryDial(addr); err == nil {
		t.Error("a name that had been dropped is remembered")
	}
	eventually(t, "all are gone", func() bool { return n.Stats().TCPOpen == 0 })
	set(sandbox.Egress{})
	conn = g.dial(addr)
	set(sandbox.Egress{Mode: sandbox.EgressDeny})
	if alive() {
		t.Error("a connection goes on under deny")
	}
}

func TestDNSKeepsEDNSAndTruncates(t *testing.T) {
	t.Parallel()
	upstream := &resolver{}
	for i := range 100 {
		upstream.records = append(upstream.records, fmt.Sprintf("many.example. 60 IN A 203.0.113.%d", i+1))
	}
	_, g := start(t, Config{Resolver: upstream})
	for _, c := range []struct {
		network   string
		edns      uint16
		least     int
		most      int
		truncated bool
	}{
		{"udp", 0, 10, 30, true},
		{"udp", 700, 30, 50, true},
		{"udp", 4096, 60, 80, true},
		{"udp", 1, 10, 30, true},
		{"tcp", 0, 100, 100, false},
		{"tcp", 512, 100, 100, false},
	} {
		q := query("many.example.", dns.TypeA)
		if c.edns != 0 {
			q.SetEdns0(c.edns, true)
		}
		m := g.ask(c.network, q)
		edns := m.IsEdns0()
		if (edns != nil) != (c.edns != 0) || edns != nil && !edns.Do() {
			t.Errorf("%+v: EDNS %v", c, edns)
		}
		if m.Truncated != c.truncated || len(m.Answer) < c.least || len(m.Answer) > c.most {
			t.Errorf("%+v: %d answers, truncated: %v", c, len(m.Answer), m.Truncated)
		}
	}
	asked := upstream.asked[len(upstream.asked)-1]
	if edns := asked.IsEdns0(); edns == nil || !edns.Do() || edns.UDPSize() != udpAnswer {
		t.Errorf("upstream was asked with %v", edns)
	}
}

func TestDNSRefusesWhatIsNoQuery(t *testing.T) {
	t.Parallel()
	upstream := &resolver{records: zone, edit: func(m *dns.Msg) error {
		switch m.Question[0].Name {
		case "broken.example.":
			return errors.New("no server answers")
		case "failed.example.":
			m.Rcode = dns.RcodeServerFailure
		case "bogus.example.":
			m.Rcode = dns.RcodeBadVers
		}
		return nil
	}}
	n, _ := start(t, Config{Resolver: upstream})
	edit := func(f func(*dns.Msg)) []byte {
		m := query("a.example.", dns.TypeA)
		m.Id = 0x1234
		f(m)
		raw, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	named := func(name string) []byte { return edit(func(m *dns.Msg) { m.Question[0].Name = name }) }
	for name, c := range map[string]struct {
		query []byte
		want  int // -1: no answer
	}{
		"two questions": {edit(func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }), dns.RcodeFormatError},
		"no question":   {edit(func(m *dns.Msg) { m.Question = nil }), dns.RcodeFormatError},
		"update":        {edit(func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }), dns.RcodeNotImplemented},
		"chaos":         {edit(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }), dns.RcodeRefused},
		"transfer":      {edit(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAXFR }), dns.RcodeRefused},
		"EDNS 1":        {edit(func(m *dns.Msg) { m.SetEdns0(512, false); m.IsEdns0().SetVersion(1) }), dns.RcodeBadVers},
		"a response":    {edit(func(m *dns.Msg) { m.Response = true }), -1},
		"garbage":       {append(edit(func(*dns.Msg) {})[:14], 0xff), dns.RcodeFormatError},
		"short":         {[]byte{1, 2, 3}, -1},
		"nobody":        {named("broken.example."), dns.RcodeServerFailure},
		"SERVFAIL":      {named("failed.example."), dns.RcodeServerFailure},
		"extended code": {named("bogus.example."), dns.RcodeServerFailure},
	} {
		raw := n.dns.answer(t.Context(), c.query, false)
		if c.want < 0 {
			if raw != nil {
				t.Errorf("%s: answered", name)
			}
			continue
		}
		m := new(dns.Msg)
		if err := m.Unpack(raw); err != nil || m.Rcode != c.want || !m.Response || m.Id != 0x1234 {
			t.Errorf("%s: %v, %v", name, m, err)
		}
	}
}

func TestOnlyAliasesOfTheQuestionAreRemembered(t *testing.T) {
	t.Parallel()
	n, _ := start(t, Config{Egress: list(sandbox.EgressRule{Name: "a.example"})})
	var answer []dns.RR
	for _, line := range []string{
		"evil.example. 60 IN A 203.0.113.66", "c.example. 60 IN A 203.0.113.3", "b.example. 60 IN CNAME c.example.",
		"a.example. 60 IN CNAME B.example.", "x.example. 60 IN CNAME evil.example.",
	} {
		rr, err := dns.NewRR(line)
		if err != nil {
			t.Fatal(err)
		}
		answer = append(answer, rr)
	}
	n.dns.remember("a.example", answer)
	if diff := cmp.Diff([]string{"a.example"}, n.names.of(addr4("203.0.113.3"))); diff != "" {
		t.Error(diff)
	}
	if got := n.names.of(addr4("203.0.113.66")); len(got) != 0 {
		t.Errorf("a stranger's address is remembered for %v", got)
	}
}

// FuzzDNS asks whatever there is.
func FuzzDNS(f *testing.F) {
	for _, kind := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeANY, dns.TypeHTTPS} {
		m := query("alias.example.", kind)
		m.SetEdns0(4096, true)
		raw, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, true)
		f.Add(raw[:len(raw)-3], false)
	}
	n, _ := start(f, Config{Resolver: &resolver{records: zone}, Egress: list(sandbox.EgressRule{Name: "*.example"})})
	f.Fuzz(func(t *testing.T, raw []byte, overTCP bool) {
		reply := n.dns.answer(t.Context(), raw, overTCP)
		if reply == nil {
			return
		}
		if len(raw) < 2 || string(reply[:2]) != string(raw[:2]) {
			t.Fatalf("another id: %x for %x", reply, raw)
		}
		if !overTCP && len(reply) > udpAnswer+512 {
			t.Fatalf("%d bytes over UDP", len(reply))
		}
		m := new(dns.Msg)
		if err := m.Unpack(reply); err != nil {
			t.Fatalf("%x for %x: %v", reply, raw, err)
		}
		for _, rr := range m.Answer {
			if a, ok := rr.(*dns.A); ok && a.A.IsLoopback() {
				t.Fatalf("%v", m)
			}
		}
	})
}
