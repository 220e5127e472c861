package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/shim"
)

// controlSocket is the name of the socket in a box at which its shim takes
// orders: a connection each, a line of JSON, and an answer.
const controlSocket = "control"

// maxOrder is the longest order, in bytes; a policy of egress is the longest.
const maxOrder = 1 << 20

// orderLimit is how long whoever connects may take to say an order.
const orderLimit = 10 * time.Second

// order is what a shim is told to do.
type order struct {
	Op   string `json:"op"`
	Port uint32 `json:"port,omitempty"` // of dial
	// KeyFile is of hibernate: where the key of what is saved is to be.
	KeyFile string `json:"key_file,omitempty"`
	// Egress is of set-egress.
	Egress *sandbox.Egress `json:"egress,omitempty"`
}

// The orders.
const (
	opDial      = "dial"
	opConsole   = "console"
	opHibernate = "hibernate"
	opPause     = "pause"
	opResume    = "resume"
	opSetEgress = "set-egress"
	opRefused   = "refused"
)

// What an answer begins with.
const (
	answerStream   = 's' // what follows is the connection
	answerPassed   = 'p' // with the connection's descriptor
	answerDone     = 'd' // what follows, to the end, is the result as JSON
	answerNobody   = 'n' // nothing listens there
	answerCannot   = 'c' // what follows, to the end, is why that can never be done
	answerFull     = 'x' // what follows, to the end, is what there is no room for
	answerFailed   = 'e' // what follows, to the end, is why
	maxAnswerBytes = 1 << 20
)

// tell gives the shim of a box an order and returns the connection behind the
// first byte of the answer, and the connection that came with it, if one did.
func tell(ctx context.Context, box shim.Box, o order) (*net.UnixConn, net.Conn, error) {
	raw, err := box.DialSocket(ctx, controlSocket)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			err = fmt.Errorf("%w: the machine does not run", sandbox.ErrUnavailable)
		}
		return nil, nil, err
	}
	conn, ok := raw.(*net.UnixConn)
	if !ok {
		raw.Close()
		return nil, nil, errors.New("the control socket is none")
	}
	unbind := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	passed, err := ask(conn, o)
	if !unbind() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		if passed != nil {
			passed.Close()
		}
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, nil, err
	}
	return conn, passed, nil
}

func ask(conn *net.UnixConn, o order) (net.Conn, error) {
	line, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write(append(line, '\n')); err != nil {
		return nil, shimGone(err)
	}
	var first [1]byte
	rights := make([]byte, unix.CmsgSpace(4))
	n, size, _, _, err := conn.ReadMsgUnix(first[:], rights)
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		return nil, shimGone(err)
	}
	switch first[0] {
	case answerStream, answerDone:
		return nil, nil
	case answerPassed:
		return takePassed(rights[:size])
	case answerNobody:
		return nil, fmt.Errorf("%w: nothing listens there", sandbox.ErrUnavailable)
	}
	text, err := io.ReadAll(io.LimitReader(conn, maxAnswerBytes))
	if err != nil {
		return nil, shimGone(err)
	}
	switch first[0] {
	case answerCannot:
		return nil, fmt.Errorf("%w: %s", sandbox.ErrUnsupported, text)
	case answerFull:
		return nil, fmt.Errorf("%w: %s", sandbox.ErrExhausted, text)
	}
	return nil, errors.New(string(text))
}

// give gives the shim of a box an order that is over when it is answered.
// result is filled in unless it is nil.
func give(ctx context.Context, box shim.Box, o order, result any) error {
	conn, _, err := tell(ctx, box, o)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	text, err := io.ReadAll(io.LimitReader(conn, maxAnswerBytes))
	if err != nil {
		return shimGone(err)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(text, result)
}

// shimGone is a shim that hung up: it ends.
func shimGone(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("%w: the machine is ending", sandbox.ErrUnavailable)
	}
	return err
}

func takePassed(control []byte) (net.Conn, error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, err
	}
	for _, message := range messages {
		if fds, err := unix.ParseUnixRights(&message); err == nil && len(fds) == 1 {
			unix.CloseOnExec(fds[0])
			return wire.NewSocket(fds[0])
		}
	}
	return nil, errors.New("no descriptor came with the answer")
}

// listenControl listens in the folder that this process works in, so that no
// path is too long.
func listenControl() (*net.UnixListener, error) {
	if err := os.Remove(controlSocket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return net.ListenUnix("unix", &net.UnixAddr{Name: controlSocket, Net: "unix"})
}

// readOrder reads the one line that is an order.
func readOrder(conn *net.UnixConn) (order, error) {
	var o order
	_ = conn.SetReadDeadline(time.Now().Add(orderLimit))
	var line []byte
	chunk := make([]byte, 4096)
	for !bytes.HasSuffix(line, []byte{'\n'}) {
		if len(line) > maxOrder {
			return o, errors.New("an order without an end")
		}
		n, err := conn.Read(chunk)
		if err != nil {
			return o, err
		}
		line = append(line, chunk[:n]...)
	}
	_ = conn.SetReadDeadline(time.Time{})
	return o, json.Unmarshal(line, &o)
}

// answerError answers an order that failed.
func answerError(conn *net.UnixConn, err error) {
	if errors.Is(err, ErrNoListener) {
		_, _ = conn.Write([]byte{answerNobody})
		return
	}
	what := byte(answerFailed)
	switch {
	case errors.Is(shim.DiskProblem(err), sandbox.ErrExhausted):
		what = answerFull // whatever else that led to
	case errors.Is(err, ErrCannotSave):
		what = answerCannot
	}
	_, _ = conn.Write(append([]byte{what}, err.Error()...))
}
