//go:build linux

package vhost

import (
	"fmt"
	"net"
	"sync"
)

// maxQueued is how many connections wait at a listener to be accepted.
const maxQueued = 128

// Listener takes connections of the guest's to a port of the host's.
type Listener struct {
	device *Device
	port   uint32
	queue  chan net.Conn
	over   chan struct{}
	once   sync.Once
}

// Listen takes connections to a port of the host's, until it is closed.
func (d *Device) Listen(port uint32) (*Listener, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, net.ErrClosed
	}
	if d.listeners[port] != nil {
		return nil, fmt.Errorf("%w: %d", errInUse, port)
	}
	l := &Listener{device: d, port: port, queue: make(chan net.Conn, maxQueued), over: make(chan struct{})}
	d.listeners[port] = l
	return l, nil
}

// Accepted is a connection that the guest has made.
type Accepted struct {
	*net.UnixConn
	port uint32
}

// SourcePort is the guest's own port.
func (a *Accepted) SourcePort() uint32 { return a.port }

// Accept waits for the next connection, an *Accepted.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case <-l.over:
		return nil, net.ErrClosed
	default:
	}
	select {
	case conn := <-l.queue:
		return conn, nil
	case <-l.over:
		return nil, net.ErrClosed
	}
}

// Close ends what waits in Accept, and connections that were not accepted.
func (l *Listener) Close() error {
	l.device.mu.Lock()
	if l.device.listeners[l.port] == l {
		delete(l.device.listeners, l.port)
	}
	l.device.mu.Unlock()
	l.end()
	return nil
}

// end is called once nothing more can come into the queue.
func (l *Listener) end() {
	l.once.Do(func() {
		close(l.over)
		for {
			select {
			case conn := <-l.queue:
				conn.Close()
			default:
				return
			}
		}
	})
}

// Addr is the port.
func (l *Listener) Addr() net.Addr { return portAddr(l.port) }

type portAddr uint32

func (portAddr) Network() string  { return "vsock" }
func (a portAddr) String() string { return fmt.Sprintf("host(2):%d", uint32(a)) }
