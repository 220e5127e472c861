package forward

import (
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var (
	errReset = errors.New("connection reset")
	// errGone says that a side's other end is closed altogether, cleanly.
	errGone = errors.New("connection closed")
)

// side is one of the two connections that are carried into each other.
type side struct {
	conn net.Conn
	// raw is nil unless what conn carries is what its descriptor does: a wrapper
	// that has a descriptor may have buffers as well.
	raw syscall.RawConn
	// tcp is nil unless conn is one.
	tcp *net.TCPConn
}

func newSide(conn net.Conn) side {
	s := side{conn: conn}
	switch c := conn.(type) {
	case *net.TCPConn:
		s.tcp = c
		s.raw, _ = c.SyscallConn()
	case *net.UnixConn:
		if c.LocalAddr().Network() == "unix" { // a stream
			s.raw, _ = c.SyscallConn()
		}
	}
	return s
}

// closeWrite passes an end on.
func (s side) closeWrite() error {
	if c, ok := s.conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return errGone
}

// reset closes such that the other end sees a reset where there is such a
// thing: see SO_LINGER in socket(7).
func (s side) reset() {
	if c, ok := s.conn.(interface{ SetLinger(sec int) error }); ok {
		_ = c.SetLinger(0) // closed all the same
	}
	s.conn.Close()
}

// wake ends the waiting for something to read on this side, for good.
func (s side) wake() { _ = s.conn.SetReadDeadline(time.Unix(1, 0)) }

// broken reports that the other end reset the connection, or is gone.
func (s side) broken() error {
	if s.raw == nil {
		return nil
	}
	var events int16
	if err := s.raw.Control(func(fd uintptr) { events = pollFor(fd, 0) }); err != nil {
		return err
	}
	return s.brokenBy(events)
}

func (s side) brokenBy(events int16) error {
	switch {
	case events&(unix.POLLERR|unix.POLLNVAL) != 0:
		return errReset
	case events&unix.POLLHUP != 0 && s.tcp == nil:
		// In TCP it also says that both ends have ended what they send.
		return errGone
	}
	return nil
}

// pollFor asks for events, and for those that poll(2) always tells.
func pollFor(fd uintptr, events int16) int16 {
	fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		_, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return fds[0].Revents
		}
	}
}

// awaitBroken waits, after the other end has ended what it sends, for a reset
// or until wake, for which it returns nil.
func (s side) awaitBroken(ended *atomic.Int32) error {
	if s.raw == nil {
		return nil
	}
	var found error
	err := s.raw.Read(func(fd uintptr) bool {
		found = s.brokenBy(pollFor(fd, 0))
		return found != nil
	})
	// Once both directions have ended a hang-up is what there must be.
	if ended.Load() == 2 || errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return errors.Join(found, err)
}

// pump carries one direction.
type pump struct {
	from, to side
	buffers  *buffers
	count    *atomic.Uint64
	stall    time.Duration

	// What the steps below share with who calls them. The method values are
	// made once: they would be made anew for each call otherwise.
	buf     *[]byte // while something is in it
	n       int
	out     []byte // what is left to write
	pipe    *pipe  // while in bulk
	err     error
	patient bool
	readStep, writeStep,
	fillStep, drainStep func(fd uintptr) bool
}

func newPump(from, to side, f *Forwarder, count *atomic.Uint64) *pump {
	p := &pump{from: from, to: to, buffers: f.buffers, count: count, stall: f.stall}
	p.readStep, p.writeStep = p.read, p.write
	p.fillStep, p.drainStep = p.fill, p.drain
	return p
}

// run carries until from ends, and passes the end on. While nothing comes it
// holds no buffer.
func (p *pump) run() error {
	defer p.drop()
	for {
		err := p.receive()
		if p.n > 0 {
			full := p.n == len(*p.buf)
			if err := p.send((*p.buf)[:p.n]); err != nil {
				return err
			}
			p.drop()
			if full && err == nil {
				err = p.bulk()
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return p.to.closeWrite()
		case err != nil:
			return err
		}
	}
}

func (p *pump) drop() {
	if p.buf != nil {
		p.buffers.put(p.buf)
		p.buf = nil
	}
	p.n, p.out = 0, nil // an empty slice would still hold the buffer
}

// receive waits for data: p.n bytes of p.buf.
func (p *pump) receive() error {
	p.n = 0
	if p.from.raw == nil {
		p.buf = p.buffers.get()
		var err error
		p.n, err = p.from.conn.Read(*p.buf)
		return err
	}
	p.err = nil
	if err := p.from.raw.Read(p.readStep); err != nil {
		return err
	}
	return p.err
}

// read is a step of receive: false waits.
func (p *pump) read(fd uintptr) bool {
	if p.buf == nil {
		p.buf = p.buffers.get()
	}
	p.n, p.err = retry(func() (int, error) { return unix.Read(int(fd), *p.buf) })
	switch {
	case errors.Is(p.err, unix.EAGAIN):
		p.err = nil
		p.drop()
		return false
	case p.err == nil && p.n == 0:
		p.err = io.EOF
	}
	p.n = max(p.n, 0)
	return true
}

// retry repeats a call that a signal interrupted.
func retry[T any](call func() (T, error)) (T, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// send writes all of data, for as long as that takes.
func (p *pump) send(data []byte) error {
	if p.to.raw == nil {
		n, err := p.to.conn.Write(data)
		p.count.Add(uint64(max(n, 0)))
		return err
	}
	p.out = data
	return p.push(p.writeStep, func() bool { return len(p.out) == 0 })
}

// push repeats a step that writes, until done. While the other side takes
// nothing it looks now and then whether this one is still there: who is
// stuck would otherwise never learn that its peer has gone.
func (p *pump) push(step func(fd uintptr) bool, done func() bool) error {
	p.patient, p.err = false, nil
	for {
		err := p.to.raw.Write(step)
		switch {
		case p.err != nil:
			return p.err
		case err == nil && done():
			if p.patient {
				return p.to.conn.SetWriteDeadline(time.Time{})
			}
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			if broken := p.from.broken(); errors.Is(broken, errReset) {
				return broken
			}
		case err != nil:
			return err
		}
		p.patient = true
		if err := p.to.conn.SetWriteDeadline(time.Now().Add(p.stall)); err != nil {
			return err
		}
	}
}

// write is a step of push.
func (p *pump) write(fd uintptr) bool {
	for len(p.out) > 0 {
		n, err := retry(func() (int, error) { return unix.Write(int(fd), p.out) })
		if errors.Is(err, unix.EAGAIN) {
			return !p.patient
		}
		if err != nil {
			p.err = os.NewSyscallError("write", err)
			return true
		}
		p.out = p.out[n:]
		p.count.Add(uint64(n))
	}
	return true
}
