//go:build linux

package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
	"golang.org/x/sys/unix"
)

const (
	// commandTimeout is how long QEMU may take to answer a command. All that
	// takes long (a migration, an unplugging) is answered at once and goes on.
	commandTimeout = 10 * time.Second
	// maxMessage is the longest message that is taken from QEMU.
	maxMessage = 1 << 20
)

// errMonitorClosed is wrapped by the errors of commands to a QEMU that is gone.
var errMonitorClosed = errors.New("QEMU closed its monitor")

// commandError is QEMU's own word about a command.
type commandError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *commandError) Error() string { return e.Desc }

// monitor speaks QMP (docs/interop/qmp-spec.rst of QEMU) over a connection.
//
// Its messages are go-qemu's. Its connection is not: qmp.SocketMonitor waits
// without limit for the greeting and for every answer, takes a late answer for
// that of the next command, and hands out a slice of its read buffer, which the
// next event may overwrite while it is read. Here a command has a number, a
// deadline, and an answer of its own; a QEMU that is silent costs its caller
// that much time and nobody anything else. The one goroutine ends when the
// connection does.
type monitor struct {
	conn    net.Conn
	onEvent func(qmp.Event)
	greeted chan struct{} // closed by the greeting
	ended   chan struct{} // closed when nothing more arrives

	sending sync.Mutex

	mu      sync.Mutex
	last    uint64
	waiting map[uint64]chan answer
	err     error // once ended is closed: why
}

type answer struct {
	Return json.RawMessage `json:"return"`
	Error  *commandError   `json:"error"`
}

// newMonitor speaks to the QEMU at the other end of conn, which it takes over.
// onEvent is called for each event, in their order; answers wait for it.
func newMonitor(conn net.Conn, onEvent func(qmp.Event)) *monitor {
	m := &monitor{
		conn: conn, onEvent: onEvent,
		greeted: make(chan struct{}), ended: make(chan struct{}),
		waiting: make(map[uint64]chan answer),
	}
	go m.receive()
	return m
}

// connect waits for QEMU's greeting and leaves the mode for negotiations.
func (m *monitor) connect(ctx context.Context) error {
	select {
	case <-m.greeted:
	case <-m.ended:
		return m.why()
	case <-ctx.Done():
		return fmt.Errorf("wait for QEMU's greeting: %w", context.Cause(ctx))
	}
	return m.run(ctx, "qmp_capabilities", nil, nil)
}

// pass gives QEMU a copy of file, as a descriptor with a name.
func (m *monitor) pass(ctx context.Context, name string, file *os.File) error {
	return m.command(ctx, "getfd", object{"fdname": name}, nil, unix.UnixRights(int(file.Fd())))
}

// close ends the connection, and with it every command that waits.
func (m *monitor) close() {
	m.conn.Close()
	<-m.ended
}

func (m *monitor) why() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// run has QEMU carry out a command and decodes what it returns into result,
// unless that is nil. It waits for commandTimeout at most.
func (m *monitor) run(ctx context.Context, name string, args, result any) error {
	return m.command(ctx, name, args, result, nil)
}

// command is run, with what goes along with the command as ancillary data.
func (m *monitor) command(ctx context.Context, name string, args, result any, ancillary []byte) error {
	ctx, cancel := context.WithTimeoutCause(ctx, commandTimeout, fmt.Errorf("no answer for %v: %w", commandTimeout, context.DeadlineExceeded))
	defer cancel()
	got, err := m.exchange(ctx, qmp.Command{Execute: name, Args: args}, ancillary)
	if err == nil && got.Error != nil {
		err = got.Error
	}
	if err == nil && result != nil {
		err = json.Unmarshal(got.Return, result)
	}
	if err != nil {
		return fmt.Errorf("qmp %s: %w", name, err)
	}
	return nil
}

func (m *monitor) exchange(ctx context.Context, command qmp.Command, ancillary []byte) (answer, error) {
	mine := make(chan answer, 1)
	m.mu.Lock()
	m.last++
	id := m.last
	m.waiting[id] = mine
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		delete(m.waiting, id)
		m.mu.Unlock()
	}()
	if err := m.send(ctx, id, command, ancillary); err != nil {
		return answer{}, err
	}
	select {
	case got := <-mine:
		return got, nil
	case <-m.ended:
		return answer{}, m.why()
	case <-ctx.Done():
		return answer{}, context.Cause(ctx)
	}
}

func (m *monitor) send(ctx context.Context, id uint64, command qmp.Command, ancillary []byte) error {
	message, err := json.Marshal(struct {
		qmp.Command
		ID uint64 `json:"id"`
	}{command, id})
	if err != nil {
		return err
	}
	m.sending.Lock()
	defer m.sending.Unlock()
	deadline, _ := ctx.Deadline()
	if err := m.conn.SetWriteDeadline(deadline); err != nil {
		return fmt.Errorf("%w: %w", errMonitorClosed, err)
	}
	n, err := m.write(append(message, '\n'), ancillary)
	if err != nil && n > 0 {
		// Half a command is on its way: nothing can follow it.
		m.conn.Close()
	}
	return err
}

func (m *monitor) write(message, ancillary []byte) (int, error) {
	conn, ok := m.conn.(*net.UnixConn)
	if len(ancillary) == 0 || !ok {
		return m.conn.Write(message)
	}
	// A stream may take a part of it; what goes along goes with the first byte.
	n, _, err := conn.WriteMsgUnix(message, ancillary, nil)
	if err == nil && n < len(message) {
		var rest int
		rest, err = conn.Write(message[n:])
		n += rest
	}
	return n, err
}

// receive takes in what QEMU says, until it says no more.
func (m *monitor) receive() {
	in := bufio.NewScanner(m.conn)
	in.Buffer(nil, maxMessage)
	greeted := false
	for in.Scan() {
		var message struct {
			answer
			qmp.Event
			ID       uint64          `json:"id"`
			Greeting json.RawMessage `json:"QMP"`
		}
		if err := json.Unmarshal(in.Bytes(), &message); err != nil {
			m.end(fmt.Errorf("QEMU's monitor: %w", err))
			return
		}
		switch {
		case message.Greeting != nil:
			if !greeted {
				close(m.greeted)
			}
			greeted = true
		case message.Event.Event != "":
			m.onEvent(message.Event)
		default:
			m.deliver(message.ID, message.answer)
		}
	}
	err := in.Err()
	if err == nil {
		err = io.EOF
	}
	m.end(fmt.Errorf("%w: %w", errMonitorClosed, err))
}

func (m *monitor) end(err error) {
	m.conn.Close()
	m.mu.Lock()
	m.err = err
	m.mu.Unlock()
	close(m.ended)
}

// deliver hands an answer to whoever waits for it; nobody does if it is late.
func (m *monitor) deliver(id uint64, got answer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if mine, ok := m.waiting[id]; ok {
		delete(m.waiting, id)
		mine <- got
	}
}
