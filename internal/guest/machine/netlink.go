//go:build linux

package machine

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"
)

// netlink is a socket to the kernel's configuration of the network; see
// rtnetlink(7).
type netlink struct{ fd int }

func openNetlink() (*netlink, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	return &netlink{fd}, err
}

func (n *netlink) close() { _ = unix.Close(n.fd) }

// up switches an interface on. mtu 0: as it is.
func (n *netlink) up(index, mtu uint32) error {
	m := newMessage(unix.RTM_NEWLINK, 0)
	m.append(unix.AF_UNSPEC, 0, 0, 0) // struct ifinfomsg
	m.append32(index, unix.IFF_UP, unix.IFF_UP)
	if mtu > 0 {
		m.attribute(unix.IFLA_MTU, binary.NativeEndian.AppendUint32(nil, mtu))
	}
	return n.do(m)
}

// addAddress gives an interface an address that it may have already.
func (n *netlink) addAddress(index uint32, address netip.Prefix) error {
	m := newMessage(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	m.append(family(address.Addr()), byte(address.Bits()), unix.IFA_F_PERMANENT, unix.RT_SCOPE_UNIVERSE) // struct ifaddrmsg
	m.append32(index)
	m.attribute(unix.IFA_LOCAL, address.Addr().AsSlice())
	m.attribute(unix.IFA_ADDRESS, address.Addr().AsSlice())
	return n.do(m)
}

// deleteAddress takes an address from an interface, and with the last one all
// routes by way of it.
func (n *netlink) deleteAddress(index uint32, address netip.Prefix) error {
	m := newMessage(unix.RTM_DELADDR, 0)
	m.append(family(address.Addr()), byte(address.Bits()), 0, unix.RT_SCOPE_UNIVERSE) // struct ifaddrmsg
	m.append32(index)
	m.attribute(unix.IFA_LOCAL, address.Addr().AsSlice())
	return n.do(m)
}

func (n *netlink) addDefaultRoute(index uint32, gateway netip.Addr) error {
	m := newMessage(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	// struct rtmsg
	m.append(family(gateway), 0, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST)
	m.append32(0)
	m.attribute(unix.RTA_GATEWAY, gateway.AsSlice())
	m.attribute(unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, index))
	return n.do(m)
}

func family(address netip.Addr) byte {
	if address.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// message is a request, built from front to back.
type message struct{ bytes []byte }

func newMessage(kind, flags uint16) *message {
	m := &message{}
	m.append32(0) // the length, once known
	m.bytes = binary.NativeEndian.AppendUint16(m.bytes, kind)
	m.bytes = binary.NativeEndian.AppendUint16(m.bytes, flags|unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	m.append32(1, 0) // sequence number, port
	return m
}

func (m *message) append(values ...byte) { m.bytes = append(m.bytes, values...) }

func (m *message) append32(values ...uint32) {
	for _, value := range values {
		m.bytes = binary.NativeEndian.AppendUint32(m.bytes, value)
	}
}

func (m *message) attribute(kind uint16, value []byte) {
	m.bytes = binary.NativeEndian.AppendUint16(m.bytes, uint16(unix.SizeofRtAttr+len(value))) //nolint:gosec // Small.
	m.bytes = binary.NativeEndian.AppendUint16(m.bytes, kind)
	m.bytes = append(m.bytes, value...)
	m.bytes = append(m.bytes, make([]byte, -len(value)&3)...)
}

// do sends a request and waits for what the kernel says of it, which it does at
// once.
func (n *netlink) do(m *message) error {
	binary.NativeEndian.PutUint32(m.bytes, uint32(len(m.bytes))) //nolint:gosec // Small.
	if err := unix.Sendto(n.fd, m.bytes, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 4<<10)
	size, err := unix.Read(n.fd, answer)
	if err != nil {
		return err
	}
	return acknowledged(answer[:size])
}

var errNetlink = errors.New("an answer of netlink that cannot be read")

// acknowledged is what an answer, struct nlmsgerr, says.
func acknowledged(answer []byte) error {
	if len(answer) < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return errNetlink
	}
	if number := int32(binary.NativeEndian.Uint32(answer[unix.SizeofNlMsghdr:])); number < 0 { //nolint:gosec // An errno, negated.
		return unix.Errno(-number)
	}
	return nil
}
