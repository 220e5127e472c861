// Package wire is the framing of the guest channel: what
// api/choiros/guest/v1/guest.proto says about bytes, in Go, for both sides.
//
// A Conn reads no byte beyond the frame it was asked for, so that a connection
// can become something else after one (a forwarded connection, a descriptor).
// It believes no length: what a peer announces is checked against a limit
// before memory is taken for it, and memory is taken as bytes arrive.
package wire

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

const (
	// Port is where guestd listens on the guest channel.
	Port = 1024
	// Protocol is the version that this code speaks.
	Protocol = 1
	// MaxFrame is the longest payload there is, in bytes.
	MaxFrame = 8 << 20
	// MaxFromGuest is the longest payload that the agent takes from a guest.
	MaxFromGuest = 1 << 20
	// ChunkSize is how much of a stream goes into one frame, at most.
	ChunkSize = 64 << 10

	headerSize = 5
	// trust is how much memory is taken on the word of a header alone.
	trust = 64 << 10
)

// Kind tells frames apart.
type Kind byte

// The kinds of frame.
const (
	// KindMessage is a Request or a Response.
	KindMessage Kind = iota
	KindData
	KindStderr
	// KindEvent is any other message. It has a kind of its own so that a
	// Response in its place, which ends a stream, is not mistaken for it.
	KindEvent
)

// kindOf is the kind of frame that a message goes in.
func kindOf(m proto.Message) Kind {
	switch m.(type) {
	case *guestv1.Request, *guestv1.Response:
		return KindMessage
	}
	return KindEvent
}

// ErrProtocol is wrapped by errors about a peer that does not keep to the
// protocol.
var ErrProtocol = errors.New("guest protocol violated")

// Conn is one connection of the guest channel. One goroutine may receive while
// others send.
type Conn struct {
	conn  net.Conn
	limit int

	header  [headerSize]byte // of what is being received
	payload []byte

	sending sync.Mutex
	out     []byte
}

// New returns a Conn that takes frames of up to limit bytes. It owns conn.
func New(conn net.Conn, limit int) *Conn { return &Conn{conn: conn, limit: limit} }

// Close closes the connection.
func (c *Conn) Close() error { return c.conn.Close() }

// NetConn returns the connection below, with nothing of it read ahead.
func (c *Conn) NetConn() net.Conn { return c.conn }

// Send sends a message.
func (c *Conn) Send(m proto.Message) error {
	c.sending.Lock()
	defer c.sending.Unlock()
	frame, err := c.appendMessage(m)
	if err != nil {
		return err
	}
	return c.write(frame)
}

// appendMessage returns a message's frame, in the buffer for sending.
func (c *Conn) appendMessage(m proto.Message) ([]byte, error) {
	frame, err := proto.MarshalOptions{}.MarshalAppend(append(c.out[:0], make([]byte, headerSize)...), m)
	if err != nil {
		return nil, err
	}
	return frame, putHeader(frame, kindOf(m))
}

func putHeader(frame []byte, kind Kind) error {
	size := len(frame) - headerSize
	if size > MaxFrame {
		return fmt.Errorf("a frame of %d bytes: the most is %d", size, MaxFrame)
	}
	binary.BigEndian.PutUint32(frame, uint32(size)) //nolint:gosec // Checked above.
	frame[4] = byte(kind)
	return nil
}

// write writes a frame and keeps its memory for the next if it is not much.
func (c *Conn) write(frame []byte) error {
	_, err := c.conn.Write(frame)
	if cap(frame) <= headerSize+ChunkSize {
		c.out = frame
	} else {
		clear(frame) // may have been secrets
		c.out = nil
	}
	return err
}

// SendData sends raw bytes, in as many frames as they need. None at all is the
// end of the stream of that kind.
func (c *Conn) SendData(kind Kind, data []byte) error {
	c.sending.Lock()
	defer c.sending.Unlock()
	for {
		n := min(len(data), ChunkSize)
		frame := append(append(c.out[:0], make([]byte, headerSize)...), data[:n]...)
		if err := putHeader(frame, kind); err != nil {
			return err
		}
		if err := c.write(frame); err != nil {
			return err
		}
		if data = data[n:]; len(data) == 0 {
			return nil
		}
	}
}

// Receive returns the next frame; its payload is valid until the next call. A
// peer that has closed between two frames is io.EOF.
func (c *Conn) Receive() (Kind, []byte, error) {
	if _, err := io.ReadFull(c.conn, c.header[:]); err != nil {
		return 0, nil, err
	}
	return c.receivePayload()
}

// receivePayload goes on after a header.
func (c *Conn) receivePayload() (Kind, []byte, error) {
	size, kind := int(binary.BigEndian.Uint32(c.header[:])), Kind(c.header[4])
	switch {
	case kind > KindEvent:
		return 0, nil, fmt.Errorf("%w: a frame of kind %d", ErrProtocol, kind)
	case size > c.limit:
		return 0, nil, fmt.Errorf("%w: a frame of %d bytes, where the most is %d", ErrProtocol, size, c.limit)
	}
	payload := c.payload[:0]
	for len(payload) < size {
		n := min(size-len(payload), trust)
		payload = slices.Grow(payload, n)
		part := payload[len(payload) : len(payload)+n]
		if _, err := io.ReadFull(c.conn, part); err != nil {
			return 0, nil, unexpected(err)
		}
		payload = payload[:len(payload)+n]
	}
	if cap(payload) <= ChunkSize {
		c.payload = payload
	} else {
		c.payload = nil
	}
	return kind, payload, nil
}

// unexpected is an error where a frame was begun.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// ReceiveMessage receives a message; a raw frame in its place is an error that
// wraps ErrProtocol. A Response in the place of another message ends the stream
// with that Response's failure.
func (c *Conn) ReceiveMessage(m proto.Message) error {
	kind, payload, err := c.Receive()
	if err != nil {
		return err
	}
	return decodeFrame(kind, payload, m)
}

func decodeFrame(kind Kind, payload []byte, m proto.Message) error {
	switch {
	case kind == kindOf(m):
		return Decode(payload, m)
	case kind == KindMessage:
		return Ending(payload)
	}
	return fmt.Errorf("%w: a frame of kind %d where a message should be", ErrProtocol, kind)
}

// Ending is the error of a stream that a Response, of this payload, has ended.
func Ending(payload []byte) error {
	var response guestv1.Response
	if err := Decode(payload, &response); err != nil {
		return err
	}
	if response.GetFailure() == nil {
		return fmt.Errorf("%w: an answer in the middle of a stream", ErrProtocol)
	}
	return &FailureError{response.GetFailure()}
}

// Decode reads the payload of a message's frame.
func Decode(payload []byte, m proto.Message) error {
	if err := proto.Unmarshal(payload, m); err != nil {
		return fmt.Errorf("%w: a message that cannot be read", ErrProtocol)
	}
	return nil
}

// Writer returns a writer of one kind of raw frame. Writing nothing does
// nothing; the end is SendData with nothing.
func (c *Conn) Writer(kind Kind) io.Writer { return writer{c, kind} }

type writer struct {
	conn *Conn
	kind Kind
}

func (w writer) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := w.conn.SendData(w.kind, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Reader returns the bytes of data frames up to the empty one, which is EOF. A
// Response in their place ends it with that Response's failure.
func (c *Conn) Reader() io.Reader { return &reader{conn: c} }

type reader struct {
	conn *Conn
	rest []byte
	err  error
}

func (r *reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if len(r.rest) == 0 && r.err == nil {
		r.rest, r.err = r.next()
	}
	if len(r.rest) == 0 {
		return 0, r.err
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *reader) next() ([]byte, error) {
	kind, payload, err := r.conn.Receive()
	switch {
	case err != nil:
		return nil, unexpected(err)
	case kind == KindData && len(payload) == 0:
		return nil, io.EOF
	case kind == KindData:
		return payload, nil
	case kind == KindMessage:
		return nil, Ending(payload)
	}
	return nil, fmt.Errorf("%w: a frame of kind %d where bytes should be", ErrProtocol, kind)
}

// FailureError is what the other side said went wrong.
type FailureError struct{ Failure *guestv1.Failure }

func (e *FailureError) Error() string { return e.Failure.GetMessage() }

// Bind ends all that waits on the connection when ctx ends. What it returns
// undoes that and reports whether ctx had not ended by then.
func (c *Conn) Bind(ctx context.Context) (unbind func() bool) {
	return context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
}
