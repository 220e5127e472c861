// Package network is the user-mode network of one virtual machine: a gateway
// with a TCP/IP stack of its own (gVisor's), which carries what the guest
// sends into sockets of this process, and lets through what a policy allows.
//
// The guest is 192.168.127.2/24, set up statically or by DHCP; the gateway,
// 192.168.127.1, is its DNS server and answers pings. There is IPv4 alone: no
// AAAA record is passed on, so that nobody waits for an address that cannot be
// had. Of the guest's ICMP only pings of the gateway are answered.
//
// The guest is not trusted. Whatever it sends is bounded in number and memory,
// what does not come from its own addresses is dropped, and what it does not
// read is lost and never waited for.
//
// Of gvisor-tap-vsock, which does the same for podman machine, this has the
// addresses and nothing else. Its switch learns addresses without bound and
// busy-waits for a guest that does not read, its forwarders and DNS server ask
// no policy and wait for nobody when they end, and all of it logs what guests
// do.
//
// The package does not know names on the wire: what a rule allows by name are
// the addresses that the name was resolved to, by this DNS server and for this
// guest. It opens no port of the host's.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/choiros/agent/internal/sandbox"
)

// The addresses, which are the same in every machine's network.
var (
	Guest   = netip.AddrFrom4([4]byte{192, 168, 127, 2})
	Gateway = netip.AddrFrom4([4]byte{192, 168, 127, 1})
)

// PrefixBits is the length of the network's prefix.
const PrefixBits = 24

// DefaultMTU is Ethernet's.
const DefaultMTU = 1500

// minMTU is what every IPv4 host accepts (RFC 791), maxMTU what fits a
// datagram of every kernel.
const (
	minMTU = 576
	maxMTU = 65000
)

const gatewayMAC = tcpip.LinkAddress("\x5a\x94\xef\xe4\x0c\xdd") // gvproxy's

const nic = 1

// Resolver answers DNS queries.
type Resolver interface {
	// Exchange returns the answer to a query with one question. Whatever the
	// answer's code, it is no error. It is safe for concurrent use.
	Exchange(ctx context.Context, query *dns.Msg) (*dns.Msg, error)
}

// Config is what a Network is made of.
type Config struct {
	// Link is this side's end of a pair of datagram sockets, as Pair makes
	// them. The network takes it over, also when it cannot be opened.
	Link *os.File
	// MAC is the guest's address; what comes from another is dropped.
	MAC net.HardwareAddr
	// MTU of the link; 0: DefaultMTU. DHCP tells the guest.
	MTU    int
	Egress sandbox.Egress
	// Resolver answers what the guest asks; nil: the host's resolvers do.
	Resolver Resolver
	// Log gets what concerns the network itself, and nothing of what the guest
	// does; nil: nowhere.
	Log *slog.Logger
	// Dial connects to an address that the policy allows, by "tcp" or "udp", and
	// returns a *net.TCPConn or a *net.UDPConn; nil: from the host, to anything
	// but the host's own addresses. It is there for tests, which have no other
	// host.
	Dial func(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error)
}

// Network is one machine's network.
type Network struct {
	log   *slog.Logger
	dial  func(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error)
	began time.Time
	link  *link
	stack *stack.Stack
	dns   *server
	names names

	policy  atomic.Pointer[policy]
	refused refusals
	buffers sync.Pool

	ctx    context.Context // its life, ended by Close
	cancel context.CancelFunc
	work   sync.WaitGroup // all goroutines

	tcp connections
	udp flows
}

// Open starts a network. The caller closes it.
func Open(cfg Config) (*Network, error) {
	n, err := open(cfg)
	if err != nil {
		return nil, fmt.Errorf("open the machine's network: %w", err)
	}
	return n, nil
}

func open(cfg Config) (*Network, error) {
	if cfg.Link == nil {
		return nil, errors.New("there is no link")
	}
	if cfg.MTU == 0 {
		cfg.MTU = DefaultMTU
	}
	policy, err := newPolicy(cfg.Egress)
	switch {
	case err != nil:
	case len(cfg.MAC) != header.EthernetAddressSize || cfg.MAC[0]&1 != 0 || tcpip.LinkAddress(cfg.MAC) == gatewayMAC:
		err = fmt.Errorf("%s is not the MAC address of one machine", cfg.MAC)
	case cfg.MTU < minMTU || cfg.MTU > maxMTU:
		err = fmt.Errorf("an MTU of %d is not from %d to %d", cfg.MTU, minMTU, maxMTU)
	}
	if err != nil {
		cfg.Link.Close()
		return nil, err
	}
	n := &Network{log: cfg.Log, dial: cfg.Dial, began: time.Now()}
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
	if n.dial == nil {
		n.dial = dialHost
	}
	if cfg.Resolver == nil {
		cfg.Resolver = hostResolver()
	}
	n.policy.Store(policy)
	n.buffers.New = func() any { b := make([]byte, copySize); return &b }
	if n.link, err = newLink(cfg.Link, cfg.MAC, cfg.MTU); err != nil {
		return nil, fmt.Errorf("use the link: %w", err)
	}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.dns = &server{network: n, upstream: cfg.Resolver, slots: make(chan struct{}, maxQueries), streams: make(chan struct{}, maxStreams)}
	if err := n.makeStack(); err != nil {
		n.cancel()
		n.link.shut()
		return nil, fmt.Errorf("make the stack: %w", err)
	}
	n.work.Go(n.link.drain)
	n.work.Go(n.receive)
	return n, nil
}

// awake is a clock in nanoseconds that nobody sets, and that stands still while
// the host sleeps.
func (n *Network) awake() int64 { return int64(time.Since(n.began)) }

func (n *Network) makeStack() error {
	n.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	for _, err := range []tcpip.Error{
		n.stack.CreateNIC(nic, n.link),
		n.stack.AddProtocolAddress(nic, tcpip.ProtocolAddress{
			Protocol:          ipv4.ProtocolNumber,
			AddressWithPrefix: tcpip.AddressWithPrefix{Address: address(Gateway), PrefixLen: PrefixBits},
		}, stack.AddressProperties{}),
		// It answers in the name of every address there is.
		n.stack.SetPromiscuousMode(nic, true),
		n.stack.SetSpoofing(nic, true),
	} {
		if err != nil {
			n.stack.Destroy()
			return errors.New(err.String())
		}
	}
	n.stack.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nic}})
	n.limitTCP()
	n.tcp.open(n)
	n.udp.open(n)
	return nil
}

func address(a netip.Addr) tcpip.Address { return tcpip.AddrFrom4(a.As4()) }

func addrPort(a tcpip.Address, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4(a.As4()), port)
}

// receive takes in what the guest sends.
func (n *Network) receive() {
	if err := n.link.receive(n.take); err != nil {
		n.log.Warn("network link is broken", "error", err)
	}
}

// Close ends the network with all its connections, which are reset, and
// returns once nothing of it is left. It may be called again.
func (n *Network) Close() error {
	n.cancel()
	n.tcp.abort(func(*connection) bool { return true })
	n.udp.abort(func(*flow) bool { return true })
	n.link.shut()
	n.stack.Close()
	n.work.Wait()
	n.stack.Wait()
	return nil
}

// SetEgress applies a policy. Once it returns nothing that the policy does not
// allow is open any more; what had been allowed by a name that the policy
// allows as well goes on. A policy that is wrong changes nothing.
func (n *Network) SetEgress(e sandbox.Egress) error {
	p, err := newPolicy(e)
	if err != nil {
		return fmt.Errorf("set the machine's egress policy: %w", err)
	}
	// Whatever begins looks at the policy after it was entered below: what
	// looked too early is found there.
	n.policy.Store(p)
	n.names.keep(p.resolves)
	n.tcp.abort(func(c *connection) bool {
		return c.to.Addr() != Gateway && !n.allowed(c.to, sandbox.EgressTCP, c.names)
	})
	n.udp.abort(func(f *flow) bool { return !n.allowed(f.key.to, sandbox.EgressUDP, f.names) })
	return nil
}

// allowed reports whether the policy lets the guest connect, where had are
// names that the address had before.
func (n *Network) allowed(to netip.AddrPort, protocol sandbox.EgressProtocol, had []string) bool {
	return n.policy.Load().connects(to, protocol, append(n.names.of(to.Addr()), had...))
}

// refuse counts a destination that the guest is kept from.
func (n *Network) refuse(to netip.AddrPort, protocol sandbox.EgressProtocol) {
	n.refused.add(to.Addr().String(), to.Port(), string(protocol))
}

// Refused returns the destinations that the policy kept the guest from, the
// latest first: the last 64.
func (n *Network) Refused() []sandbox.Refusal { return n.refused.list() }

// Stats are counts since the network was opened, as the guest sees it.
type Stats struct {
	// BytesSent and BytesReceived are of frames.
	BytesSent, BytesReceived   uint64
	FramesSent, FramesReceived uint64
	// Spoofed frames came from an address that is not the guest's, Ignored ones
	// were of a kind that this network has not. Lost ones the guest did not read.
	Spoofed, Ignored, Lost uint64

	// TCP connections and UDP flows there are now, and that there were.
	TCPOpen, UDPOpen   int
	TCPTotal, UDPTotal uint64
	Queries            uint64 // to the DNS server
	Refused            uint64 // connections, flows and names, all of them
}

// Stats returns the network's counts.
func (n *Network) Stats() Stats {
	s := Stats{
		BytesSent: n.link.bytesIn.Load(), FramesSent: n.link.framesIn.Load(),
		BytesReceived: n.link.bytesOut.Load(), FramesReceived: n.link.framesOut.Load(),
		Spoofed: n.link.spoofed.Load(), Ignored: n.link.ignored.Load(), Lost: n.link.lost.Load(),
		Queries: n.dns.queries.Load(), Refused: n.refused.sum(),
	}
	s.TCPOpen, s.TCPTotal = n.tcp.count()
	s.UDPOpen, s.UDPTotal = n.udp.count()
	return s
}
