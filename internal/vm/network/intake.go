package network

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const arpLength = 28 // RFC 826, for Ethernet and IPv4

// kind is what to do with a frame.
type kind int

const (
	ignored    kind = iota // nothing that this network has
	spoofed                // from an address that is not the guest's
	arpRequest             // for the gateway
	dhcpMessage
	packet // IPv4, for the stack
)

// take deals with a frame of the guest's.
func (n *Network) take(frame []byte) {
	switch n.classify(frame) {
	case ignored:
		n.link.ignored.Add(1)
	case spoofed:
		n.link.spoofed.Add(1)
	case arpRequest:
		n.link.send(arpReply(frame))
	case dhcpMessage:
		n.answerDHCP(frame[header.EthernetMinimumSize:])
	case packet:
		n.link.deliver(frame[header.EthernetMinimumSize:])
	}
}

// classify looks at the frame's addresses alone, and trusts no length in it.
func (n *Network) classify(frame []byte) kind {
	if len(frame) < header.EthernetMinimumSize || len(frame) > int(n.link.mtu)+header.EthernetMinimumSize {
		return ignored
	}
	eth, payload := header.Ethernet(frame), frame[header.EthernetMinimumSize:]
	to := eth.DestinationAddress()
	switch {
	case eth.SourceAddress() != n.link.guest:
		return spoofed
	case to != gatewayMAC && to != header.EthernetBroadcastAddress:
		return ignored
	}
	switch eth.Type() {
	case header.ARPProtocolNumber:
		return n.classifyARP(payload)
	case header.IPv4ProtocolNumber:
		return classifyIPv4(payload)
	}
	return ignored
}

// classifyARP lets requests for the gateway through: the guest has no other
// neighbour. A probe (RFC 5227) comes from 0.0.0.0.
func (n *Network) classifyARP(payload []byte) kind {
	if len(payload) < arpLength {
		return ignored
	}
	arp := header.ARP(payload[:arpLength])
	if !arp.IsValid() {
		return ignored
	}
	from := netip.AddrFrom4([4]byte(arp.ProtocolAddressSender()))
	switch {
	case tcpip.LinkAddress(arp.HardwareAddressSender()) != n.link.guest, from != Guest && !from.IsUnspecified():
		return spoofed
	case arp.Op() != header.ARPRequest || netip.AddrFrom4([4]byte(arp.ProtocolAddressTarget())) != Gateway:
		return ignored
	}
	return arpRequest
}

func classifyIPv4(payload []byte) kind {
	if len(payload) < header.IPv4MinimumSize {
		return ignored
	}
	ip := header.IPv4(payload)
	length := int(ip.HeaderLength())
	if payload[0]>>4 != header.IPv4Version || length < header.IPv4MinimumSize || length > len(payload) ||
		int(ip.TotalLength()) < length || int(ip.TotalLength()) > len(payload) {
		return ignored
	}
	payload = payload[:ip.TotalLength()]
	from, to := netip.AddrFrom4(ip.SourceAddress().As4()), netip.AddrFrom4(ip.DestinationAddress().As4())
	toDHCP := ip.Protocol() == uint8(header.UDPProtocolNumber) && ip.FragmentOffset() == 0 && !ip.More() &&
		len(payload) >= length+header.UDPMinimumSize && header.UDP(payload[length:]).DestinationPort() == dhcpServerPort &&
		(to == Gateway || to == netip.AddrFrom4([4]byte{255, 255, 255, 255}))
	switch {
	case toDHCP && (from == Guest || from.IsUnspecified()):
		return dhcpMessage
	case from != Guest:
		return spoofed
	}
	switch tcpip.TransportProtocolNumber(ip.Protocol()) {
	case header.TCPProtocolNumber, header.UDPProtocolNumber:
		return packet
	case header.ICMPv4ProtocolNumber: // the gateway alone answers, and nobody else is heard
		if to == Gateway {
			return packet
		}
	}
	return ignored
}

// arpReply answers a request that classify let through.
func arpReply(request []byte) []byte {
	asked := header.ARP(request[header.EthernetMinimumSize:][:arpLength])
	frame := make([]byte, header.EthernetMinimumSize+arpLength)
	header.Ethernet(frame).Encode(&header.EthernetFields{
		SrcAddr: gatewayMAC,
		DstAddr: tcpip.LinkAddress(asked.HardwareAddressSender()),
		Type:    header.ARPProtocolNumber,
	})
	arp := header.ARP(frame[header.EthernetMinimumSize:])
	arp.SetIPv4OverEthernet()
	arp.SetOp(header.ARPReply)
	copy(arp.HardwareAddressSender(), gatewayMAC)
	copy(arp.ProtocolAddressSender(), asked.ProtocolAddressTarget())
	copy(arp.HardwareAddressTarget(), asked.HardwareAddressSender())
	copy(arp.ProtocolAddressTarget(), asked.ProtocolAddressSender())
	return frame
}
