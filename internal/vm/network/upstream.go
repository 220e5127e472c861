package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	resolvConf = "/etc/resolv.conf"
	// maxServers is MAXNS of resolv.conf(5), maxServerTimeout bounds its timeout.
	maxServers       = 3
	maxServerTimeout = 3 * time.Second
)

// servers asks the name servers of a resolv.conf, which is read again when it
// has changed. The zero value with a path is ready for use.
type servers struct {
	path string

	mu       sync.Mutex
	read     os.FileInfo // of what was read
	list     []string    // host:port
	timeout  time.Duration
	attempts int
}

// Exchange asks one server after the other. The first answer that says
// something about the name counts.
func (s *servers) Exchange(ctx context.Context, query *dns.Msg) (*dns.Msg, error) {
	list, timeout, attempts, err := s.current()
	if err != nil {
		return nil, err
	}
	var (
		last     *dns.Msg
		failures []error
	)
	for range attempts {
		for _, server := range list {
			m, err := askWithin(ctx, timeout, server, query)
			switch {
			case ctx.Err() != nil:
				return nil, errors.Join(append(failures, ctx.Err())...)
			case err != nil:
				failures = append(failures, fmt.Errorf("ask %s: %w", server, err))
			case m.Rcode == dns.RcodeServerFailure, m.Rcode == dns.RcodeRefused, m.Rcode == dns.RcodeNotImplemented:
				last = m // as in glibc another may know
			default:
				return m, nil
			}
		}
		if last != nil {
			return last, nil
		}
	}
	return nil, errors.Join(failures...)
}

func askWithin(ctx context.Context, timeout time.Duration, server string, query *dns.Msg) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return ask(ctx, server, query)
}

// ask asks over UDP and, if the answer is too long for that, over TCP.
func ask(ctx context.Context, server string, query *dns.Msg) (*dns.Msg, error) {
	for _, network := range []string{"udp", "tcp"} {
		client := dns.Client{Net: network, UDPSize: udpAnswer}
		m, _, err := client.ExchangeContext(ctx, query, server)
		switch {
		case err != nil:
			return nil, err
		case !m.Response || len(m.Question) != 1 || !sameQuestion(m.Question[0], query.Question[0]):
			return nil, errors.New("the answer is to another question")
		case !m.Truncated:
			return m, nil
		}
	}
	return nil, errors.New("the answer is truncated over TCP, too")
}

func sameQuestion(a, b dns.Question) bool {
	return a.Qtype == b.Qtype && a.Qclass == b.Qclass && plainName(a.Name) == plainName(b.Name)
}

// current returns the servers to ask, their timeout, and how often.
func (s *servers) current() ([]string, time.Duration, int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	info, err := os.Stat(s.path)
	if err != nil {
		return nil, 0, 0, err
	}
	if s.read != nil && os.SameFile(info, s.read) && info.ModTime().Equal(s.read.ModTime()) && info.Size() == s.read.Size() {
		return s.list, s.timeout, s.attempts, nil
	}
	config, err := dns.ClientConfigFromFile(s.path)
	if err != nil {
		return nil, 0, 0, fmt.Errorf("read %s: %w", s.path, err)
	}
	s.read, s.list = info, nil
	for _, server := range config.Servers[:min(len(config.Servers), maxServers)] {
		s.list = append(s.list, net.JoinHostPort(server, config.Port))
	}
	if len(s.list) == 0 {
		s.list = []string{net.JoinHostPort("127.0.0.1", strconv.Itoa(dnsPort))} // resolv.conf(5)
	}
	s.timeout = min(max(time.Duration(config.Timeout)*time.Second, time.Second), maxServerTimeout)
	s.attempts = min(max(config.Attempts, 1), 2)
	return s.list, s.timeout, s.attempts, nil
}

// systemTTL is for answers that come without one.
const systemTTL = 60

// system has the operating system resolve addresses, which on macOS alone
// knows which resolver is for which domain, and others the rest.
type system struct {
	resolver *net.Resolver
	others   Resolver
}

// Exchange answers questions for addresses from what the system knows. It
// cannot tell a name without addresses from one that does not exist: both are
// NXDOMAIN.
func (s system) Exchange(ctx context.Context, query *dns.Msg) (*dns.Msg, error) {
	q, m := query.Question[0], new(dns.Msg).SetReply(query)
	switch q.Qtype {
	case dns.TypeAAAA:
		return m, nil
	case dns.TypeA:
	default:
		return s.others.Exchange(ctx, query)
	}
	addrs, err := s.resolver.LookupNetIP(ctx, "ip4", q.Name)
	if notFound, ok := errors.AsType[*net.DNSError](err); ok && notFound.IsNotFound {
		m.Rcode = dns.RcodeNameError
		return m, nil
	}
	if err != nil {
		return nil, err
	}
	for _, addr := range addrs {
		m.Answer = append(m.Answer, &dns.A{
			Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: systemTTL},
			A:   netip.Addr.AsSlice(addr.Unmap()),
		})
	}
	return m, nil
}
