//go:build unix

package wire

import (
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// errNoDescriptors is a channel over which none can be passed.
var errNoDescriptors = errors.New("descriptors pass over unix sockets alone")

// MaxDescriptors is how many descriptors go with one message, at most.
const MaxDescriptors = 16

// CanPassDescriptors reports whether SendDescriptors and ReceiveDescriptors
// work on a connection.
func CanPassDescriptors(conn net.Conn) bool {
	_, ok := conn.(*net.UnixConn)
	return ok
}

// SendDescriptors sends a message along with descriptors, which stay the
// caller's; see SCM_RIGHTS in unix(7).
func (c *Conn) SendDescriptors(m proto.Message, fds ...int) error {
	conn, ok := c.conn.(*net.UnixConn)
	if !ok {
		return errNoDescriptors
	}
	c.sending.Lock()
	defer c.sending.Unlock()
	frame, err := c.appendMessage(m)
	if err != nil {
		return err
	}
	rights := unix.UnixRights(fds...)
	n, sent, err := conn.WriteMsgUnix(frame, rights, nil)
	if err != nil {
		return err
	}
	if sent != len(rights) {
		return fmt.Errorf("sent %d bytes of %d", sent, len(rights))
	}
	return c.write(frame[n:])
}

// ReceiveDescriptors receives a message, and the descriptors that came with
// it: most of them, whatever else was sent. The caller closes them.
func (c *Conn) ReceiveDescriptors(m proto.Message, most int) ([]int, error) {
	conn, ok := c.conn.(*net.UnixConn)
	if !ok {
		return nil, errNoDescriptors
	}
	// The kernel drops what there is no room for (MSG_CTRUNC), but the room is
	// rounded up.
	rights := make([]byte, unix.CmsgSpace(4*most))
	n, size, _, _, err := conn.ReadMsgUnix(c.header[:], rights)
	if err != nil {
		return nil, err
	}
	fds, err := descriptors(rights[:size])
	if err == nil {
		for _, surplus := range fds[min(most, len(fds)):] {
			_ = unix.Close(surplus)
		}
		fds = fds[:min(most, len(fds))]
		err = c.finishMessage(n, m)
	}
	if err != nil {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		return nil, err
	}
	return fds, nil
}

// finishMessage goes on after n bytes of a header.
func (c *Conn) finishMessage(n int, m proto.Message) error {
	for n < headerSize {
		more, err := c.conn.Read(c.header[n:])
		if err != nil {
			return unexpected(err)
		}
		n += more
	}
	kind, payload, err := c.receivePayload()
	if err != nil {
		return err
	}
	return decodeFrame(kind, payload, m)
}

// descriptors takes those that control messages bring.
func descriptors(control []byte) ([]int, error) {
	if len(control) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	var all []int
	for _, message := range messages {
		fds, err := unix.ParseUnixRights(&message)
		if err != nil {
			continue // not descriptors
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
		}
		all = append(all, fds...)
	}
	return all, nil
}
