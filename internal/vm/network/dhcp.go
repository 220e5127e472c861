package network

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// The layout of a DHCP message: RFC 2131, and RFC 2132 for its options.
const (
	dhcpServerPort = 67
	dhcpClientPort = 68

	dhcpFixed   = 236 // up to the cookie
	dhcpMinimum = 300 // BOOTP's, below which old clients ignore a message
	dhcpLease   = 24 * 60 * 60

	dhcpDiscover, dhcpOffer, dhcpRequest, dhcpAck, dhcpNak, dhcpInform = 1, 2, 3, 5, 6, 8

	optionMask, optionRouter, optionDNS, optionMTU                  = 1, 3, 6, 26
	optionAddress, optionLease, optionType, optionServer, optionEnd = 50, 51, 53, 54, 255
)

var dhcpCookie = []byte{99, 130, 83, 99}

// answerDHCP answers a message, given with its IPv4 header, that classify let
// through. There is one address to give.
func (n *Network) answerDHCP(ip []byte) {
	udp := ip[header.IPv4(ip).HeaderLength():header.IPv4(ip).TotalLength()]
	reply, broadcast := n.dhcpReply(udp[header.UDPMinimumSize:])
	if reply == nil {
		return
	}
	to := netip.AddrPortFrom(Guest, dhcpClientPort)
	if broadcast {
		to = netip.AddrPortFrom(netip.AddrFrom4([4]byte{255, 255, 255, 255}), dhcpClientPort)
	}
	n.sendUDP(netip.AddrPortFrom(Gateway, dhcpServerPort), to, reply)
}

// dhcpReply returns nil where there is nothing to say.
func (n *Network) dhcpReply(m []byte) (reply []byte, broadcast bool) {
	const request, answer = 1, 2 // the first byte
	if len(m) < dhcpFixed+len(dhcpCookie) || m[0] != request || m[1] != 1 || m[2] != 6 ||
		!bytes.Equal(m[dhcpFixed:][:4], dhcpCookie) || tcpip.LinkAddress(m[28:34]) != n.link.guest {
		return nil, false
	}
	options := dhcpOptions(m[dhcpFixed+4:])
	guest, gateway := Guest.AsSlice(), Gateway.AsSlice()
	if server, given := options[optionServer]; given && !bytes.Equal(server, gateway) {
		return nil, false
	}
	kind, give := byte(0), guest
	switch asked := options[optionType]; {
	case len(asked) != 1:
		return nil, false
	case asked[0] == dhcpDiscover:
		kind = dhcpOffer
	case asked[0] == dhcpRequest:
		wanted, given := options[optionAddress]
		if !given {
			wanted = m[12:16] // ciaddr, of one that renews
		}
		kind = dhcpAck
		if !bytes.Equal(wanted, guest) {
			kind, give = dhcpNak, make([]byte, 4)
		}
	case asked[0] == dhcpInform:
		kind, give = dhcpAck, make([]byte, 4)
	default:
		return nil, false
	}
	reply = make([]byte, dhcpFixed, dhcpMinimum)
	copy(reply, []byte{answer, 1, 6, 0})
	copy(reply[4:], m[4:8])    // xid
	copy(reply[10:], m[10:12]) // flags
	copy(reply[16:], give)
	copy(reply[20:], gateway)
	copy(reply[28:], m[28:34])
	reply = append(reply, dhcpCookie...)
	reply = append(reply, optionType, 1, kind)
	reply = append(append(reply, optionServer, 4), gateway...)
	if kind != dhcpNak {
		reply = append(reply, optionMask, 4, 255, 255, 255, 0)
		reply = append(append(reply, optionRouter, 4), gateway...)
		reply = append(append(reply, optionDNS, 4), gateway...)
		reply = binary.BigEndian.AppendUint16(append(reply, optionMTU, 2), uint16(n.link.mtu))
		if give[0] != 0 {
			reply = binary.BigEndian.AppendUint32(append(reply, optionLease, 4), dhcpLease)
		}
	}
	reply = append(reply, optionEnd)
	return append(reply, make([]byte, max(0, dhcpMinimum-len(reply)))...), m[10]&0x80 != 0 || kind == dhcpNak
}

// dhcpOptions returns what can be read of options.
func dhcpOptions(b []byte) map[byte][]byte {
	found := map[byte][]byte{}
	for len(b) > 0 && b[0] != optionEnd {
		if b[0] == 0 { // padding
			b = b[1:]
			continue
		}
		if len(b) < 2 || len(b) < 2+int(b[1]) {
			break
		}
		found[b[0]] = b[2 : 2+int(b[1])]
		b = b[2+int(b[1]):]
	}
	return found
}
