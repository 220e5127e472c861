package network

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/choiros/agent/internal/sandbox"
)

const (
	// maxConnections may be open, and of them maxHalfOpen be connecting to their
	// destination or to the guest. SYNs beyond that are dropped: the guest sends
	// them again.
	maxConnections = 2048
	maxHalfOpen    = 128

	// A connection's buffers, each way. A guest with many connections gets
	// smaller ones: 136 MiB is what all of them could hold.
	wholeBuffer, smallBuffer, leastBuffer = 256 << 10, 64 << 10, 16 << 10
	manyConnections, mostConnections      = 64, 512

	keepAliveIdle  = 5 * time.Minute
	handshakeCheck = 10 * time.Millisecond
)

// connections are the guest's of TCP.
type connections struct {
	network   *Network
	forwarder *tcp.Forwarder

	mu       sync.Mutex
	all      map[*connection]struct{}
	halfOpen map[stack.TransportEndpointID]*connection
	total    uint64
}

// connection is one of the guest's, carried into one of the host's.
type connection struct {
	network  *Network
	id       stack.TransportEndpointID
	to       netip.AddrPort
	names    []string        // that to's address was known by
	original original        // the SYN
	ctx      context.Context // its life, ended by abort
	cancel   context.CancelFunc

	// The guest's side, with what wakes who waits for it.
	queue waiter.Queue
	// finSent: the guest was told that no more comes. hostFailed: the host's
	// side takes nothing any more.
	finSent, hostFailed atomic.Bool
	over                chan struct{} // holds one: the guest's side may have ended

	mu      sync.Mutex
	aborted bool
	host    *net.TCPConn   // nil: not connected yet
	guest   tcpip.Endpoint // nil: not connected yet
}

// limitTCP bounds what the stack keeps for a connection.
func (n *Network) limitTCP() {
	moderate := tcpip.TCPModerateReceiveBufferOption(false)
	// Nothing is delayed on this link, and what is closed has ended.
	wait, linger := tcpip.TCPTimeWaitTimeoutOption(time.Second), tcpip.TCPLingerTimeoutOption(time.Second)
	for _, option := range []tcpip.SettableTransportProtocolOption{
		&tcpip.TCPSendBufferSizeRangeOption{Min: 1, Default: wholeBuffer, Max: wholeBuffer},
		&tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: wholeBuffer, Max: wholeBuffer},
		&moderate,
		&wait,
		&linger,
	} {
		if err := n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, option); err != nil {
			panic("network: gVisor knows no such option: " + err.String())
		}
	}
}

func (c *connections) open(n *Network) {
	c.network = n
	c.all, c.halfOpen = map[*connection]struct{}{}, map[stack.TransportEndpointID]*connection{}
	c.forwarder = tcp.NewForwarder(n.stack, wholeBuffer, maxHalfOpen+1, c.serve)
	n.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, c.handle)
}

func (c *connections) count() (now int, ever uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.all), c.total
}

// abort resets the connections that which picks.
func (c *connections) abort(which func(*connection) bool) {
	c.mu.Lock()
	var picked []*connection
	for conn := range c.all {
		picked = append(picked, conn)
	}
	c.mu.Unlock()
	for _, conn := range picked {
		if which(conn) {
			conn.abort()
		}
	}
}

// handle is given what is for no connection that there is. False has the stack
// answer with a reset.
func (c *connections) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	flags := header.TCP(pkt.TransportHeader().Slice()).Flags()
	if !flags.Contains(header.TCPFlagSyn) || flags.Contains(header.TCPFlagAck) {
		return false
	}
	n, to := c.network, addrPort(id.LocalAddress, id.LocalPort)
	if to.Addr() == Gateway && to.Port() != dnsPort {
		return false
	}
	conn := c.enter(id, to, pkt)
	if conn == nil {
		return true
	}
	if to.Addr() != Gateway && !n.allowed(to, sandbox.EgressTCP, nil) {
		c.leave(conn)
		n.refuse(to, sandbox.EgressTCP)
		return false
	}
	n.work.Add(1) // serve's
	if !c.forwarder.HandlePacket(id, pkt) {
		n.work.Done()
		c.leave(conn)
		return false
	}
	return true
}

// enter begins a connection; nil: it is being made already, or there are too
// many.
func (c *connections) enter(id stack.TransportEndpointID, to netip.AddrPort, pkt *stack.PacketBuffer) *connection {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.halfOpen[id] != nil || len(c.halfOpen) >= maxHalfOpen || len(c.all) >= maxConnections {
		return nil
	}
	conn := &connection{
		network: c.network, id: id, to: to, names: c.network.names.of(to.Addr()),
		original: originalOf(pkt), over: make(chan struct{}, 1),
	}
	conn.ctx, conn.cancel = context.WithCancel(c.network.ctx)
	c.all[conn], c.halfOpen[id] = struct{}{}, conn
	return conn
}

// settle ends the time of being half open. The forwarder has completed the
// request: it would ignore a SYN of the same id until then.
func (c *connections) settle(conn *connection) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.halfOpen[conn.id] == conn {
		delete(c.halfOpen, conn.id)
	}
}

func (c *connections) leave(conn *connection) {
	c.settle(conn)
	conn.cancel()
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.all, conn)
}

// serve makes a connection and carries it to its end. The host's side is made
// first, so that the guest sees what becomes of it.
func (c *connections) serve(r *tcp.ForwarderRequest) {
	n := c.network
	defer n.work.Done()
	c.mu.Lock()
	conn := c.halfOpen[r.ID()]
	c.mu.Unlock()
	defer c.leave(conn)
	if conn.to.Addr() != Gateway {
		host, err := conn.dial()
		if err != nil {
			r.Complete(conn.answer(err))
			return
		}
		if !conn.attach(host, nil) {
			r.Complete(true)
			return
		}
	}
	guest, failed := conn.shake(r)
	r.Complete(false)
	c.settle(conn)
	if failed != nil {
		conn.abort()
		return
	}
	defer guest.Close()
	c.mu.Lock()
	c.total++
	open := len(c.all)
	c.mu.Unlock()
	prepare(guest, open)
	if !conn.attach(nil, guest) {
		guest.Abort()
		return
	}
	if conn.host == nil {
		n.dns.stream(conn.ctx, gonet.NewTCPConn(&conn.queue, guest))
		return
	}
	conn.carry()
}

func (c *connection) dial() (*net.TCPConn, error) {
	conn, err := c.network.dial(c.ctx, "tcp", c.to)
	if err != nil {
		return nil, err
	}
	host, ok := conn.(*net.TCPConn)
	if !ok {
		conn.Close()
		return nil, errors.New("dial returned no TCP connection")
	}
	return host, nil
}

// shake shakes hands with the guest, which takes two minutes with one that does
// not: abort ends that too.
func (c *connection) shake(r *tcp.ForwarderRequest) (tcpip.Endpoint, tcpip.Error) {
	done, ended := make(chan struct{}), make(chan struct{})
	stop := context.AfterFunc(c.ctx, func() {
		defer close(ended)
		again := time.NewTicker(handshakeCheck)
		defer again.Stop()
		for {
			// Woken, gVisor takes what is not connected for failed. It may not be
			// waiting yet.
			c.queue.Notify(waiter.WritableEvents)
			select {
			case <-again.C:
			case <-done:
				return
			}
		}
	})
	guest, failed := r.CreateEndpoint(&c.queue)
	close(done)
	if !stop() {
		<-ended
	}
	return guest, failed
}

// answer tells the guest why there is no connection, and reports whether that
// is by a reset. Of a timeout it learns by itself.
func (c *connection) answer(err error) (reset bool) {
	switch code, ok := unreachable(err); {
	case c.ctx.Err() != nil: // the policy has changed
		return true
	case errors.Is(err, errOwn):
		c.network.refuse(c.to, sandbox.EgressTCP)
		return true
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET):
		return true
	case ok:
		c.network.sendUnreachable(c.original, code)
	}
	return false
}

// prepare sets the guest's side up, as one of open connections.
func prepare(guest tcpip.Endpoint, open int) {
	options := guest.SocketOptions()
	size := int64(wholeBuffer)
	if open > manyConnections {
		size = smallBuffer
	}
	if open > mostConnections {
		size = leastBuffer
	}
	if size != wholeBuffer {
		options.SetReceiveBufferSize(size, true)
		options.SetSendBufferSize(size, true)
	}
	idle := tcpip.KeepaliveIdleOption(keepAliveIdle)
	_ = guest.SetSockOpt(&idle) // an endpoint that has failed already says so later
	options.SetKeepAlive(true)
}

// attach gives the connection a side; false: it was aborted, and so is that
// side of the host's.
func (c *connection) attach(host *net.TCPConn, guest tcpip.Endpoint) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if host != nil {
		c.host = host
	}
	if guest != nil {
		c.guest = guest
	}
	if c.aborted && host != nil {
		resetHost(host)
	}
	return !c.aborted
}

// abort resets both sides.
func (c *connection) abort() {
	if guest := c.abortHost(); guest != nil {
		guest.Abort()
	}
}

// abortHost resets the host's side, and returns the guest's. It may be called
// while the guest's is locked.
func (c *connection) abortHost() tcpip.Endpoint {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.aborted {
		c.aborted = true
		c.cancel()
		if c.host != nil {
			resetHost(c.host)
		}
	}
	return c.guest
}

// resetHost closes such that the other end sees a reset: see SO_LINGER in
// socket(7).
func resetHost(host *net.TCPConn) {
	_ = host.SetLinger(0) // it is closed all the same
	host.Close()
}
