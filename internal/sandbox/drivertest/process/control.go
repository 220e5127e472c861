package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// controlSocket is the name of the socket in a box at which its shim takes
// orders: a connection each, whose first byte is the order. The answer is that
// byte again, or why it was not carried out, to the end.
const controlSocket = "control"

// pausedFile is in a box while what it runs is halted.
const pausedFile = "paused"

// The orders.
const (
	orderPause   = 'p'
	orderResume  = 'r'
	orderConsole = 'c'
)

// maxComplaint is how much is read of why an order was not carried out.
const maxComplaint = 4 << 10

// tell gives the shim of a sandbox that runs an order and returns the
// connection behind the answer.
func (d *Driver) tell(ctx context.Context, ref sandbox.Ref, order byte) (net.Conn, error) {
	if _, err := d.running(ctx, ref); err != nil {
		return nil, err
	}
	b, err := d.boxes().Box(ref.ID)
	if err != nil {
		return nil, err
	}
	conn, err := b.DialSocket(ctx, controlSocket)
	if err != nil {
		return nil, gone(err)
	}
	unbind := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	err = ask(conn, order)
	if !unbind() {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func ask(conn net.Conn, order byte) error {
	answer := []byte{order}
	if _, err := conn.Write(answer); err != nil {
		return gone(err)
	}
	if _, err := io.ReadFull(conn, answer); err != nil {
		return gone(err)
	}
	if answer[0] == order {
		return nil
	}
	rest, err := io.ReadAll(io.LimitReader(conn, maxComplaint))
	if err != nil {
		return gone(err)
	}
	return errors.New(string(append(answer, rest...)))
}

// gone is err, or of a shim that has ended: so.
func gone(err error) error {
	for _, end := range []error{io.EOF, io.ErrUnexpectedEOF, fs.ErrNotExist, syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, end) {
			return fmt.Errorf("%w: it is ending", sandbox.ErrState)
		}
	}
	return err
}

// Pause implements sandbox.Pauser.
func (d *Driver) Pause(ctx context.Context, ref sandbox.Ref) error {
	return failed("pause", ref, d.order(ctx, ref, orderPause))
}

// Resume implements sandbox.Pauser.
func (d *Driver) Resume(ctx context.Context, ref sandbox.Ref) error {
	return failed("resume", ref, d.order(ctx, ref, orderResume))
}

func (d *Driver) order(ctx context.Context, ref sandbox.Ref, order byte) error {
	conn, err := d.tell(ctx, ref, order)
	if err != nil {
		return err
	}
	return conn.Close()
}

// Console implements sandbox.Console. Nobody reads what is typed there: it is
// said again, as a terminal echoes it.
func (d *Driver) Console(ctx context.Context, ref sandbox.Ref) (net.Conn, error) {
	conn, err := d.tell(ctx, ref, orderConsole)
	return conn, failed("console", ref, err)
}

// request is an order for who supervises.
type request struct {
	order byte
	done  chan error // with room for one
}

// listen makes the control socket. This process works in the box's folder from
// then on, so that no path is too long.
func (l *life) listen() error {
	if err := os.Chdir(l.Box.Dir); err != nil {
		return err
	}
	for _, left := range []string{controlSocket, pausedFile} {
		if err := os.Remove(left); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: controlSocket, Net: "unix"})
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go l.obey(conn)
		}
	}()
	return nil
}

func (l *life) obey(conn net.Conn) {
	defer conn.Close()
	order := make([]byte, 1)
	if _, err := io.ReadFull(conn, order); err != nil {
		return
	}
	switch order[0] {
	case orderConsole:
		if _, err := conn.Write(order); err == nil {
			l.console.attach(conn)
		}
		return
	case orderPause, orderResume:
		done := make(chan error, 1)
		l.requests <- request{order[0], done}
		err := <-done
		if err == nil {
			_, _ = conn.Write(order)
			return
		}
		_, _ = conn.Write([]byte(err.Error()))
	}
}

// carryOut halts what this shim runs, or lets it go on.
func (l *life) carryOut(order byte) error {
	if (order == orderPause) == l.paused {
		return nil
	}
	if order == orderResume {
		return l.resume()
	}
	halted, err := halt(l.cmd.Process.Pid)
	if err == nil {
		err = os.WriteFile(pausedFile, nil, 0o600)
	}
	if err != nil {
		carryOn(halted)
		return err
	}
	l.paused, l.halted = true, halted
	return nil
}

func (l *life) resume() error {
	if err := os.Remove(pausedFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	carryOn(l.halted)
	l.paused, l.halted = false, nil
	return nil
}
