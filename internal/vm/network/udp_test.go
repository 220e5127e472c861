package network

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/choiros/agent/internal/sandbox"
)

func TestUDPCarriesDatagramsOfEverySize(t *testing.T) {
	t.Parallel()
	for _, mtu := range []int{0, 576, 9000, maxMTU} {
		n, g := start(t, Config{MTU: mtu})
		conn := g.dialUDP(serveUDP(t, echoUDP))
		buf := make([]byte, 1<<16)
		for _, size := range []int{0, 1, 1472, 1473, 9000, 20_000} { // the guest's own buffers take no more
			sent := pattern(size)
			if _, err := conn.Write(sent); err != nil {
				t.Fatal(err)
			}
			got, err := conn.Read(buf)
			if err != nil || !bytes.Equal(buf[:got], sent) {
				t.Fatalf("MTU %d: %d of %d bytes, %v", mtu, got, size, err)
			}
		}
		if s := n.Stats(); s.UDPOpen != 1 || s.UDPTotal != 1 {
			t.Errorf("%+v", s)
		}
	}
}

func TestUDPErrorsReachTheGuest(t *testing.T) {
	t.Parallel()
	closed, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := closed.LocalAddr().(*net.UDPAddr).Port
	closed.Close()
	host := &loopback{errors: map[string]error{"203.0.113.22": syscall.EHOSTUNREACH}}
	n, g := start(t, Config{Dial: host.dial, Egress: list(sandbox.EgressRule{CIDR: "203.0.113.0/24"})})
	for addr, want := range map[string]string{
		fmt.Sprintf("%s:%d", far, port): "refused", "192.168.127.1:9": "refused",
		"203.0.113.22:9": "timeout", "198.51.100.1:9": "timeout", // of these gVisor makes no error
	} {
		conn := g.dialUDP(addr)
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		eventually(t, addr+" ends with "+want, func() bool {
			// An error wakes no reader of gVisor's: it is what the next one gets.
			_ = conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
			_, err := conn.Read(make([]byte, 1))
			return err != nil && strings.Contains(err.Error(), want)
		})
	}
	if got := g.stack.Stats().ICMP.V4.PacketsReceived.DstUnreachable.Value(); got != 4 {
		t.Errorf("the guest was told of %d of 4", got)
	}
	if diff := cmp.Diff([]string{"udp 198.51.100.1:9 x1"}, refused(n)); diff != "" {
		t.Error(diff)
	}
}

func TestUDPFlowsAreBoundedAndTheOldestMakesRoom(t *testing.T) {
	t.Parallel()
	var heard atomic.Int64
	n, g := start(t, Config{})
	addr := netip.MustParseAddrPort(serveUDP(t, func(net.PacketConn, net.Addr, []byte) { heard.Add(1) }))
	const many = 3 * maxFlows
	for i := range many {
		g.send((&frameBuilder{to: addr.Addr(), protocol: 17, payload: datagram(uint16(1000+i), addr.Port(), []byte("x"))}).bytes())
		if i == 0 {
			eventually(t, "the first is there", func() bool { return n.Stats().UDPOpen == 1 })
		}
	}
	eventually(t, "all are read", func() bool { return n.Stats().FramesSent >= many })
	n.udp.mu.Lock()
	open, held := len(n.udp.byKey), n.udp.held
	_, first := n.udp.byKey[flowKey{1000, addr}]
	n.udp.mu.Unlock()
	if open > maxFlows || held > maxFlows+flowsEnding || first {
		t.Errorf("%d flows, %d held, the first is there: %v", open, held, first)
	}
	if err := n.SetEgress(sandbox.Egress{Mode: sandbox.EgressDeny}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all are gone", func() bool {
		n.udp.mu.Lock()
		defer n.udp.mu.Unlock()
		return n.udp.held == 0 && len(n.udp.byKey) == 0
	})
}

func TestGatewayAnswersPingsAndNobodyElseDoes(t *testing.T) {
	t.Parallel()
	_, g := start(t, Config{})
	ask := func(to string, within time.Duration) bool {
		queue := new(waiter.Queue)
		ep, failed := g.stack.NewEndpoint(icmp.ProtocolNumber4, ipv4.ProtocolNumber, queue)
		if failed != nil {
			t.Fatal(failed)
		}
		defer ep.Close()
		entry, readable := waiter.NewChannelEntry(waiter.ReadableEvents)
		queue.EventRegister(&entry)
		defer queue.EventUnregister(&entry)
		if failed := ep.Connect(tcpip.FullAddress{Addr: address(addr4(to))}); failed != nil {
			t.Fatal(failed)
		}
		if _, failed := ep.Write(bytes.NewReader(ping([]byte("hello"))), tcpip.WriteOptions{}); failed != nil {
			t.Fatal(failed)
		}
		select {
		case <-readable:
			var got bytes.Buffer
			_, _ = ep.Read(&got, tcpip.ReadOptions{})
			return bytes.HasSuffix(got.Bytes(), []byte("hello"))
		case <-time.After(within):
			return false
		}
	}
	if !ask("192.168.127.1", limit) {
		t.Error("the gateway does not answer")
	}
	if ask(far, 50*time.Millisecond) {
		t.Error("it answers in another's name")
	}
}

func TestOutsideAddressesAreNotBelieved(t *testing.T) {
	t.Parallel()
	n, g := start(t, Config{})
	other := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	arpFor := func(edit func(header.ARP)) []byte {
		b := make([]byte, header.EthernetMinimumSize+arpLength)
		header.Ethernet(b).Encode(&header.EthernetFields{SrcAddr: tcpip.LinkAddress(guestMAC), DstAddr: header.EthernetBroadcastAddress, Type: header.ARPProtocolNumber})
		arp := header.ARP(b[header.EthernetMinimumSize:])
		arp.SetIPv4OverEthernet()
		arp.SetOp(header.ARPRequest)
		copy(arp.HardwareAddressSender(), guestMAC)
		copy(arp.ProtocolAddressSender(), Guest.AsSlice())
		copy(arp.ProtocolAddressTarget(), Gateway.AsSlice())
		edit(arp)
		return b
	}
	udp := datagram(1, 2, []byte("x"))
	for name, c := range map[string]struct {
		frame []byte
		want  kind
	}{
		"right":              {(&frameBuilder{to: addr4(far), protocol: 17, payload: udp}).bytes(), packet},
		"another MAC":        {(&frameBuilder{srcMAC: other, to: addr4(far), protocol: 17, payload: udp}).bytes(), spoofed},
		"the gateway's MAC":  {(&frameBuilder{srcMAC: net.HardwareAddr(gatewayMAC), to: addr4(far), protocol: 17, payload: udp}).bytes(), spoofed},
		"another IP":         {(&frameBuilder{from: addr4("192.168.127.3"), to: addr4(far), protocol: 17, payload: udp}).bytes(), spoofed},
		"the gateway's IP":   {(&frameBuilder{from: Gateway, to: addr4(far), protocol: 17, payload: udp}).bytes(), spoofed},
		"0.0.0.0":            {(&frameBuilder{from: addr4("0.0.0.0"), to: addr4(far), protocol: 17, payload: udp}).bytes(), spoofed},
		"to another MAC":     {(&frameBuilder{dstMAC: other, to: addr4(far), protocol: 17, payload: udp}).bytes(), ignored},
		"ICMP to others":     {(&frameBuilder{to: addr4(far), protocol: 1, payload: ping(nil)}).bytes(), ignored},
		"IGMP":               {(&frameBuilder{to: addr4("224.0.0.22"), protocol: 2, payload: udp}).bytes(), ignored},
		"SCTP":               {(&frameBuilder{to: addr4(far), protocol: 132, payload: udp}).bytes(), ignored},
		"too long":           {append((&frameBuilder{to: addr4(far), protocol: 17, payload: udp}).bytes(), make([]byte, 1500)...), ignored},
		"nothing":            {nil, ignored},
		"ARP":                {arpFor(func(header.ARP) {}), arpRequest},
		"ARP probe":          {arpFor(func(a header.ARP) { copy(a.ProtocolAddressSender(), make([]byte, 4)) }), arpRequest},
		"ARP for another":    {arpFor(func(a header.ARP) { a.ProtocolAddressTarget()[3] = 9 }), ignored},
		"ARP reply":          {arpFor(func(a header.ARP) { a.SetOp(header.ARPReply) }), ignored},
		"ARP of another MAC": {arpFor(func(a header.ARP) { copy(a.HardwareAddressSender(), other) }), spoofed},
		"ARP of another IP":  {arpFor(func(a header.ARP) { a.ProtocolAddressSender()[3] = 9 }), spoofed},
		"ARP cut short":      {arpFor(func(header.ARP) {})[:40], ignored},
	} {
		if got := n.classify(c.frame); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
	before := n.Stats()
	g.send((&frameBuilder{srcMAC: other, to: addr4(far), protocol: 17, payload: udp}).bytes())
	g.send((&frameBuilder{to: addr4(far), protocol: 132, payload: udp}).bytes())
	eventually(t, "they are counted", func() bool {
		s := n.Stats()
		return s.Spoofed == before.Spoofed+1 && s.Ignored == before.Ignored+1
	})
	if s := n.Stats(); s.UDPTotal != 0 {
		t.Errorf("%+v", s)
	}
}

func TestFloodsOfFragmentsAndGarbageAreBounded(t *testing.T) {
	n, g := start(t, Config{})
	addr := serveTCP(t, echo)
	before, frames := heap(), n.Stats().FramesSent
	const many = 30_000
	part := make([]byte, 1480)
	for i := range many {
		switch i % 3 {
		case 0: // the first part of what never ends
			g.send((&frameBuilder{to: addr4(far), protocol: 17, id: uint16(i), more: true, payload: part}).bytes())
		case 1:
			g.send(pattern(1 + i%1514))
		case 2: // more than a frame may have
			g.send(make([]byte, 20_000))
		}
	}
	eventually(t, "all are read", func() bool { return n.Stats().FramesSent >= frames+many })
	if grown := int64(heap()) - int64(before); grown > 24<<20 {
		t.Errorf("the heap grew by %d MiB", grown>>20)
	}
	conn := g.dial(addr) // and it goes on
	_, _ = conn.Write([]byte("x"))
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

func TestDHCPGivesTheOneAddress(t *testing.T) {
	t.Parallel()
	n, _ := start(t, Config{MTU: 1400})
	message := func(kind byte, options ...byte) []byte {
		m := make([]byte, dhcpFixed)
		copy(m, []byte{1, 1, 6, 0, 1, 2, 3, 4})
		copy(m[28:], guestMAC)
		m = append(m, dhcpCookie...)
		m = append(append(m, optionType, 1, kind), options...)
		return append(m, optionEnd)
	}
	ask := func(m []byte) map[byte][]byte {
		reply, _ := n.dhcpReply(m)
		if reply == nil {
			return nil
		}
		if len(reply) < dhcpMinimum || reply[0] != 2 || !bytes.Equal(reply[4:8], m[4:8]) || !bytes.Equal(reply[28:34], guestMAC) {
			t.Errorf("%x is no reply", reply)
		}
		options := dhcpOptions(reply[dhcpFixed+4:])
		options[0] = reply[16:20] // yiaddr
		return options
	}
	guest, gateway := Guest.AsSlice(), Gateway.AsSlice()
	for kind, answer := range map[byte]byte{dhcpDiscover: dhcpOffer, dhcpRequest: dhcpAck} {
		got := ask(message(kind, append([]byte{optionAddress, 4}, guest...)...))
		want := map[byte][]byte{
			0: guest, optionType: {answer}, optionServer: gateway, optionMask: {255, 255, 255, 0}, optionRouter: gateway,
			optionDNS: gateway, optionMTU: binary.BigEndian.AppendUint16(nil, 1400), optionLease: binary.BigEndian.AppendUint32(nil, dhcpLease),
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	renew := message(dhcpRequest)
	copy(renew[12:], guest)
	if got := ask(renew); !bytes.Equal(got[optionType], []byte{dhcpAck}) {
		t.Errorf("renewing: %v", got)
	}
	if got := ask(message(dhcpRequest, optionAddress, 4, 10, 0, 0, 5)); !bytes.Equal(got[optionType], []byte{dhcpNak}) || got[optionRouter] != nil {
		t.Errorf("another address: %v", got)
	}
	if got := ask(message(dhcpInform)); !bytes.Equal(got[optionType], []byte{dhcpAck}) || got[optionLease] != nil {
		t.Errorf("inform: %v", got)
	}
	stranger := message(dhcpDiscover)
	stranger[30]++
	for name, m := range map[string][]byte{
		"another server": message(dhcpRequest, optionServer, 4, 10, 0, 0, 1), "a stranger": stranger, "release": message(7),
		"no type": message(1)[:dhcpFixed+4], "short": message(1)[:100], "a reply": append([]byte{2}, message(1)[1:]...), "empty": nil,
	} {
		if got := ask(m); got != nil {
			t.Errorf("%s is answered: %v", name, got)
		}
	}
}

func TestDHCPIsAnsweredOverTheLink(t *testing.T) {
	t.Parallel()
	n, g := start(t, Config{})
	g.stack.RemoveAddress(nic, address(Guest))
	m := make([]byte, dhcpFixed, dhcpFixed+8)
	copy(m, []byte{1, 1, 6, 0, 1, 2, 3, 4})
	copy(m[28:], guestMAC)
	m = append(append(m, dhcpCookie...), optionType, 1, dhcpDiscover, optionEnd)
	before := n.Stats()
	g.send((&frameBuilder{
		dstMAC: net.HardwareAddr(header.EthernetBroadcastAddress), from: addr4("0.0.0.0"), to: addr4("255.255.255.255"), protocol: 17,
		payload: datagram(dhcpClientPort, dhcpServerPort, m),
	}).bytes())
	eventually(t, "an offer is sent", func() bool { return n.Stats().BytesReceived >= before.BytesReceived+dhcpMinimum })
	if s := n.Stats(); s.Spoofed != 0 || s.UDPTotal != 0 {
		t.Errorf("%+v", s)
	}
}
