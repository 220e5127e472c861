//go:build linux

package reach

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// What sock_diag(7) says about sizes and places, in bytes.
const (
	headerSize  = unix.SizeofNlMsghdr
	requestSize = headerSize + 56 // struct inet_diag_req_v2
	messageSize = 72              // struct inet_diag_msg
	placePort   = 4
	placeSource = 8
	placeInode  = 68
)

var errNetlink = errors.New("an answer of netlink that cannot be read")

// diag asks netlink for the listening sockets of a protocol.
func (s *Service) diag(p protocol) ([]socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_INET_DIAG)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	buffer := s.buffer()
	defer s.buffers.Put(buffer)
	var found []socket
	for _, family := range [...]uint8{unix.AF_INET, unix.AF_INET6} {
		if found, err = dump(fd, family, p, buffer[:], found); err != nil {
			return nil, fmt.Errorf("sock_diag: %w", err)
		}
	}
	return found, nil
}

// dump appends the sockets of one family. The kernel has the answers ready
// once it has taken the question, so nothing here waits.
func dump(fd int, family uint8, p protocol, buffer []byte, found []socket) ([]socket, error) {
	var request [requestSize]byte
	binary.NativeEndian.PutUint32(request[0:], requestSize)
	binary.NativeEndian.PutUint16(request[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(request[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	request[headerSize], request[headerSize+1] = family, p.number
	binary.NativeEndian.PutUint32(request[headerSize+4:], 1<<p.state)
	if err := unix.Sendto(fd, request[:], 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	most := len(found) + maxSockets
	for {
		n, err := unix.Read(fd, buffer)
		if err != nil {
			return nil, err
		}
		var done bool
		if found, done, err = parseAnswer(buffer[:n], p, most, found); err != nil || done {
			return found, err
		}
	}
}

// parseAnswer appends the sockets of one answer, up to most of them in all, and
// reports whether it was the last.
func parseAnswer(answer []byte, p protocol, most int, found []socket) (_ []socket, done bool, err error) {
	if len(answer) == 0 {
		return nil, false, errNetlink
	}
	for len(answer) > 0 {
		if len(answer) < headerSize {
			return nil, false, errNetlink
		}
		size := int(binary.NativeEndian.Uint32(answer))
		if size < headerSize || size > len(answer) {
			return nil, false, errNetlink
		}
		body := answer[headerSize:size]
		switch binary.NativeEndian.Uint16(answer[4:]) {
		case unix.NLMSG_DONE:
			return found, true, nil
		case unix.NLMSG_ERROR:
			if len(body) < 4 {
				return nil, false, errNetlink
			}
			return nil, false, unix.Errno(-int32(binary.NativeEndian.Uint32(body))) //nolint:gosec // It is one.
		case unix.SOCK_DIAG_BY_FAMILY:
			if socket, ok := parseMessage(body, p); ok && len(found) < most {
				found = append(found, socket)
			}
		}
		answer = answer[min((size+3)&^3, len(answer)):]
	}
	return found, false, nil
}

func parseMessage(body []byte, p protocol) (socket, bool) {
	if len(body) < messageSize || body[1] != p.state {
		return socket{}, false
	}
	length := 16
	if body[0] == unix.AF_INET {
		length = 4
	}
	address, ok := netip.AddrFromSlice(body[placeSource : placeSource+length])
	port := binary.BigEndian.Uint16(body[placePort:])
	inode := binary.NativeEndian.Uint32(body[placeInode:])
	return socket{address.Unmap(), port, inode, p.number == unix.IPPROTO_UDP}, ok && port != 0
}
