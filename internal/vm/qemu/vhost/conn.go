//go:build linux

package vhost

import (
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// linger is how long a guest may take to end a connection that was closed here, as
// with Linux.
const linger = 8 * time.Second

// chunk is how much is read from a host's end at once, in bytes.
const chunk = 64 << 10

// chunks are taken while there is something to be read: most connections are
// silent most of the time.
var chunks = sync.Pool{New: func() any { return new([chunk]byte) }}

// conn is a connection. What changes is guarded by the device's mu.
type conn struct {
	device *Device
	key    key
	end    *net.UnixConn   // ours; the other is whoever's has dialled or accepts
	raw    syscall.RawConn // end's

	answered chan struct{} // closed when the guest has; nil: it was the guest that asked
	refusal  error
	gone     bool // it is no connection any more

	// What the guest takes in all, what it says it has taken, and how much it
	// was sent: bytes, modulo 1<<32.
	guestRoom, guestTaken, sent uint32

	// How much the guest has sent, how much of that was given to the host's
	// end, and of how much the guest was told.
	got, given, told uint32
	backlog          []byte // what is to be given
	draining         bool   // drain gives it
	telling          bool   // an answer with credit is under way
	deaf             bool   // the host's end reads no more
	closed           uint32 // what the guest does no more: flags of opShutdown
}

// pending reports whether the guest has yet to answer.
func (c *conn) pending() bool {
	select {
	case <-c.answered:
		return false
	default:
		return c.answered != nil
	}
}

// settle ends Dial.
func (c *conn) settle(refusal error) {
	c.refusal = refusal
	close(c.answered)
	c.device.changed.Broadcast()
}

// credit is how much the guest takes now, in bytes.
func (c *conn) credit() int {
	under := c.sent - c.guestTaken
	if c.pending() || under >= c.guestRoom {
		return 0
	}
	return int(c.guestRoom - under)
}

// serve sends the guest a first packet, then what the host writes, and then
// that it will write no more.
func (c *conn) serve(op uint16) {
	if !c.device.send(c, header{op: op}, nil) {
		return
	}
	for c.carry() {
	}
	// It may read on.
	over := false
	for first := true; !over; first = false {
		err := c.raw.Read(func(fd uintptr) bool {
			over = hungUp(fd)
			return over || first
		})
		if err != nil {
			return // it was closed: the guest has ended it
		}
		flags := uint32(shutSend)
		if over {
			flags = shutBoth
		}
		if !c.device.send(c, header{op: opShutdown, flags: flags}, nil) {
			return
		}
	}
	time.AfterFunc(linger, func() {
		c.device.mu.Lock()
		defer c.device.mu.Unlock()
		c.device.reset(c)
	})
}

// carry sends the guest what the host writes next, and reports whether there
// may be more.
func (c *conn) carry() bool {
	var buffer *[chunk]byte
	n := 0
	err := c.raw.Read(func(fd uintptr) bool {
		buffer = chunks.Get().(*[chunk]byte) //nolint:forcetypeassert // It has no others.
		var err error
		if n, err = retry(func() (int, error) { return unix.Read(int(fd), buffer[:]) }); !errors.Is(err, unix.EAGAIN) {
			return true
		}
		chunks.Put(buffer)
		buffer = nil
		return false
	})
	if buffer == nil {
		return false
	}
	defer chunks.Put(buffer)
	return err == nil && n > 0 && c.device.send(c, header{op: opData}, buffer[:n])
}

// hungUp reports whether nobody has the other end of a pair any more.
func hungUp(fd uintptr) bool {
	poll := []unix.PollFd{{Fd: int32(fd)}} //nolint:gosec // A descriptor.
	n, err := retry(func() (int, error) { return unix.Poll(poll, 0) })
	return err == nil && n > 0 && poll[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
}

func retry(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// deliver gives the host what the guest has sent, n bytes, and keeps what it
// does not take at once. False: the guest had no credit for it, or has said
// that there would be none.
func (c *conn) deliver(pieces [][]byte, n uint32) bool {
	if c.closed&shutSend != 0 || n > room-(c.got-c.given) {
		return false
	}
	c.got += n
	if !c.draining && !c.deaf {
		did := c.give(pieces)
		c.given += uint32(did) //nolint:gosec // At most n.
		pieces = skip(pieces, did)
	}
	if c.deaf {
		c.given = c.got
	} else if c.given != c.got {
		for _, piece := range pieces {
			c.backlog = append(c.backlog, piece...)
		}
		if !c.draining && len(c.backlog) > 0 {
			c.draining = true
			go c.drain()
		}
	}
	c.tellIfDue()
	return true
}

// give writes what the host's end takes without waiting.
func (c *conn) give(pieces [][]byte) int {
	n := 0
	err := c.raw.Write(func(fd uintptr) bool {
		did, err := retry(func() (int, error) { return unix.Writev(int(fd), pieces) })
		if err == nil {
			n = did
		} else if !errors.Is(err, unix.EAGAIN) {
			c.deafen()
		}
		return true
	})
	if err != nil {
		c.deafen()
	}
	return n
}

// drain gives the host its backlog.
func (c *conn) drain() {
	c.device.mu.Lock()
	defer c.device.mu.Unlock()
	for len(c.backlog) > 0 && !c.deaf {
		data := c.backlog
		c.backlog = nil
		c.device.mu.Unlock()
		_, err := c.end.Write(data)
		c.device.mu.Lock()
		if err == nil {
			c.given += uint32(len(data)) //nolint:gosec // At most room.
		} else {
			c.deafen()
		}
		c.tellIfDue()
	}
	c.draining = false
	switch {
	case c.gone:
		c.end.Close()
	case c.closed&shutSend != 0:
		_ = c.end.CloseWrite() // nobody may be there to see it
	}
}

// deafen notes that the host's end reads no more. What the guest sends is
// thrown away, and the guest is told that.
func (c *conn) deafen() {
	if c.deaf {
		return
	}
	c.deaf, c.backlog, c.given = true, nil, c.got
	if !c.gone {
		c.device.answer(answer{key: c.key, kind: typeStream, op: opShutdown, flags: shutReceive, conn: c})
	}
}

// tellIfDue gives the guest credit for what was taken, if it is much.
func (c *conn) tellIfDue() {
	if c.given-c.told >= room/4 {
		c.tell()
	}
}

func (c *conn) tell() {
	if !c.telling && !c.gone {
		c.telling = true
		c.device.answer(answer{key: c.key, kind: typeStream, op: opCreditUpdate, conn: c})
	}
}

// shut notes what the guest does no more. False: nothing is left to be done.
func (c *conn) shut(flags uint32) bool {
	if flags&shutSend != 0 && c.closed&shutSend == 0 && !c.draining {
		_ = c.end.CloseWrite() // nobody may be there to see it
	}
	if flags&shutReceive != 0 {
		_ = c.end.CloseRead()
	}
	c.closed |= flags & shutBoth
	return c.closed != shutBoth && !c.pending()
}

// pair makes two connected sockets.
func pair() (ours, theirs *net.UnixConn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "vsock")
		conn, failed := net.FileConn(file)
		file.Close()
		if err = errors.Join(err, failed); failed == nil {
			ends[i] = conn.(*net.UnixConn) //nolint:forcetypeassert // It is a unix socket.
		}
	}
	if err != nil {
		for _, end := range ends {
			if end != nil {
				end.Close()
			}
		}
		return nil, nil, err
	}
	return ends[0], ends[1], nil
}
