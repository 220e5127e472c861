package network

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/choiros/agent/internal/sandbox"
)

const (
	// maxFlows there may be; the one that was silent for longest makes room.
	// Those that have ended but still hold something are flowsEnding more.
	maxFlows    = 1024
	flowsEnding = 64
	// flowTimeout is how long a flow may be silent: RFC 4787, REQ-5.
	flowTimeout = 2 * time.Minute
	// maxFailures in a row end a flow: each tells of a datagram that did not
	// arrive, but sockets of macOS's were seen to fail for ever after a sleep, at
	// once each time (containers/gvisor-tap-vsock issue 584). The guest's next
	// datagram begins anew.
	maxFailures = 64
)

// flows are the guest's of UDP.
type flows struct {
	network *Network

	mu    sync.Mutex
	byKey map[flowKey]*flow
	held  int // also those that are ending
	total uint64
}

type flowKey struct {
	from uint16
	to   netip.AddrPort
}

// flow is what one port of the guest's sends to one destination, and is sent
// from there.
type flow struct {
	network  *Network
	key      flowKey
	names    []string     // that the destination's address was known by
	original original     // the first datagram
	last     atomic.Int64 // when something was carried, as Network.awake has it

	// What send's step, made once, works on. Only the reader of the link sends.
	raw  syscall.RawConn
	out  []byte
	err  error
	step func(fd uintptr) bool

	mu      sync.Mutex
	aborted bool
	conn    *net.UDPConn // nil: not there yet
}

func (f *flows) open(n *Network) {
	f.network, f.byKey = n, map[flowKey]*flow{}
	n.stack.SetTransportProtocolHandler(udp.ProtocolNumber, f.handle)
}

func (f *flows) count() (now int, ever uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.byKey), f.total
}

// abort ends the flows that which picks.
func (f *flows) abort(which func(*flow) bool) {
	f.mu.Lock()
	var picked []*flow
	for _, fl := range f.byKey {
		picked = append(picked, fl)
	}
	f.mu.Unlock()
	for _, fl := range picked {
		if which(fl) {
			fl.abort()
		}
	}
}

// handle is given all datagrams of the guest's. False has the stack answer that
// the port is unreachable.
func (f *flows) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	length := int(header.UDP(pkt.TransportHeader().Slice()).Length()) - header.UDPMinimumSize
	if length < 0 || length > pkt.Data().Size() {
		return true
	}
	to := addrPort(id.LocalAddress, id.LocalPort)
	if to.Addr() == Gateway {
		if to.Port() != dnsPort {
			return false
		}
		f.network.dns.datagram(id.RemotePort, pkt.Data().AsRange().ToSlice()[:length])
		return true
	}
	if fl := f.flow(flowKey{id.RemotePort, to}, pkt); fl != nil {
		fl.send(pkt.Data().AsRange().ToSlice()[:length])
	}
	return true
}

// flow returns the flow that a datagram belongs to, begun if there is none;
// nil: there cannot be one.
func (f *flows) flow(key flowKey, pkt *stack.PacketBuffer) *flow {
	f.mu.Lock()
	if fl := f.byKey[key]; fl != nil {
		f.mu.Unlock()
		return fl
	}
	if len(f.byKey) >= maxFlows {
		f.evict()
	}
	if f.held >= maxFlows+flowsEnding {
		f.mu.Unlock()
		return nil
	}
	fl := &flow{network: f.network, key: key, names: f.network.names.of(key.to.Addr()), original: originalOf(pkt)}
	fl.last.Store(f.network.awake())
	f.byKey[key] = fl
	f.held++
	f.mu.Unlock()
	if err := fl.connect(); err != nil {
		f.remove(fl)
		if code, ok := unreachable(err); ok {
			f.network.sendUnreachable(fl.original, code)
		}
		if errors.Is(err, errOwn) || errors.Is(err, errRefused) {
			f.network.refuse(key.to, sandbox.EgressUDP)
		}
		return nil
	}
	f.mu.Lock()
	f.total++
	f.mu.Unlock()
	f.network.work.Go(func() {
		defer f.remove(fl)
		fl.receive()
	})
	return fl
}

// evict ends the flow that was silent for longest.
func (f *flows) evict() {
	var oldest *flow
	for _, fl := range f.byKey {
		if oldest == nil || fl.last.Load() < oldest.last.Load() {
			oldest = fl
		}
	}
	delete(f.byKey, oldest.key)
	oldest.abort()
}

// remove forgets a flow that holds nothing any more.
func (f *flows) remove(fl *flow) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held--
	if f.byKey[fl.key] == fl {
		delete(f.byKey, fl.key)
	}
}

// errRefused says that the policy has the guest kept out.
var errRefused = errors.New("the egress policy does not allow it")

// connect makes the host's side, which takes no time.
func (f *flow) connect() error {
	n := f.network
	if !n.allowed(f.key.to, sandbox.EgressUDP, nil) {
		return errRefused
	}
	dialed, err := n.dial(n.ctx, "udp", f.key.to)
	if err != nil {
		return err
	}
	conn, ok := dialed.(*net.UDPConn)
	if !ok {
		dialed.Close()
		return errors.New("dial returned no UDP socket")
	}
	if f.raw, err = conn.SyscallConn(); err != nil {
		conn.Close()
		return err
	}
	f.step = f.write
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.aborted {
		conn.Close()
		return net.ErrClosed
	}
	f.conn = conn
	return nil
}

func (f *flow) abort() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.aborted = true
	if f.conn != nil {
		f.conn.Close() // which ends receive
	}
}

// send sends a datagram, or loses it. It does not block.
func (f *flow) send(payload []byte) {
	f.last.Store(f.network.awake())
	f.out = payload
	if err := f.raw.Write(f.step); err != nil {
		return // it has ended
	}
	if errors.Is(f.err, unix.ECONNREFUSED) {
		// That was of an earlier datagram, see udp(7); this one was not sent.
		f.tell(f.err)
		_ = f.raw.Write(f.step) // as above
	}
	f.out = nil
}

func (f *flow) write(fd uintptr) bool {
	_, f.err = retry(func() (int, error) { return unix.Write(int(fd), f.out) })
	return true
}

// tell tells the guest of what the host was told.
func (f *flow) tell(err error) {
	if code, ok := unreachable(err); ok {
		f.network.sendUnreachable(f.original, code)
	}
}

// receive carries what comes back, until the flow has been silent for too long
// or was ended.
func (f *flow) receive() {
	defer f.conn.Close()
	var (
		failed   error
		failures int
	)
	step := func(fd uintptr) bool {
		buf := f.network.buffers.Get().(*[]byte)
		defer f.network.buffers.Put(buf)
		n, err := retry(func() (int, error) { return unix.Read(int(fd), *buf) })
		if errors.Is(err, unix.EAGAIN) {
			return false
		}
		if failed = err; err == nil {
			f.last.Store(f.network.awake())
			f.network.sendUDP(f.key.to, netip.AddrPortFrom(Guest, f.key.from), (*buf)[:n])
		}
		return true
	}
	for {
		silent := time.Duration(f.network.awake() - f.last.Load())
		if err := f.conn.SetReadDeadline(time.Now().Add(flowTimeout - silent)); err != nil {
			return
		}
		err := f.raw.Read(step)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if time.Duration(f.network.awake()-f.last.Load()) >= flowTimeout {
				return
			}
		case err != nil:
			return
		case failed != nil:
			if _, ok := unreachable(failed); !ok {
				return
			}
			f.tell(failed)
			if failures++; failures == maxFailures {
				return
			}
		default:
			failures = 0
		}
	}
}
