package network

import (
	"context"
	"net"
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

func addr4(a string) netip.Addr { return netip.MustParseAddr(a) }

// frameBuilder makes frames that no stack would send.
type frameBuilder struct {
	srcMAC, dstMAC net.HardwareAddr // nil: as they should be
	from, to       netip.Addr       // zero from: the guest's
	protocol       uint8
	id, offset     uint16
	more           bool
	payload        []byte
}

func (f *frameBuilder) bytes() []byte {
	b := make([]byte, header.EthernetMinimumSize+header.IPv4MinimumSize, header.EthernetMinimumSize+header.IPv4MinimumSize+len(f.payload))
	eth := header.EthernetFields{SrcAddr: tcpip.LinkAddress(guestMAC), DstAddr: gatewayMAC, Type: header.IPv4ProtocolNumber}
	if f.srcMAC != nil {
		eth.SrcAddr = tcpip.LinkAddress(f.srcMAC)
	}
	if f.dstMAC != nil {
		eth.DstAddr = tcpip.LinkAddress(f.dstMAC)
	}
	header.Ethernet(b).Encode(&eth)
	from := f.from
	if !from.IsValid() {
		from = Guest
	}
	var flags uint8
	if f.more {
		flags = header.IPv4FlagMoreFragments
	}
	ip := header.IPv4(b[header.EthernetMinimumSize:])
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(header.IPv4MinimumSize + len(f.payload)), TTL: 64, Protocol: f.protocol, ID: f.id,
		Flags: flags, FragmentOffset: f.offset, SrcAddr: address(from), DstAddr: address(f.to),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	return append(b, f.payload...)
}

// syn is a TCP segment that asks for a connection. Nobody looks at its checksum.
func syn(from, to uint16) []byte {
	b := make([]byte, header.TCPMinimumSize)
	header.TCP(b).Encode(&header.TCPFields{
		SrcPort: from, DstPort: to, SeqNum: 1, DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagSyn, WindowSize: 65535,
	})
	return b
}

func datagram(from, to uint16, payload []byte) []byte {
	b := make([]byte, header.UDPMinimumSize, header.UDPMinimumSize+len(payload))
	header.UDP(b).Encode(&header.UDPFields{SrcPort: from, DstPort: to, Length: uint16(len(payload) + header.UDPMinimumSize)})
	return append(b, payload...)
}

// ping is an ICMP echo request.
func ping(payload []byte) []byte {
	b := make([]byte, header.ICMPv4MinimumSize, header.ICMPv4MinimumSize+len(payload))
	icmp := header.ICMPv4(b)
	icmp.SetType(header.ICMPv4Echo)
	icmp.SetChecksum(header.ICMPv4Checksum(icmp, checksum.Checksum(payload, 0)))
	return append(b, payload...)
}

// send sends a frame past the guest's stack.
func (g *guest) send(frame []byte) {
	g.Helper()
	_ = g.link.SetWriteDeadline(time.Now().Add(limit))
	if _, err := g.link.Write(frame); err != nil {
		g.Fatalf("the network does not read: %v", err)
	}
}

func (g *guest) dialContext(ctx context.Context, addr string) error {
	conn, err := gonet.DialContextTCP(ctx, g.stack, g.at(addr), ipv4.ProtocolNumber)
	if err == nil {
		conn.Close()
	}
	return err
}

// dialAbortable returns also what resets the connection.
func (g *guest) dialAbortable(addr string) (*gonet.TCPConn, func()) {
	g.Helper()
	queue := new(waiter.Queue)
	ep, failed := g.stack.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, queue)
	if failed != nil {
		g.Fatal(failed)
	}
	entry, writable := waiter.NewChannelEntry(waiter.WritableEvents)
	queue.EventRegister(&entry)
	defer queue.EventUnregister(&entry)
	if failed := ep.Connect(g.at(addr)); failed != nil {
		if _, started := failed.(*tcpip.ErrConnectStarted); !started {
			g.Fatal(failed)
		}
	}
	select {
	case <-writable:
	case <-time.After(limit):
		g.Fatal("it does not connect")
	}
	if failed := ep.LastError(); failed != nil {
		g.Fatal(failed)
	}
	return gonet.NewTCPConn(queue, ep), ep.Abort
}
