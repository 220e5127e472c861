package wire

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// The vsock device of vhost-device-vsock 0.3.0 has three faults.
//
// It gives the guest credit for what it took in by an account that it keeps
// wrongly: on a connection on which the host says nothing, a guest may stall for
// good. It loses a packet that the guest's kernel keeps in more than one piece,
// which are those above 32 KiB (Linux 6.12). And it takes a host's shutdown of
// one direction for the end of both.
//
// WithCredit mends that, used at both ends. What it sends is in frames: four
// bytes, of which the first is the kind and the others a number, then as many
// bytes if the kind is data. After each creditAfter bytes that an end took in
// without sending any, it sends a frame that says nothing, and carries credit.
//
// Such a frame must get through also when the peer reads nothing of what it
// was sent. So each end takes in all that arrives, which is bounded because the
// other never sends more than creditWindow bytes ahead of what was read, as
// TCP's windows do it. That is less than the sockets and the guest's kernel
// take, so that a write to the connection itself never waits for a reader.
const (
	creditWindow = 128 << 10
	creditAfter  = 64 << 10
	// creditChunk is how much data one frame carries, at most: with its
	// header it is one piece.
	creditChunk = 16 << 10

	creditData = 0 // that many bytes follow
	creditMore = 1 // that many more may be sent; 0: nothing, but it carries credit
	creditEnd  = 2 // nothing more will be sent: CloseWrite
)

// CreditConn is a vsock connection whose device forgets to give credit.
type CreditConn struct {
	conn net.Conn

	sending sync.Mutex // a frame is whole
	frame   []byte

	mu       sync.Mutex
	changed  sync.Cond // of all below
	arrived  bytes.Buffer
	owed     int   // was read, and the peer has not been told
	silent   int   // arrived since anything was sent
	window   int   // may be sent
	inErr    error // nothing more arrives
	outErr   error // nothing more can be sent
	readBy   creditDeadline
	writeBy  creditDeadline
	isClosed bool
}

// WithCredit wraps a vsock connection that goes through vhost-device-vsock,
// which the kernel command line of such a guest says: choiros.credit=1. Both
// ends do it, before anything is sent. It reads from conn from now on, until
// the connection ends or is closed.
func WithCredit(conn net.Conn) *CreditConn {
	c := &CreditConn{conn: conn, window: creditWindow}
	c.changed.L = &c.mu
	go c.receive()
	return c
}

// receive takes in all that arrives.
func (c *CreditConn) receive() {
	err := c.receiveFrames()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.isClosed {
		err = net.ErrClosed
	}
	if c.inErr == nil {
		c.inErr = err
	}
	if c.outErr == nil {
		c.outErr = err
		if errors.Is(err, io.EOF) {
			c.outErr = syscall.EPIPE
		}
	}
	c.changed.Broadcast()
}

func (c *CreditConn) receiveFrames() error {
	in := bufio.NewReaderSize(c.conn, creditChunk)
	chunk := make([]byte, creditChunk)
	for {
		if _, err := io.ReadFull(in, chunk[:4]); err != nil {
			return err // io.EOF between frames
		}
		n := int(binary.BigEndian.Uint32(chunk) & 0xffffff)
		switch kind := chunk[0]; kind {
		case creditData:
			if err := c.receiveData(in, n, chunk); err != nil {
				return err
			}
		case creditMore:
			if err := c.widen(n); err != nil {
				return err
			}
		case creditEnd:
			c.mu.Lock()
			c.inErr = io.EOF
			c.changed.Broadcast()
			c.mu.Unlock()
		default:
			return fmt.Errorf("%w: credit frame of kind %d", ErrProtocol, kind)
		}
	}
}

// receiveData takes in the n bytes of a frame, and gives credit for them.
func (c *CreditConn) receiveData(in io.Reader, n int, chunk []byte) error {
	for n > 0 {
		part := chunk[:min(n, len(chunk))]
		if _, err := io.ReadFull(in, part); err != nil {
			return unexpected(err)
		}
		n -= len(part)
		c.mu.Lock()
		tooMuch := c.inErr != nil || c.arrived.Len()+c.owed+len(part) > creditWindow
		if !tooMuch {
			c.arrived.Write(part)
			c.silent += len(part)
			c.changed.Broadcast()
		}
		due := c.silent >= creditAfter
		c.mu.Unlock()
		if tooMuch {
			return fmt.Errorf("%w: more was sent than the window takes", ErrProtocol)
		}
		if due {
			// A peer that is gone may have left more to be read.
			_ = c.send(creditMore, 0, nil)
		}
	}
	return nil
}

// widen notes that the peer has read n bytes.
func (c *CreditConn) widen(n int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.window+n > creditWindow {
		return fmt.Errorf("%w: a window of %d bytes", ErrProtocol, c.window+n)
	}
	c.window += n
	c.changed.Broadcast()
	return nil
}

// send writes one frame.
func (c *CreditConn) send(kind byte, n int, data []byte) error {
	c.sending.Lock()
	defer c.sending.Unlock()
	c.frame = binary.BigEndian.AppendUint32(c.frame[:0], uint32(kind)<<24|uint32(n))
	c.frame = append(c.frame, data...)
	c.mu.Lock()
	c.silent = 0
	c.mu.Unlock()
	_, err := c.conn.Write(c.frame)
	return err
}

// Read reads what the peer wrote; io.EOF comes after its CloseWrite.
func (c *CreditConn) Read(p []byte) (int, error) {
	c.mu.Lock()
	for len(p) > 0 && c.arrived.Len() == 0 {
		if c.inErr != nil || c.readBy.passed() {
			err := c.inErr
			if err == nil {
				err = os.ErrDeadlineExceeded
			}
			c.mu.Unlock()
			return 0, err
		}
		c.changed.Wait()
	}
	n, _ := c.arrived.Read(p)
	c.owed += n
	tell := 0
	if c.owed >= creditWindow/4 && c.inErr == nil {
		tell, c.owed = c.owed, 0
	}
	c.mu.Unlock()
	if tell > 0 {
		// That it cannot be sent shows in the next Read.
		_ = c.send(creditMore, tell, nil)
	}
	return n, nil
}

// Write writes all of p. Its deadline, as ever, may leave a part unwritten.
func (c *CreditConn) Write(p []byte) (int, error) {
	written := 0
	for written < len(p) {
		n, err := c.take(min(len(p)-written, creditChunk))
		if err != nil {
			return written, err
		}
		if err := c.send(creditData, n, p[written:written+n]); err != nil {
			return written, err
		}
		written += n
	}
	return written, nil
}

// take waits until something may be sent, and takes up to most bytes of that.
func (c *CreditConn) take(most int) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.outErr != nil:
			return 0, c.outErr
		case c.writeBy.passed():
			return 0, os.ErrDeadlineExceeded
		case c.window > 0:
			n := min(most, c.window)
			c.window -= n
			return n, nil
		}
		c.changed.Wait()
	}
}

// CloseWrite tells the peer that nothing more is written. Reading goes on.
func (c *CreditConn) CloseWrite() error {
	c.mu.Lock()
	err := c.outErr
	if err == nil {
		c.outErr = syscall.EPIPE
		c.changed.Broadcast()
	}
	c.mu.Unlock()
	if err != nil {
		return err
	}
	return c.send(creditEnd, 0, nil)
}

// Close closes the connection below, and ends what waits on it.
func (c *CreditConn) Close() error {
	c.mu.Lock()
	c.isClosed = true
	c.inErr, c.outErr = net.ErrClosed, net.ErrClosed
	c.arrived = bytes.Buffer{}
	c.changed.Broadcast()
	c.mu.Unlock()
	return c.conn.Close()
}

// LocalAddr is that of the connection below.
func (c *CreditConn) LocalAddr() net.Addr { return c.conn.LocalAddr() }

// RemoteAddr is that of the connection below.
func (c *CreditConn) RemoteAddr() net.Addr { return c.conn.RemoteAddr() }

// SetDeadline sets both deadlines.
func (c *CreditConn) SetDeadline(t time.Time) error {
	c.setDeadline(&c.readBy, t)
	c.setDeadline(&c.writeBy, t)
	return nil
}

// SetReadDeadline is net.Conn's.
func (c *CreditConn) SetReadDeadline(t time.Time) error {
	c.setDeadline(&c.readBy, t)
	return nil
}

// SetWriteDeadline is net.Conn's. It ends waiting for the peer to read.
func (c *CreditConn) SetWriteDeadline(t time.Time) error {
	c.setDeadline(&c.writeBy, t)
	return nil
}

// creditDeadline is a deadline, and what wakes those who wait when it passes.
type creditDeadline struct {
	at   time.Time
	wake *time.Timer
}

func (d *creditDeadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

func (c *CreditConn) setDeadline(d *creditDeadline, t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if d.wake != nil {
		d.wake.Stop()
		d.wake = nil
	}
	d.at = t
	c.changed.Broadcast()
	if !t.IsZero() && !d.passed() {
		d.wake = time.AfterFunc(time.Until(t), func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.changed.Broadcast()
		})
	}
}
