package forward

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxDatagram = 65507
	// flowQueue datagrams of a client wait for the sandbox, and those of all
	// clients of a lease may be queuedBytes long. More are dropped.
	flowQueue   = 64
	queuedBytes = 4 << 20
	// failedPause is how long a client's datagrams are dropped after the sandbox
	// could not be reached, before that is tried again.
	failedPause = time.Second
	// maxFailures in a row end a flow: each tells of a datagram that was lost, but
	// sockets of macOS's were seen to fail for ever after a sleep, at once each
	// time (containers/gvisor-tap-vsock issue 584). The next datagram begins anew.
	maxFailures = 64
)

// flows are a UDP lease's, by client. A lock of their own, for each datagram
// takes it; f.mu is not taken under it.
type flows struct {
	mu       sync.Mutex
	byClient map[netip.AddrPort]*flow
	queued   atomic.Int64 // bytes
}

// flow is what one client sends and is sent.
type flow struct {
	lease  *lease
	socket *net.UDPConn
	client netip.AddrPort
	queue  chan []byte
	ctx    context.Context //nolint:containedctx // it is the flow's life, ended by abort
	cancel context.CancelFunc
	last   atomic.Int64 // when something was carried, as Forwarder.awake has it
	// passed says that the sandbox's side is a socket of the sandbox's own.
	passed bool
}

// receive serves a socket until it is closed.
func (l *lease) receive(socket *net.UDPConn) error {
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	pause := firstPause
	for {
		err := awaitReadable(raw)
		if err == nil {
			err = l.receiveOne(socket)
		}
		switch {
		case err == nil:
			pause = firstPause
			continue
		case l.ctx.Err() != nil, errors.Is(err, net.ErrClosed):
			return err
		}
		l.warn(fmt.Errorf("receive datagrams: %w", err))
		select {
		case <-l.ctx.Done():
			return err
		case <-time.After(pause):
			pause = min(pause*2, acceptPause)
		}
	}
}

// awaitReadable waits without a buffer.
func awaitReadable(raw syscall.RawConn) error {
	return raw.Read(func(fd uintptr) bool { return pollFor(fd, unix.POLLIN) != 0 })
}

func (l *lease) receiveOne(socket *net.UDPConn) error {
	buf := l.f.buffers.get()
	defer l.f.buffers.put(buf)
	n, client, err := socket.ReadFromUDPAddrPort(*buf)
	if err != nil {
		return err
	}
	if l.ctx.Err() != nil {
		return l.ctx.Err()
	}
	fl := l.flow(socket, client)
	if fl == nil || l.flows.queued.Add(int64(n)) > queuedBytes {
		if fl != nil {
			l.flows.queued.Add(-int64(n))
		}
		l.dropped.Add(1)
		return nil
	}
	fl.last.Store(l.f.awake())
	select {
	case fl.queue <- append([]byte(nil), (*buf)[:n]...):
	default:
		l.flows.queued.Add(-int64(n))
		l.dropped.Add(1)
	}
	return nil
}

// flow returns the client's flow, begun if there is none; nil: there are too
// many.
func (l *lease) flow(socket *net.UDPConn, client netip.AddrPort) *flow {
	l.flows.mu.Lock()
	fl := l.flows.byClient[client]
	full := len(l.flows.byClient) >= l.f.cfg.MaxFlows
	l.flows.mu.Unlock()
	if fl != nil && fl.ctx.Err() == nil {
		return fl
	}
	if full {
		l.evict()
	}
	fl = &flow{lease: l, socket: socket, client: client, queue: make(chan []byte, flowQueue)}
	fl.last.Store(l.f.awake())
	fl.ctx, fl.cancel = context.WithCancel(l.ctx)
	if err := l.enter(fl); err != nil {
		fl.cancel()
		l.warn(err)
		return nil
	}
	l.flows.mu.Lock()
	if l.flows.byClient == nil {
		l.flows.byClient = map[netip.AddrPort]*flow{}
	}
	l.flows.byClient[client] = fl
	l.flows.mu.Unlock()
	l.carrying.Go(fl.run)
	return fl
}

// evict ends the flow that was silent for longest.
func (l *lease) evict() {
	l.flows.mu.Lock()
	defer l.flows.mu.Unlock()
	var oldest *flow
	for _, fl := range l.flows.byClient {
		if oldest == nil || fl.last.Load() < oldest.last.Load() {
			oldest = fl
		}
	}
	if oldest != nil {
		oldest.cancel()
		delete(l.flows.byClient, oldest.client)
	}
}

// endSilentFlows ends flows of all leases that nothing went through for
// Config.FlowTimeout.
func (f *Forwarder) endSilentFlows() {
	f.mu.Lock()
	var leases []*lease
	for k, l := range f.leases {
		if k.udp {
			leases = append(leases, l)
		}
	}
	f.mu.Unlock()
	before := f.awake() - int64(f.cfg.FlowTimeout)
	for _, l := range leases {
		l.flows.mu.Lock()
		for _, fl := range l.flows.byClient {
			if fl.last.Load() < before {
				fl.cancel()
			}
		}
		l.flows.mu.Unlock()
	}
}

// endFlows ends all flows of a lease: they answer from its socket.
func (l *lease) endFlows() {
	l.flows.mu.Lock()
	defer l.flows.mu.Unlock()
	for _, fl := range l.flows.byClient {
		fl.cancel()
	}
}

func (fl *flow) abort() { fl.cancel() }

// relayed implements carrier.
func (fl *flow) relayed() bool { return !fl.passed }

// run leads the flow into the sandbox and carries what the client sends.
func (fl *flow) run() {
	l := fl.lease
	defer fl.over()
	l.f.cfg.Backend.Active(l.Sandbox)
	conn, generation, err := l.f.cfg.Backend.Connect(fl.ctx, l.Sandbox, l.GuestPort, true)
	_, fl.passed = conn.(*net.UDPConn)
	if err := l.connected(fl, generation, err); err != nil {
		if conn != nil {
			conn.Close()
		}
		l.leave(fl)
		if fl.ctx.Err() == nil {
			l.warn(err)
		}
		fl.fail()
		return
	}
	// After the wait for the sandbox the silence begins anew.
	fl.last.Store(l.f.awake())
	var replies sync.WaitGroup
	replies.Go(func() {
		<-fl.ctx.Done()
		conn.Close() // which ends a Read and a Write too
	})
	replies.Go(func() { fl.reply(conn) })
	fl.send(conn)
	replies.Wait()
	l.leave(fl)
	l.f.cfg.Backend.Active(l.Sandbox)
}

// fail drops for a while what the client sends: a sandbox that cannot start is
// not asked to by each datagram.
func (fl *flow) fail() {
	pause := time.NewTimer(failedPause)
	defer pause.Stop()
	for {
		select {
		case <-fl.ctx.Done():
			return
		case <-pause.C:
			return
		case data := <-fl.queue:
			fl.lease.flows.queued.Add(-int64(len(data)))
			fl.lease.dropped.Add(1)
		}
	}
}

// over takes the flow off the lease and drops what it has not carried.
func (fl *flow) over() {
	fl.cancel()
	l := fl.lease
	l.flows.mu.Lock()
	if l.flows.byClient[fl.client] == fl {
		delete(l.flows.byClient, fl.client)
	}
	l.flows.mu.Unlock()
	for {
		select {
		case data := <-fl.queue:
			l.flows.queued.Add(-int64(len(data)))
			l.dropped.Add(1)
		default:
			return
		}
	}
}

// send carries what the client sends, until the flow ends.
func (fl *flow) send(conn net.Conn) {
	l := fl.lease
	for {
		var data []byte
		select {
		case <-fl.ctx.Done():
			return
		case data = <-fl.queue:
		}
		l.flows.queued.Add(-int64(len(data)))
		_, err := conn.Write(data)
		if errors.Is(err, unix.ECONNREFUSED) {
			// That was of an earlier datagram, see udp(7); this one was not sent.
			_, err = conn.Write(data)
		}
		switch {
		case err == nil:
			l.bytesIn.Add(uint64(len(data)))
		case lost(err):
			l.dropped.Add(1)
		default:
			l.dropped.Add(1)
			fl.cancel()
			return
		}
	}
}

// lost reports that one datagram did not arrive, and others may.
func lost(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.EMSGSIZE) ||
		errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EPERM)
}

// reply carries what the sandbox sends, until conn is closed.
func (fl *flow) reply(conn net.Conn) {
	defer fl.cancel()
	var raw syscall.RawConn
	failures := 0
	switch c := conn.(type) {
	case *net.UDPConn:
		raw, _ = c.SyscallConn()
	case *net.UnixConn:
		raw, _ = c.SyscallConn()
	}
	for {
		if raw != nil {
			if err := awaitReadable(raw); err != nil {
				return
			}
		}
		err := fl.replyOne(conn)
		if fl.ctx.Err() != nil {
			return
		}
		if err == nil {
			failures = 0
			fl.last.Store(fl.lease.f.awake())
			continue
		}
		if failures++; !lost(err) || failures == maxFailures {
			return
		}
	}
}

func (fl *flow) replyOne(conn net.Conn) error {
	l := fl.lease
	buf := l.f.buffers.get()
	defer l.f.buffers.put(buf)
	n, err := conn.Read(*buf)
	if err != nil {
		return err
	}
	if n > maxDatagram {
		l.dropped.Add(1)
		return nil
	}
	if _, err := fl.socket.WriteToUDPAddrPort((*buf)[:n], fl.client); err != nil {
		l.dropped.Add(1)
		return nil //nolint:nilerr // UDP promises no delivery; the socket's end ends the flow too
	}
	l.bytesOut.Add(uint64(n))
	return nil
}
