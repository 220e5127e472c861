package network

import (
	"errors"
	"net"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// descriptors counts this process's.
func descriptors(t *testing.T) int {
	t.Helper()
	dir := "/dev/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// goroutines counts those that run the network's or gVisor's code.
func goroutines() (count int, stacks string) {
	buf := make([]byte, 4<<20)
	for one := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if (strings.Contains(one, "internal/vm/network.") || strings.Contains(one, "gvisor.dev/")) && !strings.Contains(one, "testing.tRunner") {
			count++
			stacks += one + "\n\n"
		}
	}
	return count, stacks
}

// TestCloseLeavesNothing does not run beside other tests, for it counts.
func TestCloseLeavesNothing(t *testing.T) {
	must(net.Listen("tcp", "127.0.0.1:0")).Close() // the runtime's poller stays
	files := descriptors(t)
	before, _ := goroutines()
	for range 3 {
		t.Run("life", func(t *testing.T) {
			n, g := start(t, Config{Resolver: &resolver{records: zone}})
			ended := make(chan error, 1)
			addr := serveTCP(t, func(host *net.TCPConn) {
				_, _ = host.Write([]byte("x"))
				for {
					if _, err := host.Read(make([]byte, 100)); err != nil {
						ended <- err
						return
					}
				}
			})
			conn := g.dial(addr)
			_, _ = conn.Read(make([]byte, 1))
			flow := g.dialUDP(serveUDP(t, echoUDP))
			_, _ = flow.Write([]byte("x"))
			_, _ = flow.Read(make([]byte, 1))
			g.ask("tcp", query("a.example.", dns.TypeA))
			g.dial("192.168.127.1:53") // and asks nothing
			for i := range 20 {
				g.send((&frameBuilder{to: addr4(far), protocol: 6, payload: syn(uint16(i+1), 1)}).bytes())
				g.send((&frameBuilder{to: addr4(far), protocol: 17, id: uint16(i), more: true, payload: make([]byte, 800)}).bytes())
			}
			if err := n.Close(); err != nil {
				t.Error(err)
			}
			if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the host saw %v", err)
			}
			if err := n.Close(); err != nil {
				t.Errorf("closing again: %v", err)
			}
			if s := n.Stats(); s.TCPOpen != 0 || s.UDPOpen != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
	// gVisor's timers and the runtime's pollers end a moment later.
	for end := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		now, stacks := goroutines()
		if now <= before && descriptors(t) <= files {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d goroutines were %d, %d descriptors were %d:\n%s", now, before, descriptors(t), files, stacks)
		}
	}
}

// FuzzFrames takes in whatever a guest can send.
func FuzzFrames(f *testing.F) {
	for _, frame := range [][]byte{
		(&frameBuilder{to: addr4(far), protocol: 6, payload: syn(1, 2)}).bytes(),
		(&frameBuilder{to: addr4(far), protocol: 17, payload: datagram(1, 2, []byte("x"))}).bytes(),
		(&frameBuilder{to: Gateway, protocol: 17, payload: datagram(1, 53, []byte("xxxxxxxxxxxxxxxx"))}).bytes(),
		(&frameBuilder{to: Gateway, protocol: 17, payload: datagram(68, 67, make([]byte, 300))}).bytes(),
		(&frameBuilder{to: Gateway, protocol: 1, payload: ping([]byte("x"))}).bytes(),
		(&frameBuilder{to: Gateway, protocol: 1, more: true, payload: ping([]byte("x"))}).bytes(),
		(&frameBuilder{to: Gateway, protocol: 6, payload: syn(1, 53)}).bytes(),
		make([]byte, 60),
	} {
		f.Add(frame)
	}
	// The policy allows nothing: what is made up here must not be dialled. Nobody
	// reads, so that the network's own reader has nothing to take in meanwhile.
	ours, theirs, err := Pair()
	if err != nil {
		f.Fatal(err)
	}
	defer theirs.Close()
	n := must(Open(Config{Link: ours, MAC: guestMAC, Resolver: &resolver{records: zone}, Egress: list()}))
	defer n.Close()
	f.Fuzz(func(_ *testing.T, frame []byte) {
		if len(frame) >= 14 {
			copy(frame, gatewayMAC)
			copy(frame[6:], guestMAC)
		}
		if len(frame) >= 30 && frame[12] == 8 && frame[13] == 0 {
			copy(frame[26:30], Guest.AsSlice())
		}
		n.take(frame)
	})
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
