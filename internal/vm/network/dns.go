package network

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
)

const (
	dnsPort = 53
	// maxQueries are asked at a time, and maxStreams connections be open to the
	// DNS server. What comes beyond that is dropped.
	maxQueries = 128
	maxStreams = 16
	// queryTimeout is for all resolvers together, a little longer than a guest's
	// own patience with one.
	queryTimeout  = 8 * time.Second
	streamTimeout = 15 * time.Second
	// udpAnswer is the longest answer over UDP, which fits every link:
	// dnsflagday.net/2020.
	udpAnswer = 1232
)

// server is the DNS server, at the gateway's address. It keeps nothing of what
// it passes on but which addresses a name was given.
type server struct {
	network  *Network
	upstream Resolver
	slots    chan struct{} // one for each query that is being answered
	streams  chan struct{} // one for each connection
	queries  atomic.Uint64
}

// datagram answers a query that came over UDP.
func (s *server) datagram(from uint16, query []byte) {
	select {
	case s.slots <- struct{}{}:
	default:
		return // the guest asks again
	}
	s.network.work.Go(func() {
		defer func() { <-s.slots }()
		if reply := s.answer(s.network.ctx, query, false); reply != nil {
			s.network.sendUDP(netip.AddrPortFrom(Gateway, dnsPort), netip.AddrPortFrom(Guest, from), reply)
		}
	})
}

// stream answers queries over TCP, one after the other, until ctx or the guest
// ends them.
func (s *server) stream(ctx context.Context, conn *gonet.TCPConn) {
	select {
	case s.streams <- struct{}{}:
	default:
		return
	}
	defer func() { <-s.streams }()
	framed := dns.Conn{Conn: conn}
	for {
		if err := conn.SetDeadline(time.Now().Add(streamTimeout)); err != nil {
			return
		}
		query := make([]byte, dns.MaxMsgSize)
		n, err := framed.Read(query)
		if err != nil {
			return
		}
		reply := s.answer(ctx, query[:n], true)
		if reply == nil {
			return
		}
		if _, err := framed.Write(reply); err != nil {
			return
		}
	}
}

// answer returns what to answer a query with; nil: nothing.
func (s *server) answer(ctx context.Context, query []byte, overTCP bool) []byte {
	s.queries.Add(1)
	q := new(dns.Msg)
	if err := q.Unpack(query); err != nil {
		return s.malformed(query)
	}
	if q.Response {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	reply := s.reply(ctx, q)
	reply.Compress = true
	size := dns.MaxMsgSize
	edns := q.IsEdns0()
	if !overTCP {
		size = dns.MinMsgSize
		if edns != nil {
			size = min(max(int(edns.UDPSize()), dns.MinMsgSize), udpAnswer)
		}
	}
	if edns != nil {
		opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		opt.SetUDPSize(udpAnswer)
		if edns.Do() {
			opt.SetDo()
		}
		reply.Extra = append(reply.Extra, opt)
	}
	if reply.Rcode > 0xf && edns == nil {
		reply.Rcode = dns.RcodeServerFailure // it cannot be said without EDNS
	}
	reply.Truncate(size)
	packed, err := reply.Pack()
	if err != nil {
		failed := new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)
		if packed, err = failed.Pack(); err != nil {
			return nil
		}
	}
	return packed
}

// malformed answers what is no message but has the beginning of a query.
func (s *server) malformed(query []byte) []byte {
	const header, response = 12, 0x80
	if len(query) < header || query[2]&response != 0 {
		return nil
	}
	reply := make([]byte, header)
	copy(reply, query[:2])
	reply[2], reply[3] = response|query[2]&0x79, dns.RcodeFormatError // the opcode and RD stay
	return reply
}

// reply answers q, without EDNS.
func (s *server) reply(ctx context.Context, q *dns.Msg) *dns.Msg {
	failed := func(code int) *dns.Msg {
		m := new(dns.Msg).SetRcode(q, code)
		m.RecursionAvailable = true
		return m
	}
	switch edns := q.IsEdns0(); {
	case q.Opcode != dns.OpcodeQuery:
		return failed(dns.RcodeNotImplemented)
	case len(q.Question) != 1:
		return failed(dns.RcodeFormatError)
	case edns != nil && edns.Version() != 0:
		return failed(dns.RcodeBadVers)
	case q.Question[0].Qclass != dns.ClassINET, q.Question[0].Qtype == dns.TypeAXFR, q.Question[0].Qtype == dns.TypeIXFR:
		return failed(dns.RcodeRefused)
	}
	policy, name := s.network.policy.Load(), plainName(q.Question[0].Name)
	if !policy.resolves(name) {
		s.network.refused.add(name, dnsPort, "dns")
		return failed(dns.RcodeRefused)
	}
	found, err := s.upstream.Exchange(ctx, upstreamQuery(q))
	if err != nil || found == nil {
		return failed(dns.RcodeServerFailure)
	}
	m := failed(found.Rcode)
	m.AuthenticatedData = found.AuthenticatedData
	own, err := hostAddrs()
	if err != nil {
		return failed(dns.RcodeServerFailure)
	}
	f := filter{policy: policy, host: own}
	m.Answer, m.Ns, m.Extra = f.keep(found.Answer), f.keep(found.Ns), f.keep(found.Extra)
	if f.changed {
		m.AuthenticatedData = false
	}
	s.remember(name, m.Answer)
	return m
}

// plainName is a name as rules have it.
func plainName(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) }

// upstreamQuery asks what q asks. EDNS is between two neighbours, so it is made
// anew: RFC 6891, section 6.1.
func upstreamQuery(q *dns.Msg) *dns.Msg {
	m := new(dns.Msg)
	m.Id = dns.Id()
	m.RecursionDesired, m.CheckingDisabled = true, q.CheckingDisabled
	m.AuthenticatedData = q.AuthenticatedData
	m.Question = q.Question
	if edns := q.IsEdns0(); edns != nil {
		m.SetEdns0(udpAnswer, edns.Do())
	}
	return m
}

// filter takes out of answers what the guest could not or must not reach.
type filter struct {
	policy  *policy
	host    []netip.Prefix
	changed bool
}

func (f *filter) keep(records []dns.RR) []dns.RR {
	var kept []dns.RR
	for _, rr := range records {
		switch r := rr.(type) {
		case *dns.OPT:
			continue
		case *dns.AAAA:
			f.changed = true
			continue
		case *dns.A:
			addr, ok := netip.AddrFromSlice(r.A.To4())
			if !ok || !f.policy.admits(addr) || own(f.host, addr) {
				f.changed = true
				continue
			}
		case *dns.HTTPS:
			f.dropHints(&r.SVCB)
		case *dns.SVCB:
			f.dropHints(r)
		}
		kept = append(kept, rr)
	}
	return kept
}

// dropHints leaves addresses to questions for them, whose answers are
// remembered.
func (f *filter) dropHints(r *dns.SVCB) {
	before := len(r.Value)
	r.Value = slices.DeleteFunc(r.Value, func(v dns.SVCBKeyValue) bool {
		return v.Key() == dns.SVCB_IPV4HINT || v.Key() == dns.SVCB_IPV6HINT
	})
	f.changed = f.changed || len(r.Value) != before
}

// remember notes the addresses that name was given, by itself or through
// aliases.
func (s *server) remember(name string, answer []dns.RR) {
	aliases := map[string]bool{name: true}
	for range answer { // aliases may come in any order
		known := len(aliases)
		for _, rr := range answer {
			if r, ok := rr.(*dns.CNAME); ok && aliases[plainName(r.Hdr.Name)] {
				aliases[plainName(r.Target)] = true
			}
		}
		if len(aliases) == known {
			break
		}
	}
	for _, rr := range answer {
		r, ok := rr.(*dns.A)
		if !ok || !aliases[plainName(r.Hdr.Name)] {
			continue
		}
		if addr, ok := netip.AddrFromSlice(r.A.To4()); ok {
			s.network.names.remember(name, addr, time.Duration(r.Hdr.Ttl)*time.Second)
		}
	}
}
