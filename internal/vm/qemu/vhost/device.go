//go:build linux

package vhost

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
)

var (
	// ErrNotStarted is a guest that has not set its device up.
	ErrNotStarted = errors.New("the guest has not set its vsock device up")
	// ErrRefused is a port inside at which nobody listens.
	ErrRefused = errors.New("connection refused by the guest")
	// errInUse is a port of the host's at which somebody listens.
	errInUse = errors.New("somebody listens at that port")
	// errReset is a connection that the guest has ended, or the device.
	errReset = errors.New("the connection was reset")
)

const (
	// room is how much of what a guest sent on a connection is kept here until
	// it is read, in bytes: as much as Linux gives.
	room = 256 << 10
	// maxRefusals is how many packets that end what is no connection wait to be
	// sent, at most. A guest that asks on and takes none is owed no more.
	maxRefusals = 1024
	// maxConns is how many connections there are, at most, for a guest to make
	// another.
	maxConns = 4096
	// atOnce is how many packets are handled before others have a turn.
	atOnce = 256
)

// The device's rings. It has a third, for events, which QEMU keeps.
const (
	toGuest   = 0
	fromGuest = 1
)

// Device is a vsock device, at most one of whose front ends is served at a time.
// All its methods are safe for concurrent use.
type Device struct {
	cid uint64

	mu        sync.Mutex
	changed   sync.Cond // of all below: a ring, an answer, a connection's credit
	closed    bool
	front     *net.UnixConn // whom Serve serves
	fault     error         // why that is over
	memory    memory
	rings     [2]ring
	started   bool // the guest has set both rings going
	taken     chain
	conns     map[key]*conn
	listeners map[uint32]*Listener
	answers   []answer
	port      uint32 // of the host's, the last that was used to dial
}

// answer is a packet that is to be sent as soon as there is room.
type answer struct {
	key   key
	kind  uint16
	op    uint16
	flags uint32
	conn  *conn // nil: of none, or of one that is no more
}

// New makes the device of a guest with that address.
func New(cid uint64) *Device {
	d := &Device{cid: cid, conns: map[key]*conn{}, listeners: map[uint32]*Listener{}, port: 1<<30 + rand.Uint32N(1<<29)}
	d.changed.L = &d.mu
	go d.answerGuest() // until it is closed
	return d
}

// Close ends Serve, listeners and connections, in this order: what the guest has
// sent before that arrives.
func (d *Device) Close() {
	d.mu.Lock()
	d.closed = true
	for d.front != nil {
		d.front.Close()
		d.changed.Wait()
	}
	listeners := d.listeners
	d.listeners = map[uint32]*Listener{}
	d.changed.Broadcast()
	d.mu.Unlock()
	for _, l := range listeners {
		l.end()
	}
}

// Dial connects to a port inside. It is ErrNotStarted until the guest has set
// the device up, and ErrRefused if nobody listens. While the machine is paused it waits.
func (d *Device) Dial(ctx context.Context, port uint32) (*net.UnixConn, error) {
	ours, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	if !d.started || d.closed {
		d.mu.Unlock()
		ours.Close()
		theirs.Close()
		return nil, ErrNotStarted
	}
	c := d.add(key{guest: port, host: d.freePort(port)}, ours)
	c.answered = make(chan struct{})
	d.mu.Unlock()
	go c.serve(opRequest)
	select {
	case <-c.answered:
		d.mu.Lock()
		err = c.refusal
		d.mu.Unlock()
	case <-ctx.Done():
		d.mu.Lock()
		// The guest may have connected, and is told.
		d.reset(c)
		d.mu.Unlock()
		err = context.Cause(ctx)
	}
	if err != nil {
		theirs.Close()
		return nil, err
	}
	return theirs, nil
}

// freePort is a port of the host's that nothing else is connected to port from.
func (d *Device) freePort(port uint32) uint32 {
	for {
		if d.port++; d.port < 1<<30 || d.port >= 1<<31 {
			d.port = 1 << 30
		}
		if _, used := d.conns[key{guest: port, host: d.port}]; !used {
			return d.port
		}
	}
}

// receive handles what the guest has sent. It needs mu, and lets go of it in
// between.
func (d *Device) receive() error {
	r := &d.rings[fromGuest]
	for {
		r.hush(true)
		for range atOnce {
			ok, err := r.take(d.memory, &d.taken)
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			if err := d.packet(d.taken.read); err != nil {
				return err
			}
			r.give(d.taken.head, 0)
		}
		r.hush(false) // and what came before the guest saw that is not missed
		r.wake()
		n, err := r.waiting()
		if n == 0 || err != nil {
			return err
		}
		d.mu.Unlock()
		d.mu.Lock() // so that others have a turn
	}
}

// packet handles one packet.
func (d *Device) packet(pieces [][]byte) error {
	var raw [headerSize]byte
	n, payload := gather(raw[:], pieces)
	if n < headerSize {
		return fmt.Errorf("%w: a packet of %d bytes", errRing, n)
	}
	h := parseHeader(raw[:])
	k := key{guest: h.sourcePort, host: h.targetPort}
	c := d.conns[k]
	if h.kind != typeStream || h.targetCID != hostCID || h.sourceCID != d.cid {
		d.refuse(k, h)
		return nil
	}
	if c == nil {
		if h.op != opRequest || !d.accept(k, h) {
			d.refuse(k, h)
		}
		return nil
	}
	c.guestRoom, c.guestTaken = h.room, h.taken
	d.changed.Broadcast()
	ok := true
	switch h.op {
	case opResponse:
		if ok = c.pending(); ok {
			c.settle(nil)
		}
	case opReset:
		d.abort(c, ErrRefused)
	case opShutdown:
		ok = c.shut(h.flags)
	case opData:
		if payload, ok = cut(payload, int(h.length)); ok && h.length > 0 {
			ok = !c.pending() && c.deliver(payload, h.length)
		}
	case opCreditUpdate:
	case opCreditRequest:
		c.tell()
	default:
		ok = false
	}
	if !ok {
		d.reset(c)
	}
	return nil
}

// refuse tells the guest that a packet is of no connection.
func (d *Device) refuse(k key, h header) {
	if h.op != opReset && len(d.answers) < maxRefusals {
		d.answer(answer{key: k, kind: h.kind, op: opReset})
	}
}

// accept begins a connection that the guest asks for, if somebody listens.
func (d *Device) accept(k key, h header) bool {
	l := d.listeners[k.host]
	if l == nil || len(l.queue) == cap(l.queue) || len(d.conns) >= maxConns {
		return false
	}
	ours, theirs, err := pair()
	if err != nil {
		return false // too many open files: as if nobody listened
	}
	c := d.add(k, ours)
	c.guestRoom, c.guestTaken = h.room, h.taken
	l.queue <- &Accepted{theirs, k.guest} // it has room, and all who send hold mu
	go c.serve(opResponse)
	return true
}

// answer has a packet sent when there is room.
func (d *Device) answer(a answer) {
	d.answers = append(d.answers, a)
	d.changed.Broadcast()
}

// answerGuest sends answers until the device is closed.
func (d *Device) answerGuest() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for !d.closed {
		if len(d.answers) == 0 {
			d.answers = nil
			d.changed.Wait()
			continue
		}
		a := d.answers[0]
		if a.conn == nil || !a.conn.gone {
			if d.place(a.key, a.conn, header{kind: a.kind, op: a.op, flags: a.flags}, nil) < 0 {
				d.changed.Wait()
				continue
			}
			d.rings[toGuest].wake()
			if a.op == opCreditUpdate {
				a.conn.telling = false
			}
		}
		d.answers = d.answers[1:]
	}
}

// place puts a packet into the guest's next buffer, with as much of data as
// fits, and returns how much that was: less than none is no buffer. It needs mu.
func (d *Device) place(k key, c *conn, h header, data []byte) int {
	r := &d.rings[toGuest]
	ok, err := r.take(d.memory, &d.taken)
	if !ok && err == nil && r.running() {
		// Wanted; and what came before the guest saw that is not missed.
		r.hush(false)
		ok, err = r.take(d.memory, &d.taken)
	}
	if err == nil && ok && size(d.taken.write) <= headerSize {
		err = fmt.Errorf("%w: a buffer of %d bytes", errRing, size(d.taken.write))
	}
	if err != nil {
		d.fail(err)
		return -1
	}
	if !ok {
		return -1
	}
	h.sourceCID, h.targetCID = hostCID, d.cid
	h.sourcePort, h.targetPort = k.host, k.guest
	n := min(len(data), size(d.taken.write)-headerSize)
	h.length = uint32(n) //nolint:gosec // At most what a connection reads at once.
	if c != nil {
		h.room, h.taken = room, c.given
		c.told = c.given
		c.sent += h.length
	}
	var raw [headerSize]byte
	h.put(raw[:])
	scatter(scatter(d.taken.write, raw[:]), data[:n])
	r.give(d.taken.head, headerSize+n)
	r.hush(true)
	return n
}

// send sends a packet of a connection once there is room for it, and all of data
// as the guest gives credit. It reports whether the connection was still there.
func (d *Device) send(c *conn, h header, data []byte) bool {
	h.kind = typeStream
	d.mu.Lock()
	defer d.mu.Unlock()
	for first := true; first || len(data) > 0; {
		if c.gone {
			return false
		}
		now := data[:min(len(data), c.credit())]
		n := -1
		if len(data) == 0 || len(now) > 0 {
			n = d.place(c.key, c, h, now)
		}
		if n < 0 {
			d.rings[toGuest].wake()
			if !c.gone {
				d.changed.Wait()
			}
			continue
		}
		first, data = false, data[n:]
	}
	d.rings[toGuest].wake()
	return true
}

// add begins a connection. It needs mu.
func (d *Device) add(k key, ours *net.UnixConn) *conn {
	raw, _ := ours.SyscallConn() // it fails for what is no connection
	c := &conn{device: d, key: k, end: ours, raw: raw}
	d.conns[k] = c
	return c
}

// abort ends a connection that the guest has ended, or will not hear of again.
// What it has sent is delivered. It needs mu.
func (d *Device) abort(c *conn, why error) {
	if c.gone {
		return
	}
	c.gone = true
	delete(d.conns, c.key)
	if c.pending() {
		c.settle(why)
	}
	if !c.draining {
		c.end.Close()
	}
	d.changed.Broadcast()
}

// fail is the end of serving a guest that does not keep to the protocol. It
// needs mu.
func (d *Device) fail(err error) {
	if d.fault == nil && d.front != nil {
		d.fault = err
		d.front.Close()
	}
}

// reset ends a connection, and tells the guest. It needs mu.
func (d *Device) reset(c *conn) {
	if !c.gone {
		d.abort(c, errReset)
		d.answer(answer{key: c.key, kind: typeStream, op: opReset})
	}
}

// abortAll needs mu.
func (d *Device) abortAll() {
	for _, c := range d.conns {
		d.abort(c, errReset)
	}
	d.answers = nil
}
