package network

import (
	"bytes"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// copySize is also more than a datagram can have.
	copySize = 64 << 10
	// stallCheck is how often who waits for a guest that does not read looks
	// whether the host's side is still there.
	stallCheck = 5 * time.Second
	// flushTimeout is how long a guest may take to read what came before a
	// reset, and flushCheck how often that is looked at.
	flushTimeout = 5 * time.Second
	flushCheck   = 2 * time.Millisecond
	// lingerTimeout is how long a guest may take to read the rest of what it
	// was sent, once both sides have ended.
	lingerTimeout = time.Minute
	lingerCheck   = time.Second
)

var (
	errReset     = errors.New("connection reset")
	errGuestGone = errors.New("the guest's side has ended")
)

// carry carries both directions until both have ended. Ends, resets and
// slowness are passed on, each in its direction.
func (c *connection) carry() {
	// A reset by the guest must reach who waits for the host alone.
	ended := waiter.NewFunctionEntry(waiter.EventHUp|waiter.EventErr, func(waiter.EventMask) { c.guestChanged() })
	c.queue.EventRegister(&ended)
	defer c.queue.EventUnregister(&ended)
	c.guestChanged() // that came too early to be heard

	var other sync.WaitGroup
	other.Go(func() {
		err := c.toHost()
		switch {
		case errors.Is(err, errGuestGone):
			c.abort()
		case err != nil:
			// What the host had sent before is still to be read.
			c.hostFailed.Store(true)
		}
	})
	err := c.toGuest()
	if err != nil {
		if !errors.Is(err, errGuestGone) {
			c.flush()
		}
		c.abort()
	}
	other.Wait()
	if err != nil || c.hostFailed.Load() {
		c.flush()
		c.abort()
		return
	}
	c.host.Close()
	c.linger()
}

// guestChanged aborts the host's side if the guest's has failed. The guest's
// may be locked.
func (c *connection) guestChanged() {
	switch tcp.EndpointState(c.guest.State()) {
	case tcp.StateError:
		c.abortHost()
	case tcp.StateClose:
		// So ends a connection that was reset after the guest's end, too.
		if !c.finSent.Load() {
			c.abortHost()
		}
	}
	select {
	case c.over <- struct{}{}:
	default:
	}
}

// linger waits until the guest has all that it was sent. Both sides have ended.
func (c *connection) linger() {
	limit, check := time.NewTimer(lingerTimeout), time.NewTicker(lingerCheck)
	defer limit.Stop()
	defer check.Stop()
	for {
		switch tcp.EndpointState(c.guest.State()) {
		case tcp.StateTimeWait, tcp.StateClose, tcp.StateError:
			return
		case tcp.StateFinWait2:
			// The guest's end is long here. gVisor takes a connection whose end it
			// has sent twice for one that waits for the guest's, and never says so.
			return
		}
		select {
		case <-c.over:
		case <-check.C:
		case <-c.ctx.Done():
			return
		case <-limit.C:
			c.abort()
			return
		}
	}
}

// flush waits for the guest to take what was sent to it before a reset, which
// would throw it away.
func (c *connection) flush() {
	// gVisor does not tell how much is left, but with a buffer of one byte there
	// is room only once nothing is.
	c.guest.SocketOptions().SetSendBufferSize(1, true)
	limit, check := time.NewTimer(flushTimeout), time.NewTicker(flushCheck)
	defer limit.Stop()
	defer check.Stop()
	for c.guest.Readiness(waiter.WritableEvents) == 0 {
		select {
		case <-check.C:
		case <-limit.C:
			return
		case <-c.ctx.Done():
			return
		}
	}
}

// toHost carries what the guest sends, and its end. An error that is not
// errGuestGone is the host's. While nothing comes it holds no buffer.
func (c *connection) toHost() error {
	entry, readable := waiter.NewChannelEntry(waiter.ReadableEvents)
	c.queue.EventRegister(&entry)
	defer c.queue.EventUnregister(&entry)
	for {
		err := c.toHostOnce()
		switch {
		case errors.Is(err, io.EOF):
			return c.host.CloseWrite()
		case errors.Is(err, unix.EAGAIN):
			select {
			case <-readable:
			case <-c.ctx.Done():
				return errGuestGone
			}
		case err != nil:
			return err
		}
	}
}

// toHostOnce returns EAGAIN if the guest has sent nothing.
func (c *connection) toHostOnce() error {
	buf := c.network.buffers.Get().(*[]byte)
	defer c.network.buffers.Put(buf)
	w := tcpip.SliceWriter(*buf)
	got, err := c.guest.Read(&w, tcpip.ReadOptions{})
	switch err.(type) {
	case nil:
		_, err := c.host.Write((*buf)[:got.Count])
		return err
	case *tcpip.ErrWouldBlock:
		return unix.EAGAIN
	case *tcpip.ErrClosedForReceive:
		return io.EOF
	}
	return errGuestGone
}

// toGuest carries what the host's side sends, and its end. An error that is
// not errGuestGone is the host's.
func (c *connection) toGuest() error {
	raw, err := c.host.SyscallConn()
	if err != nil {
		return err
	}
	entry, writable := waiter.NewChannelEntry(waiter.WritableEvents)
	c.queue.EventRegister(&entry)
	defer c.queue.EventUnregister(&entry)
	var (
		buf *[]byte
		n   int
	)
	drop := func() {
		if buf != nil {
			c.network.buffers.Put(buf)
			buf = nil
		}
	}
	defer drop()
	read := func(fd uintptr) bool {
		if buf == nil {
			buf = c.network.buffers.Get().(*[]byte)
		}
		n, err = retry(func() (int, error) { return unix.Read(int(fd), *buf) })
		if errors.Is(err, unix.EAGAIN) {
			drop()
			return false
		}
		return true
	}
	for {
		if err := errors.Join(raw.Read(read), err); err != nil {
			return os.NewSyscallError("read", err)
		}
		if n == 0 {
			if c.hostFailed.Load() {
				return errReset
			}
			c.finSent.Store(true)
			if err := c.guest.Shutdown(tcpip.ShutdownWrite); err != nil {
				return errGuestGone
			}
			return nil
		}
		if err := c.giveGuest((*buf)[:n], writable); err != nil {
			return err
		}
		drop()
	}
}

// giveGuest waits until the guest's side has taken data.
func (c *connection) giveGuest(data []byte, writable <-chan struct{}) error {
	var r bytes.Reader
	for len(data) > 0 {
		r.Reset(data)
		n, err := c.guest.Write(&r, tcpip.WriteOptions{})
		data = data[n:]
		switch err.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			if err := c.awaitGuest(writable); err != nil {
				return err
			}
		default:
			return errGuestGone
		}
	}
	return nil
}

// awaitGuest waits for room. Of a guest that does not read, the host's side
// would otherwise not be heard again.
func (c *connection) awaitGuest(writable <-chan struct{}) error {
	check := time.NewTimer(stallCheck)
	defer check.Stop()
	for {
		select {
		case <-writable:
			return nil
		case <-c.ctx.Done():
			return errGuestGone
		case <-check.C:
			if c.hostBroken() {
				return errReset
			}
			check.Reset(stallCheck)
		}
	}
}

// hostBroken reports that the host's side was reset.
func (c *connection) hostBroken() bool {
	raw, err := c.host.SyscallConn()
	if err != nil {
		return true
	}
	var fds []unix.PollFd
	err = raw.Control(func(fd uintptr) {
		fds = []unix.PollFd{{Fd: int32(fd)}}
		_, _ = retry(func() (int, error) { return unix.Poll(fds, 0) }) // no events then
	})
	return err != nil || fds[0].Revents&(unix.POLLERR|unix.POLLNVAL) != 0
}

// retry repeats a call that a signal interrupted.
func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
