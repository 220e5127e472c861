package network

import (
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// sendUDP sends a datagram to the guest, in fragments if it must be.
func (n *Network) sendUDP(from, to netip.AddrPort, payload []byte) {
	route, err := n.stack.FindRoute(nic, address(from.Addr()), address(to.Addr()), ipv4.ProtocolNumber, false)
	if err != nil {
		return // it is closing
	}
	defer route.Release()
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: int(route.MaxHeaderLength()) + header.UDPMinimumSize,
		Payload:            buffer.MakeWithData(payload),
	})
	defer pkt.DecRef()
	length := uint16(pkt.Size() + header.UDPMinimumSize)
	udp := header.UDP(pkt.TransportHeader().Push(header.UDPMinimumSize))
	pkt.TransportProtocolNumber = header.UDPProtocolNumber
	udp.Encode(&header.UDPFields{SrcPort: from.Port(), DstPort: to.Port(), Length: length})
	sum := checksum.Combine(route.PseudoHeaderChecksum(header.UDPProtocolNumber, length), pkt.Data().Checksum())
	if sum = ^udp.CalculateChecksum(sum); sum == 0 {
		sum = 0xffff // RFC 768: 0 would say that there is none
	}
	udp.SetChecksum(sum)
	_ = route.WritePacket(stack.NetworkHeaderParams{Protocol: header.UDPProtocolNumber, TTL: route.DefaultTTL()}, pkt) // a datagram may be lost
}

// original is the beginning of a packet of the guest's, which an ICMP error
// about it quotes: RFC 792.
type original []byte

func originalOf(pkt *stack.PacketBuffer) original {
	network, transport := pkt.NetworkHeader().Slice(), pkt.TransportHeader().Slice()
	o := make(original, 0, len(network)+8)
	return append(append(o, network...), transport[:min(8, len(transport))]...)
}

// sendUnreachable tells the guest that a packet of its own did not arrive.
func (n *Network) sendUnreachable(o original, code header.ICMPv4Code) {
	if len(o) == 0 || !n.stack.AllowICMPMessage() {
		return
	}
	route, err := n.stack.FindRoute(nic, address(Gateway), address(Guest), ipv4.ProtocolNumber, false)
	if err != nil {
		return // it is closing
	}
	defer route.Release()
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: int(route.MaxHeaderLength()) + header.ICMPv4MinimumSize,
		Payload:            buffer.MakeWithData(o),
	})
	defer pkt.DecRef()
	icmp := header.ICMPv4(pkt.TransportHeader().Push(header.ICMPv4MinimumSize))
	pkt.TransportProtocolNumber = header.ICMPv4ProtocolNumber
	icmp.SetType(header.ICMPv4DstUnreachable)
	icmp.SetCode(code)
	icmp.SetChecksum(header.ICMPv4Checksum(icmp, pkt.Data().Checksum()))
	_ = route.WritePacket(stack.NetworkHeaderParams{Protocol: header.ICMPv4ProtocolNumber, TTL: route.DefaultTTL()}, pkt) // as any other
}

// unreachable is the code by which the guest learns of an error that the host
// met, if there is one. A guest's kernel makes the same error of it: see
// icmp_err_convert in Linux.
func unreachable(err error) (code header.ICMPv4Code, ok bool) {
	switch {
	case errors.Is(err, errOwn), errors.Is(err, errRefused), errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return header.ICMPv4AdminProhibited, true
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.ENETDOWN):
		return header.ICMPv4NetUnreachable, true
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EHOSTDOWN):
		return header.ICMPv4HostUnreachable, true
	case errors.Is(err, unix.ECONNREFUSED):
		return header.ICMPv4PortUnreachable, true
	}
	return 0, false
}
