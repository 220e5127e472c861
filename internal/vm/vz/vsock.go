package vz

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"reflect"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/choiros/agent/internal/vm"
)

const (
	// maxDials is how many connections to a guest may be under way: the
	// framework keeps those for a guest that says nothing, for as long as the
	// machine lives.
	maxDials = 64
	// backlog is how many connections of the guest's may wait to be accepted.
	backlog = 16
	// closeLimit is how long the framework may take to forget a listener.
	closeLimit = 5 * time.Second
)

func (m *machine) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	conn, err := m.dial(ctx, port)
	if err != nil {
		return nil, fmt.Errorf("dial vsock port %d: %w", port, err)
	}
	return conn, nil
}

func (m *machine) dial(ctx context.Context, port uint32) (net.Conn, error) {
	if err := m.running(); err != nil {
		return nil, fmt.Errorf("%w: %w", vm.ErrNoListener, err)
	}
	select {
	case m.dials <- struct{}{}:
	case <-m.done:
		return nil, fmt.Errorf("%w: %w", vm.ErrNoListener, errNotRunning)
	case <-ctx.Done():
		return nil, fmt.Errorf("%d connections wait for the guest: %w", maxDials, context.Cause(ctx))
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() { // so that a machine that ends ends the dialling
		select {
		case <-m.done:
			cancel(fmt.Errorf("%w: %w", vm.ErrNoListener, errNotRunning))
		case <-ctx.Done():
		}
	}()
	var conn net.Conn
	err := await(ctx, func() error {
		defer func() { <-m.dials }()
		given, err := m.device.Connect(port)
		if err == nil {
			conn, err = newSocket(given)
		}
		return err
	}, func() { conn.Close() })
	switch {
	case err == nil:
		return conn, nil
	case hasCode(err, posixDomain, darwinECONNRESET, darwinECONNREFUSED, darwinENODEV), hasCode(err, vzDomain, vzInvalidState):
		return nil, fmt.Errorf("%w: %w", vm.ErrNoListener, said(err))
	}
	return nil, said(err)
}

// openListeners has the framework accept connections, now that the machine
// runs or is about to.
func (m *machine) openListeners() error {
	m.mu.Lock()
	listeners := m.listeners
	m.mu.Unlock()
	for _, l := range listeners {
		given, err := m.device.Listen(l.port)
		if err != nil {
			return fmt.Errorf("listen at vsock port %d: %w", l.port, said(err))
		}
		l.given.Store(&given)
		select {
		case <-l.closed: // meanwhile, when there was nothing to be closed
			given.Close()
		default:
			go l.pump(given)
		}
	}
	return nil
}

// listener is what Listen returns. What is accepted comes from the framework's
// listener once there is one.
type listener struct {
	port   uint32
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	given  atomic.Pointer[net.Listener]
}

func newListener(port uint32) *listener {
	return &listener{port: port, conns: make(chan net.Conn, backlog), closed: make(chan struct{})}
}

// pump accepts what the guest connects to. vz's Accept does not return when its
// listener is closed, so neither does this: it takes a goroutine that sleeps,
// one for each port, until the process ends. Connections that nobody accepts
// are closed, since vz has a goroutine and a descriptor for each.
func (l *listener) pump(given net.Listener) {
	for {
		raw, err := given.Accept()
		select {
		case <-l.closed:
			if err == nil {
				raw.Close()
			}
			return
		default:
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // of one connection, which is gone
		}
		conn, err := newSocket(raw)
		if err != nil {
			raw.Close()
			continue
		}
		select {
		case l.conns <- conn:
		default:
			conn.Close()
		}
	}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	default:
	}
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	var err error
	l.once.Do(func() {
		close(l.closed)
		if given := l.given.Load(); given != nil {
			ctx, cancel := context.WithTimeout(context.Background(), closeLimit)
			defer cancel()
			err = await(ctx, (*given).Close, nil)
		}
		for {
			select {
			case conn := <-l.conns:
				conn.Close()
			default:
				return
			}
		}
	})
	return err
}

func (l *listener) Addr() net.Addr { return vsockAddr{} }

type vsockAddr struct{}

func (vsockAddr) Network() string { return "vsock" }

func (vsockAddr) String() string { return "vsock" }

// socket is a connection to the guest: a socket of the kernel's, the framework's
// process at its other end. It has CloseWrite and SyscallConn; and it is no
// *net.UnixConn to whoever asks, since no descriptor can be passed over it.
type socket struct {
	*net.UnixConn
	sourcePort uint32
}

func (socket) LocalAddr() net.Addr { return vsockAddr{} }

func (socket) RemoteAddr() net.Addr { return vsockAddr{} }

var _ vm.Rebooter = (*machine)(nil)

// SourcePort implements vm.Rebooter.
func (m *machine) SourcePort(conn net.Conn) uint32 {
	if s, ok := conn.(socket); ok {
		return s.sourcePort
	}
	return math.MaxUint32
}

// sourcePort is where a connection of vz's comes from.
func sourcePort(conn net.Conn) uint32 {
	if from, ok := conn.(interface{ SourcePort() uint32 }); ok {
		return from.SourcePort()
	}
	return math.MaxUint32
}

// rawConnField is where vz.VirtioSocketConnection has its socket.
const rawConnField = "rawConn"

// newSocket takes the socket out of a connection of vz's, which has it in a
// field of its own and shows neither it nor its descriptor nor a way to close
// one direction. That the field is there is checked with vz's types in a test.
func newSocket(conn net.Conn) (net.Conn, error) {
	outer := reflect.ValueOf(conn)
	if outer.Kind() == reflect.Pointer && outer.Elem().Kind() == reflect.Struct {
		field := outer.Elem().FieldByName(rawConnField)
		if field.IsValid() && field.Type() == reflect.TypeFor[net.Conn]() {
			inner := *(*net.Conn)(unsafe.Pointer(field.UnsafeAddr()))
			if unixConn, ok := inner.(*net.UnixConn); ok {
				return socket{unixConn, sourcePort(conn)}, nil
			}
		}
	}
	return nil, fmt.Errorf("a connection of type %T has no socket", conn)
}
