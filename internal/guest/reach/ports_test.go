//go:build linux

package reach

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1213 1 0000000041560ffa 100 0 0 10 0
   1: 020200C0:990E 507100CB:01BB 06 00000000:00000000 03:00001767 00000000     0        0 0 3 00000000bc3f5736
   2: 00000000:0016 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 77 2 0000000000000000 0
`

const table6 = `  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 42 1 0 100 0 0 10 0
   1: 0000000000000000FFFF00000100007F:0051 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 43 1 0 100 0 0 10 0
`

func TestParseTable(t *testing.T) {
	t.Parallel()
	got, err := parseTable(bytes.NewReader([]byte(table)), protocolTCP, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err = parseTable(bytes.NewReader([]byte(table6)), protocolTCP, got); err != nil {
		t.Fatal(err)
	}
	if got, err = parseTable(bytes.NewReader([]byte(table)), protocolUDP, got); err != nil {
		t.Fatal(err)
	}
	want := []socket{{loopback4, 8080, 1213, false}, {loopback6, 80, 42, false}, {loopback4, 81, 43, false}, {netip.IPv4Unspecified(), 22, 77, true}}
	if !slices.Equal(got, want) {
		t.Errorf("%v, not %v", got, want)
	}
}

// TestBothTablesAgree opens sockets of every kind and finds them both ways.
func TestBothTablesAgree(t *testing.T) {
	t.Parallel()
	without := New(nil)
	without.noDiag.Store(true)
	with := New(nil)
	for _, address := range []string{"127.0.0.1", "::1", "::", "0.0.0.0"} {
		tcp := serve(t, net.JoinHostPort(address, "0"), echo)
		udp := udpEcho(t, net.JoinHostPort(address, "0"))
		for _, s := range []*Service{with, without} {
			for port, p := range map[uint32]protocol{tcp: protocolTCP, udp: protocolUDP} {
				found, err := s.sockets(p)
				if err != nil {
					t.Fatal(err)
				}
				if !slices.ContainsFunc(found, func(socket socket) bool {
					return uint32(socket.port) == port && socket.address.String() == address && socket.inode != 0 && socket.udp == (p == protocolUDP)
				}) {
					t.Errorf("%s port %d of %s is not among %v", address, port, p.file, found)
				}
			}
		}
	}
	if with.noDiag.Load() {
		t.Log("this kernel has no sock_diag; only /proc was tried")
	}
}

// awaitPorts waits for ports that satisfy a condition.
func awaitPorts(t *testing.T, receiving func() *guestv1.Ports, what string, ok func(*guestv1.Ports) bool) {
	t.Helper()
	for {
		ports := receiving() // fails the test when the connection's deadline passes
		if t.Failed() {
			t.Fatalf("never: %s", what)
		}
		if ok(ports) {
			return
		}
	}
}

func TestWatchPortsTellsOfChanges(t *testing.T) {
	t.Parallel()
	agent, guest := channel(t)
	end := call(t, guest, func(ctx context.Context) error { return New(nil).WatchPorts(ctx, guest, nil) })
	answered(t, agent)
	receiving := func() *guestv1.Ports { return receive(t, agent, &guestv1.Ports{}) }
	has := func(port uint32, udp bool, program string) func(*guestv1.Ports) bool {
		return func(ports *guestv1.Ports) bool {
			return slices.ContainsFunc(ports.GetListeners(), func(l *guestv1.Listener) bool {
				return l.GetAddress() == "127.0.0.1" && l.GetPort() == port && l.GetUdp() == udp && (program == "" || l.GetProgram() == program)
			})
		}
	}
	receiving() // at once, whatever there is

	// A listener of another process, handed to it as it starts.
	listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	port := portOf(listener.Addr())
	file, err := listener.File()
	if err != nil {
		t.Fatal(err)
	}
	child := exec.CommandContext(t.Context(), "sleep", "60")
	child.ExtraFiles = []*os.File{file}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	file.Close()
	listener.Close()
	awaitPorts(t, receiving, "the listener of sleep", has(port, false, "sleep"))
	_ = child.Process.Kill()
	_ = child.Wait()
	awaitPorts(t, receiving, "its end", func(ports *guestv1.Ports) bool { return !has(port, false, "")(ports) })

	port = udpEcho(t, "127.0.0.1:0")
	awaitPorts(t, receiving, "a datagram socket", has(port, true, ""))
	if err := end(); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestSettledWaitsForEphemeralDatagrams(t *testing.T) {
	t.Parallel()
	w := watch{}
	seen := func() []socket {
		return []socket{{port: 53, inode: 1, udp: true}, {port: ephemeral, inode: 2, udp: true}}
	}
	for i, want := range []int{1, 2, 2} {
		if got := w.settled(seen()); len(got) != want {
			t.Errorf("look %d: %v", i, got)
		}
	}
	w.settled(nil)
	if got := w.settled(seen()); len(got) != 1 {
		t.Errorf("after it was gone: %v", got)
	}
}

func TestTellIsBounded(t *testing.T) {
	t.Parallel()
	w := watch{programs: map[uint32]string{0: "\xff"}}
	for port := range uint16(maxListeners) {
		w.sockets = append(w.sockets, socket{address: loopback4, port: port + 1}, socket{address: loopback4, port: port + 1, inode: 9})
	}
	ports := w.tell()
	if len(ports.GetListeners()) != maxListeners || ports.GetTruncated() || ports.GetListeners()[0].GetProgram() != "?" {
		t.Errorf("%d, truncated %v, %v", len(ports.GetListeners()), ports.GetTruncated(), ports.GetListeners()[0])
	}
	w.sockets = append(w.sockets, socket{address: loopback6, port: 1})
	if ports = w.tell(); len(ports.GetListeners()) != maxListeners || !ports.GetTruncated() {
		t.Errorf("%d, truncated %v", len(ports.GetListeners()), ports.GetTruncated())
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(table))
	f.Add([]byte(table6))
	f.Add([]byte("socket:[4711]"))
	f.Add(append([]byte{20, 0, 0, 0, unix.NLMSG_DONE, 0, 2, 0}, make([]byte, 12)...))
	f.Add(append([]byte{headerSize + messageSize, 0, 0, 0, unix.SOCK_DIAG_BY_FAMILY, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, unix.AF_INET, stateListen, 0, 0, 31, 144}, make([]byte, 66)...))
	f.Fuzz(func(t *testing.T, data []byte) {
		found, _ := parseTable(bytes.NewReader(data), protocolTCP, nil)
		more, _, _ := parseAnswer(data, protocolTCP, maxSockets, nil)
		for _, socket := range append(found, more...) {
			if socket.port == 0 || !socket.address.IsValid() || socket.address.Is4In6() {
				t.Errorf("%v", socket)
			}
		}
		if inode, ok := socketInode(string(data)); ok && !bytes.Contains(data, fmt.Append(nil, inode)) {
			t.Errorf("%q is %d", data, inode)
		}
	})
}

func BenchmarkSockets(b *testing.B) {
	for _, noDiag := range []bool{false, true} {
		b.Run(fmt.Sprintf("proc=%v", noDiag), func(b *testing.B) {
			w := watch{service: New(nil)}
			w.service.noDiag.Store(noDiag)
			for b.Loop() {
				if _, err := w.look(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
