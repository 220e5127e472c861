package guest

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/choiros/agent/internal/guest/wire"
)

// maxDatagram is the most that UDP carries over IPv4, in bytes.
const maxDatagram = 65507

// datagrams is a UDP connection over a byte stream: each datagram comes after
// its length in two bytes.
type datagrams struct {
	net.Conn

	mu  sync.Mutex
	out []byte
}

func newDatagrams(conn net.Conn) *datagrams { return &datagrams{Conn: conn} }

// Read returns one datagram. What p has no room for is lost, as it is with UDP.
func (d *datagrams) Read(p []byte) (int, error) {
	var header [2]byte
	if _, err := io.ReadFull(d.Conn, header[:]); err != nil {
		return 0, err
	}
	size := int(binary.BigEndian.Uint16(header[:]))
	if size > maxDatagram {
		return 0, fmt.Errorf("%w: a datagram of %d bytes", wire.ErrProtocol, size)
	}
	n, err := io.ReadFull(d.Conn, p[:min(size, len(p))])
	if err != nil {
		return n, err
	}
	_, err = io.CopyN(io.Discard, d.Conn, int64(size-n))
	return n, err
}

// Write sends one datagram.
func (d *datagrams) Write(p []byte) (int, error) {
	if len(p) > maxDatagram {
		return 0, fmt.Errorf("a datagram of %d bytes: the most is %d", len(p), maxDatagram)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.out = binary.BigEndian.AppendUint16(d.out[:0], uint16(len(p))) //nolint:gosec // Checked above.
	d.out = append(d.out, p...)
	if _, err := d.Conn.Write(d.out); err != nil {
		return 0, err
	}
	return len(p), nil
}
