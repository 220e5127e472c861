//go:build unix

package wire

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// errNoDescriptors is a channel over which none can be passed.
var errNoDescriptors = errors.New("descriptors pass over unix sockets alone")

// CanPassDescriptors reports whether SendDescriptor and ReceiveDescriptor work
// on a connection.
func CanPassDescriptors(conn net.Conn) bool {
	_, ok := conn.(*net.UnixConn)
	return ok
}

// SendDescriptor sends a message along with a descriptor, which stays the
// caller's; see SCM_RIGHTS in unix(7).
func (c *Conn) SendDescriptor(m proto.Message, fd int) error {
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
	rights := unix.UnixRights(fd)
	n, sent, err := conn.WriteMsgUnix(frame, rights, nil)
	if err != nil {
		return err
	}
	if sent != len(rights) {
		return fmt.Errorf("sent %d bytes of %d", sent, len(rights))
	}
	return c.write(frame[n:])
}

// ReceiveDescriptor receives a message, and the descriptor that came with it
// or nil. One descriptor is taken, whatever else was sent.
func (c *Conn) ReceiveDescriptor(m proto.Message) (*os.File, error) {
	conn, ok := c.conn.(*net.UnixConn)
	if !ok {
		return nil, errNoDescriptors
	}
	// Room for one: the kernel drops what there is no room for (MSG_CTRUNC).
	rights := make([]byte, unix.CmsgSpace(4))
	n, size, _, _, err := conn.ReadMsgUnix(c.header[:], rights)
	if err != nil {
		return nil, err
	}
	file, err := descriptor(rights[:size])
	if err != nil {
		return nil, err
	}
	if err := c.finishMessage(n, m); err != nil {
		if file != nil {
			file.Close()
		}
		return nil, err
	}
	return file, nil
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

// descriptor takes the first descriptor of control messages and closes others.
func descriptor(control []byte) (*os.File, error) {
	if len(control) == 0 {
		return nil, nil //nolint:nilnil // None was sent, and that is no error.
	}
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	var file *os.File
	for _, message := range messages {
		fds, err := unix.ParseUnixRights(&message)
		if err != nil {
			continue // not descriptors
		}
		for _, fd := range fds {
			if file != nil {
				_ = unix.Close(fd)
				continue
			}
			unix.CloseOnExec(fd)
			file = os.NewFile(uintptr(fd), "passed")
		}
	}
	return file, nil
}
