package forward

import (
	"encoding/binary"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// diagRequest is struct inet_diag_req_v2 behind its netlink header, see
// sock_diag(7).
type diagRequest struct {
	header             unix.NlMsghdr
	family, protocol   uint8
	extensions, unused uint8
	states             uint32
	id                 diagID
}

// diagID is struct inet_diag_sockid; addresses and ports in network order.
type diagID struct {
	sourcePort, targetPort [2]byte
	source, target         [16]byte
	device                 uint32
	cookie                 [2]uint32
}

// diagAnswer is struct inet_diag_msg behind its netlink header.
type diagAnswer struct {
	header                        unix.NlMsghdr
	family, state, timer, retrans uint8
	id                            diagID
	expires, rqueue, wqueue       uint32
	uid, inode                    uint32
}

const tcpListen = 10 // TCP_LISTEN of the kernel's net/tcp_states.h

// clientLeft reports whether no process has a client's socket open any more.
// A client that half-closed and one that left look alike from here, but if
// the client is on this host the kernel knows its socket: one that no process
// has open has no inode. known is false where it cannot be told.
func clientLeft(client, here netip.AddrPort) (left, known bool) {
	if !client.Addr().IsLoopback() && client.Addr() != here.Addr() {
		return false, false
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return false, false
	}
	defer unix.Close(fd)
	request := diagRequest{
		header: unix.NlMsghdr{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: unix.NLM_F_REQUEST},
		family: unix.AF_INET, protocol: unix.IPPROTO_TCP, states: ^uint32(0),
		id: diagID{cookie: [2]uint32{^uint32(0), ^uint32(0)}},
	}
	request.header.Len = uint32(unsafe.Sizeof(request))
	if client.Addr().Is6() {
		request.family = unix.AF_INET6
	}
	binary.BigEndian.PutUint16(request.id.sourcePort[:], client.Port())
	binary.BigEndian.PutUint16(request.id.targetPort[:], here.Port())
	copy(request.id.source[:], client.Addr().AsSlice())
	copy(request.id.target[:], here.Addr().AsSlice())
	message := unsafe.Slice((*byte)(unsafe.Pointer(&request)), unsafe.Sizeof(request))
	if err := unix.Sendto(fd, message, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return false, false
	}
	return readDiag(fd)
}

func readDiag(fd int) (left, known bool) {
	// A buffer that is aligned as the structures in it are.
	var buf [128]uint32
	raw := unsafe.Slice((*byte)(unsafe.Pointer(&buf)), unsafe.Sizeof(buf))
	n, err := retry(func() (int, error) { return unix.Read(fd, raw) })
	if err != nil || n < int(unsafe.Sizeof(unix.NlMsghdr{})) {
		return false, false
	}
	answer := (*diagAnswer)(unsafe.Pointer(&buf))
	switch {
	case answer.header.Type == unix.NLMSG_ERROR:
		code := *(*int32)(unsafe.Pointer(&buf[unsafe.Sizeof(unix.NlMsghdr{})/4]))
		return true, os.IsNotExist(syscall.Errno(-code))
	case answer.header.Type != unix.SOCK_DIAG_BY_FAMILY || n < int(unsafe.Sizeof(diagAnswer{})):
		return false, false
	}
	// Where there is no connection the kernel may find a listener instead.
	return answer.inode == 0 || answer.state == tcpListen, true
}
