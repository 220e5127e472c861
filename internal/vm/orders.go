package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/sandbox"
)

// dialLimit is how long a connection to a port inside may take.
const dialLimit = 20 * time.Second

// takeOrders serves the control socket until it is closed.
func (l *life) takeOrders() {
	for {
		conn, err := l.control.Accept()
		if err != nil {
			return
		}
		unixConn, ok := conn.(*net.UnixConn)
		if !ok {
			conn.Close()
			continue
		}
		go l.obey(unixConn)
	}
}

func (l *life) obey(conn *net.UnixConn) {
	o, err := readOrder(conn)
	switch {
	case err == nil && o.Op == opDial:
		l.dial(conn, o.Port)
		return
	case err == nil && o.Op == opConsole:
		l.console.attach(conn)
		return
	}
	defer conn.Close()
	var result any
	if err == nil {
		result, err = l.do(o)
	}
	var text []byte
	if err == nil {
		text, err = json.Marshal(result)
	}
	if err != nil {
		answerError(conn, err)
		return
	}
	_, _ = conn.Write(append([]byte{answerDone}, text...)) // who asked may be gone
}

// do carries an order out that is over when it is answered.
func (l *life) do(o order) (any, error) {
	switch o.Op {
	case opPause, opResume:
		return nil, l.setPaused(o.Op == opPause)
	case opHibernate:
		return nil, l.hibernate(o.KeyFile)
	case opSetEgress:
		if l.boot.NAT && o.Egress != nil {
			if allowsAll(*o.Egress) {
				return nil, nil //nolint:nilnil // There is nothing to tell.
			}
			return nil, errNAT
		}
		if l.network == nil || o.Egress == nil {
			return nil, errors.New("the machine has no network")
		}
		return nil, l.network.SetEgress(*o.Egress)
	case opRefused:
		if l.network == nil {
			return refused{}, nil
		}
		return refused{l.network.Refused(), l.network.Stats().Refused}, nil
	}
	return nil, fmt.Errorf("this machine's shim does not know the order %q", o.Op)
}

// refused is what an egress policy has refused in this life.
type refused struct {
	Recent []sandbox.Refusal
	Total  uint64
}

// pauseLimit is how long a hypervisor may take to stop its processors. If it
// has limits of its own, these come first, and say more.
const pauseLimit = 20 * time.Second

// setPaused stops the machine's processors, or lets them go on, and writes
// down which.
func (l *life) setPaused(paused bool) error {
	l.changing.Lock()
	defer l.changing.Unlock()
	if l.asleep {
		return errSaved
	}
	if l.paused == paused {
		return nil
	}
	if err := l.halt(paused); err != nil {
		return err
	}
	l.paused = paused
	return l.SetPaused(paused)
}

// errSaved is a machine that is to change though its life is over.
var errSaved = errors.New("the machine was saved, and is ending")

// halt stops the machine's processors, or lets them go on. Its caller holds
// changing.
func (l *life) halt(halted bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), pauseLimit)
	defer cancel()
	change := l.machine.Resume
	if halted {
		change = l.machine.Pause
	}
	return change(ctx)
}

// dial connects to a port inside and passes the connection on.
func (l *life) dial(conn *net.UnixConn, port uint32) {
	ctx, cancel := context.WithTimeout(context.Background(), dialLimit)
	defer cancel()
	defer conn.Close()
	inside, err := l.connect(ctx, port)
	if err != nil {
		answerError(conn, err)
		return
	}
	defer inside.Close()
	if err := pass(conn, inside); err != nil {
		answerError(conn, err)
	}
}

// connect connects to a port inside, once somebody is there: requests that a
// device kept for a guest that is yet to boot would come all at once.
func (l *life) connect(ctx context.Context, port uint32) (net.Conn, error) {
	if l.guest.Load() == nil {
		return nil, ErrNoListener
	}
	conn, err := l.machine.Dial(ctx, port)
	if err != nil || port != wire.Port {
		return conn, err
	}
	_ = conn.SetWriteDeadline(time.Now().Add(dialLimit))
	if _, err := conn.Write(l.key); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, conn.SetWriteDeadline(time.Time{})
}

// pass sends a connection's descriptor.
func pass(conn *net.UnixConn, inside net.Conn) error {
	socket, ok := inside.(syscall.Conn)
	if !ok {
		return fmt.Errorf("a %T cannot be passed on", inside)
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	err = raw.Control(func(fd uintptr) {
		_, _, sent = conn.WriteMsgUnix([]byte{answerPassed}, unix.UnixRights(int(fd)), nil)
	})
	if err != nil {
		return err
	}
	return sent
}
