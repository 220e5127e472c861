package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// limit is for all that should take no time.
const limit = 20 * time.Second

var guestMAC = net.HardwareAddr{0x52, 0x54, 0, 1, 2, 3}

// far is where tests' servers seem to be: no address of this host.
const far = "203.0.113.5"

// loopback leads everything to the same port of the loopback, but for what has
// an error.
type loopback struct {
	mu     sync.Mutex
	errors map[string]error
	dials  int
}

func (l *loopback) dial(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	l.mu.Lock()
	err := l.errors[to.Addr().String()]
	l.dials++
	l.mu.Unlock()
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("connect", err)}
	}
	var d net.Dialer
	return d.DialContext(ctx, network, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), to.Port()).String())
}

// resolver answers from a table of zone file lines, by name and type.
type resolver struct {
	records []string
	mu      sync.Mutex
	asked   []*dns.Msg
	edit    func(*dns.Msg) error
}

func (r *resolver) Exchange(_ context.Context, query *dns.Msg) (*dns.Msg, error) {
	r.mu.Lock()
	r.asked = append(r.asked, query)
	r.mu.Unlock()
	m := new(dns.Msg).SetReply(query)
	m.RecursionAvailable = true
	names, found := map[string]bool{strings.ToLower(query.Question[0].Name): true}, false
	for _, line := range r.records {
		rr, err := dns.NewRR(line)
		if err != nil {
			return nil, err
		}
		if h := rr.Header(); names[strings.ToLower(h.Name)] {
			found = true
			if c, ok := rr.(*dns.CNAME); ok {
				names[c.Target] = true
				m.Answer = append(m.Answer, rr)
			} else if h.Rrtype == query.Question[0].Qtype {
				m.Answer = append(m.Answer, rr)
			}
		}
	}
	if !found {
		m.Rcode = dns.RcodeNameError
	}
	if r.edit != nil {
		if err := r.edit(m); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// start opens a network, with a guest at the other end of its link.
func start(t testing.TB, cfg Config) (*Network, *guest) {
	t.Helper()
	ours, theirs, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	cfg.Link, cfg.MAC = ours, guestMAC
	if cfg.Dial == nil {
		cfg.Dial = new(loopback).dial
	}
	if cfg.Resolver == nil {
		cfg.Resolver = &resolver{}
	}
	n, err := Open(cfg)
	if err != nil {
		theirs.Close()
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	mtu := cfg.MTU
	if mtu == 0 {
		mtu = DefaultMTU
	}
	return n, newGuest(t, theirs, mtu)
}

// guest is a machine with a TCP/IP stack of its own.
type guest struct {
	testing.TB
	link   *net.UnixConn
	stack  *stack.Stack
	frames *channel.Endpoint
	stop   func()
}

const guestBuffer = 128 << 10

func newGuest(t testing.TB, file *os.File, mtu int) *guest {
	t.Helper()
	conn, err := net.FileConn(file)
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{TB: t, link: conn.(*net.UnixConn), frames: channel.New(4096, uint32(mtu), tcpip.LinkAddress(guestMAC))}
	g.frames.LinkEPCapabilities = stack.CapabilityResolutionRequired
	g.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	gateway := address(Gateway)
	for _, err := range []tcpip.Error{
		g.stack.CreateNIC(nic, ethernet.New(g.frames)),
		g.stack.AddProtocolAddress(nic, tcpip.ProtocolAddress{
			Protocol:          ipv4.ProtocolNumber,
			AddressWithPrefix: tcpip.AddressWithPrefix{Address: address(Guest), PrefixLen: PrefixBits},
		}, stack.AddressProperties{}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	// Small buffers: what a test finds in memory is to be the network's.
	for _, option := range []tcpip.SettableTransportProtocolOption{
		&tcpip.TCPSendBufferSizeRangeOption{Min: 1, Default: guestBuffer, Max: guestBuffer},
		&tcpip.TCPReceiveBufferSizeRangeOption{Min: 1, Default: guestBuffer, Max: guestBuffer},
	} {
		if err := g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, option); err != nil {
			t.Fatal(err)
		}
	}
	net24 := tcpip.AddressWithPrefix{Address: gateway, PrefixLen: PrefixBits}.Subnet()
	g.stack.SetRouteTable([]tcpip.Route{{Destination: net24, NIC: nic}, {Destination: header.IPv4EmptySubnet, Gateway: gateway, NIC: nic}})
	var work sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	work.Go(func() {
		for {
			pkt := g.frames.ReadContext(ctx)
			if pkt == nil {
				return
			}
			g.link.Write(pkt.ToView().AsSlice())
			pkt.DecRef()
		}
	})
	work.Go(g.take)
	g.stop = sync.OnceFunc(func() {
		g.link.Close()
		g.stack.Close()
		cancel()
		work.Wait()
		g.stack.Wait()
	})
	t.Cleanup(g.stop)
	return g
}

func (g *guest) take() {
	buf := make([]byte, 1<<17)
	for {
		n, err := g.link.Read(buf)
		if err != nil {
			return
		}
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(buf[:n])})
		g.frames.InjectInbound(0, pkt)
		pkt.DecRef()
	}
}

func (g *guest) at(addr string) tcpip.FullAddress {
	g.Helper()
	a, err := netip.ParseAddrPort(addr)
	if err != nil {
		g.Fatal(err)
	}
	return tcpip.FullAddress{Addr: address(a.Addr()), Port: a.Port()}
}

func (g *guest) tryDial(addr string) (net.Conn, error) {
	g.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	conn, err := gonet.DialContextTCP(ctx, g.stack, g.at(addr), ipv4.ProtocolNumber)
	if err != nil {
		return nil, err
	}
	g.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(limit))
	return conn, nil
}

func (g *guest) dial(addr string) *gonet.TCPConn {
	g.Helper()
	conn, err := g.tryDial(addr)
	if err != nil {
		g.Fatalf("dial %s: %v", addr, err)
	}
	return conn.(*gonet.TCPConn)
}

func (g *guest) dialUDP(addr string) *gonet.UDPConn {
	g.Helper()
	to := g.at(addr)
	conn, err := gonet.DialUDP(g.stack, nil, &to, ipv4.ProtocolNumber)
	if err != nil {
		g.Fatal(err)
	}
	g.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(limit))
	return conn
}

// serveTCP starts a server of the host's and returns its address as the guest
// sees it.
func serveTCP(t testing.TB, serve func(*net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		work.Wait()
	})
	work.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.SetDeadline(time.Now().Add(limit))
			work.Go(func() {
				defer conn.Close()
				serve(conn.(*net.TCPConn))
			})
		}
	})
	return fmt.Sprintf("%s:%d", far, l.Addr().(*net.TCPAddr).Port)
}

func serveUDP(t testing.TB, serve func(conn net.PacketConn, from net.Addr, data []byte)) string {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	t.Cleanup(func() {
		conn.Close()
		work.Wait()
	})
	work.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			serve(conn, from, buf[:n])
		}
	})
	return fmt.Sprintf("%s:%d", far, conn.LocalAddr().(*net.UDPAddr).Port)
}

func echo(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) }

func echoUDP(conn net.PacketConn, from net.Addr, data []byte) { _, _ = conn.WriteTo(data, from) }

// eventually waits for something that takes no time.
func eventually(t testing.TB, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func refused(n *Network) []string {
	var all []string
	for _, r := range n.Refused() {
		all = append(all, fmt.Sprintf("%s %s:%d x%d", r.Protocol, r.Destination, r.Port, r.Count))
	}
	slices.Sort(all)
	return all
}

// pattern is bytes that show where they belong.
func pattern(size int) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(i ^ i>>8 ^ i>>16)
	}
	return b
}

func TestOpenRefusesWhatItCannotUse(t *testing.T) {
	t.Parallel()
	for name, edit := range map[string]func(*Config){
		"no MAC":        func(c *Config) { c.MAC = nil },
		"multicast":     func(c *Config) { c.MAC = net.HardwareAddr{1, 0, 0, 0, 0, 1} },
		"gateway's MAC": func(c *Config) { c.MAC = net.HardwareAddr(gatewayMAC) },
		"MTU":           func(c *Config) { c.MTU = 100 },
		"large MTU":     func(c *Config) { c.MTU = 1 << 17 },
		"policy":        func(c *Config) { c.Egress.Mode = "maybe" },
		"no socket": func(c *Config) {
			c.Link.Close()
			c.Link, _ = os.Open(os.DevNull)
		},
		"stream socket": func(c *Config) {
			c.Link.Close()
			fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
			if err != nil {
				t.Fatal(err)
			}
			syscall.Close(fds[1])
			c.Link = os.NewFile(uintptr(fds[0]), "stream")
		},
	} {
		ours, theirs, err := Pair()
		if err != nil {
			t.Fatal(err)
		}
		theirs.Close()
		cfg := Config{Link: ours, MAC: guestMAC}
		edit(&cfg)
		if n, err := Open(cfg); err == nil {
			n.Close()
			t.Errorf("%s: opened", name)
		}
		if _, err := cfg.Link.Stat(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s: the link was left open: %v", name, err)
		}
	}
	if _, err := Open(Config{MAC: guestMAC}); err == nil {
		t.Error("opened without a link")
	}
}
