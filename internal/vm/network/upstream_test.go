package network

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// nameServer answers on the loopback, over UDP and TCP at one port.
func nameServer(t *testing.T, answer func(w dns.ResponseWriter, q *dns.Msg)) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.ListenPacket("udp", l.Addr().String())
	if err != nil {
		l.Close()
		t.Skipf("the port is taken for UDP: %v", err)
	}
	for _, s := range []*dns.Server{{Listener: l}, {PacketConn: conn}} {
		started := make(chan struct{})
		s.Handler, s.NotifyStartedFunc = dns.HandlerFunc(answer), func() { close(started) }
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = s.ActivateAndServe()
		}()
		<-started
		t.Cleanup(func() {
			_ = s.Shutdown()
			<-done
		})
	}
	return l.Addr().String()
}

func answering(code int, records ...string) func(dns.ResponseWriter, *dns.Msg) {
	return func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetRcode(q, code)
		for _, line := range records {
			rr, err := dns.NewRR(line)
			if err != nil {
				panic(err)
			}
			m.Answer = append(m.Answer, rr)
		}
		if _, ok := w.RemoteAddr().(*net.UDPAddr); ok {
			m.Truncate(dns.MinMsgSize)
		}
		_ = w.WriteMsg(m)
	}
}

// fixed are servers that no file names.
func fixed(t *testing.T, list ...string) *servers {
	t.Helper()
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s := &servers{path: path}
	if _, _, _, err := s.current(); err != nil {
		t.Fatal(err)
	}
	s.list, s.timeout = list, time.Second
	return s
}

func TestServersAreAskedOneAfterTheOther(t *testing.T) {
	t.Parallel()
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	var asked atomic.Int64
	failing := nameServer(t, func(w dns.ResponseWriter, q *dns.Msg) {
		asked.Add(1)
		answering(dns.RcodeServerFailure)(w, q)
	})
	good := nameServer(t, answering(dns.RcodeSuccess, "a.example. 60 IN A 203.0.113.5"))
	absent := nameServer(t, answering(dns.RcodeNameError))
	liar := nameServer(t, func(w dns.ResponseWriter, q *dns.Msg) {
		q.Question[0].Name = "b.example."
		answering(dns.RcodeSuccess, "b.example. 60 IN A 203.0.113.66")(w, q)
	})
	for _, c := range []struct {
		list []string
		want string
	}{
		{[]string{good}, "NOERROR 203.0.113.5"},
		{[]string{"127.0.0.1:1", failing, silent.LocalAddr().String(), liar, good}, "NOERROR 203.0.113.5"},
		{[]string{absent, good}, "NXDOMAIN"},
		{[]string{failing}, "SERVFAIL"},
		{[]string{"127.0.0.1:1", failing}, "SERVFAIL"},
		{[]string{"127.0.0.1:1"}, ""},
		{[]string{liar}, ""},
	} {
		m, err := fixed(t, c.list...).Exchange(t.Context(), query("a.example.", dns.TypeA))
		switch {
		case c.want == "":
			if err == nil {
				t.Errorf("%v: %s", c.list, says(m))
			}
		case err != nil:
			t.Errorf("%v: %v", c.list, err)
		case says(m) != c.want:
			t.Errorf("%v: %s, want %s", c.list, says(m), c.want)
		}
	}
	if asked.Load() == 0 {
		t.Error("the failing server was not asked")
	}
}

func TestLongAnswersComeOverTCP(t *testing.T) {
	t.Parallel()
	var records []string
	for i := range 200 {
		records = append(records, fmt.Sprintf("many.example. 60 IN A 203.0.113.%d", i+1))
	}
	m, err := fixed(t, nameServer(t, answering(dns.RcodeSuccess, records...))).Exchange(t.Context(), query("many.example.", dns.TypeA))
	if err != nil || len(m.Answer) != 200 {
		t.Errorf("%v, %v", m, err)
	}
}

func TestExchangeEndsWithItsContext(t *testing.T) {
	t.Parallel()
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	begun := time.Now()
	if _, err := fixed(t, silent.LocalAddr().String()).Exchange(ctx, query("a.example.", dns.TypeA)); err == nil || time.Since(begun) > limit/2 {
		t.Errorf("%v after %s", err, time.Since(begun))
	}
}

func TestResolvConfIsReadAgainWhenItChanges(t *testing.T) {
	t.Parallel()
	s := &servers{path: filepath.Join(t.TempDir(), "resolv.conf")}
	write := func(text string) {
		t.Helper()
		next := s.path + ".next" // as most programs replace it
		if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, s.path); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Exchange(t.Context(), query("a.example.", dns.TypeA)); err == nil {
		t.Error("without a file it answers")
	}
	for text, want := range map[string]string{
		"nameserver 192.0.2.1\nnameserver 2001:db8::1\nsearch x.example\n":               "192.0.2.1:53 [2001:db8::1]:53 3s 2",
		"nameserver 192.0.2.2\noptions timeout:1 attempts:1\n":                           "192.0.2.2:53 1s 1",
		"nameserver 1.1.1.1\nnameserver 1.1.1.2\nnameserver 1.1.1.3\nnameserver 1.1.1.4": "1.1.1.1:53 1.1.1.2:53 1.1.1.3:53 3s 2",
		"# nothing": "127.0.0.1:53 3s 2",
	} {
		write(text)
		for range 2 {
			list, timeout, attempts, err := s.current()
			if got := fmt.Sprintf("%s %s %d", strings.Join(list, " "), timeout, attempts); err != nil || got != want {
				t.Errorf("%q: %s, %v, want %s", text, got, err, want)
			}
		}
	}
}

func TestSystemResolverAnswersForAddresses(t *testing.T) {
	t.Parallel()
	server := nameServer(t, func(w dns.ResponseWriter, q *dns.Msg) {
		if q.Question[0].Name == "a.example." && q.Question[0].Qtype == dns.TypeA {
			answering(dns.RcodeSuccess, "a.example. 60 IN A 203.0.113.5")(w, q)
			return
		}
		answering(dns.RcodeNameError)(w, q)
	})
	s := system{
		resolver: &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, server)
		}},
		others: &resolver{records: zone},
	}
	for _, c := range []struct {
		name string
		kind uint16
		want string
	}{
		{"a.example.", dns.TypeA, "NOERROR 203.0.113.5"},
		{"b.example.", dns.TypeA, "NXDOMAIN"},
		{"a.example.", dns.TypeAAAA, "NOERROR"},
		{"a.example.", dns.TypeTXT, `NOERROR "hello"`},
	} {
		m, err := s.Exchange(t.Context(), query(c.name, c.kind))
		if err != nil || says(m) != c.want {
			t.Errorf("%s %d: %v, %v, want %s", c.name, c.kind, m, err, c.want)
		}
	}
}
