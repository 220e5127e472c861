package network

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/sandbox"
)

// The test program is also what runs in the namespaces: see
// TestFromAHostOfItsOwn.
const (
	hostRole  = "network-test-host"
	otherRole = "network-test-other"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == otherRole {
		os.Exit(beOther())
	}
	os.Exit(m.Run())
}

// TestFromAHostOfItsOwn runs itself as the host of a network namespace, with
// another host beside it.
func TestFromAHostOfItsOwn(t *testing.T) {
	if os.Getenv("NETWORK_TEST_ROLE") == hostRole {
		beHost(t)
		return
	}
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	need := func(err error, cure string) {
		t.Helper()
		if err == nil {
			return
		}
		if strings.Contains(os.Getenv("AGENT_REQUIRE"), "namespaces") {
			t.Fatalf("no namespaces: %v\ntry: %s", err, cure)
		}
		t.Skipf("no namespaces: %v; try: %s", err, cure)
	}
	_, err := exec.LookPath("ip")
	need(err, "install iproute2")
	attr := &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	try := exec.CommandContext(ctx, "true")
	try.SysProcAttr = attr
	need(try.Run(), "allow user namespaces: sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000")
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestFromAHostOfItsOwn$", "-test.v", "-test.count=1")
	cmd.Env = append(os.Environ(), "NETWORK_TEST_ROLE="+hostRole)
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestFromAHostOfItsOwn") {
		t.Errorf("%v\n%s", err, out)
	}
}

// beOther is the other host: it serves at all of its addresses, which it gets
// once it has said that it is there.
func beOther() int {
	fmt.Println("there")
	in := bufio.NewReader(os.Stdin)
	if _, err := in.ReadString('\n'); err != nil {
		return 1
	}
	l, err := net.Listen("tcp4", ":80")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	conn, err := net.ListenPacket("udp4", ":80")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo(buf[:n], from)
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	fmt.Println("serving")
	_, _ = in.ReadString('\n') // until the test ends
	return 0
}

func run(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// beHost sets both hosts up and looks around.
func beHost(t *testing.T) {
	other := exec.CommandContext(t.Context(), os.Args[0], otherRole)
	other.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	stdin := must(other.StdinPipe())
	stdout := bufio.NewReader(must(other.StdoutPipe()))
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer other.Wait()
	defer stdin.Close()
	if line, err := stdout.ReadString('\n'); line != "there\n" {
		t.Fatalf("%q, %v", line, err)
	}
	inOther := func(args ...string) {
		run(t, append([]string{"nsenter", "-t", fmt.Sprint(other.Process.Pid), "-n"}, args...)...)
	}
	run(t, "ip", "link", "set", "lo", "up")
	run(t, "ip", "link", "add", "here", "type", "veth", "peer", "name", "there")
	run(t, "ip", "link", "set", "there", "netns", fmt.Sprint(other.Process.Pid))
	run(t, "ip", "addr", "add", "10.77.0.1/24", "dev", "here")
	run(t, "ip", "link", "set", "here", "up")
	run(t, "ip", "route", "add", "local", "198.18.5.0/24", "dev", "lo") // no interface has it
	inOther("ip", "link", "set", "lo", "up")
	inOther("ip", "link", "set", "there", "up")
	for _, addr := range []string{"10.77.0.2/24", "203.0.113.5/32", "169.254.169.254/32", "100.100.100.200/32", "192.168.127.9/32"} {
		inOther("ip", "addr", "add", addr, "dev", "there")
	}
	for _, to := range []string{"203.0.113.5", "169.254.169.254", "100.100.100.200", "192.168.127.9"} {
		run(t, "ip", "route", "add", to, "via", "10.77.0.2")
	}
	_, _ = io.WriteString(stdin, "\n")
	if line, err := stdout.ReadString('\n'); line != "serving\n" {
		t.Fatalf("%q, %v", line, err)
	}
	lookAround(t)
}

// lookAround tries from a guest what there is.
func lookAround(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:80", "10.77.0.1:80"} { // what must not be reached is there
		l := must(net.Listen("tcp4", addr))
		defer l.Close()
	}
	ours, theirs, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	upstream := &resolver{records: []string{"host.example. 60 IN A 10.77.0.1", "other.example. 60 IN A 10.77.0.2"}}
	n, err := Open(Config{Link: ours, MAC: guestMAC, Resolver: upstream})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	g := newGuest(t, theirs, DefaultMTU)
	for _, addr := range []string{"10.77.0.2:80", "203.0.113.5:80"} {
		conn := g.dial(addr)
		_, _ = conn.Write([]byte("x"))
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Errorf("%s: %v", addr, err)
		}
	}
	flow := g.dialUDP("10.77.0.2:80")
	_, _ = flow.Write([]byte("x"))
	if _, err := flow.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
	for addr, want := range map[string]string{
		"10.77.0.2:81": "refused", "198.51.100.1:80": "unreachable",
		"10.77.0.1:80": "refused", "198.18.5.1:80": "refused", "169.254.169.254:80": "refused", "100.100.100.200:80": "refused",
		"10.77.0.255:80": "refused", "192.168.127.1:80": "refused",
	} {
		if _, err := g.tryDial(addr); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", addr, err, want)
		}
	}
	for _, addr := range []string{"10.77.0.1:80", "198.18.5.1:80", "169.254.169.254:80", "10.77.0.255:80", "10.77.0.2:80"} {
		a := netip.MustParseAddrPort(addr)
		g.send((&frameBuilder{to: a.Addr(), protocol: 17, payload: datagram(7, 80, []byte("x"))}).bytes())
	}
	eventually(t, "the last flow is there", func() bool { return n.Stats().UDPTotal == 2 })
	for _, r := range []string{
		"tcp 10.77.0.1:80 x1", "tcp 198.18.5.1:80 x1", "tcp 169.254.169.254:80 x1", "tcp 10.77.0.255:80 x1",
		"udp 10.77.0.1:80 x1", "udp 198.18.5.1:80 x1", "udp 169.254.169.254:80 x1", "udp 10.77.0.255:80 x1",
	} {
		if all := refused(n); !slices.Contains(all, r) {
			t.Errorf("%s is not among %v", r, all)
		}
	}
	if got := says(g.ask("udp", query("host.example.", dns.TypeA))); got != "NOERROR" {
		t.Errorf("the host's own address is an answer: %s", got)
	}
	if got := says(g.ask("udp", query("other.example.", dns.TypeA))); got != "NOERROR 10.77.0.2" {
		t.Error(got)
	}
	// What the routing table calls a broadcast is none of the interfaces'.
	run(t, "ip", "route", "add", "broadcast", "10.77.0.77", "dev", "here")
	conn, err := dialHost(t.Context(), "udp", netip.MustParseAddrPort("10.77.0.77:80"))
	if err == nil {
		conn.Close()
		t.Error("a broadcast route is open")
	}
	if err := n.SetEgress(sandbox.Egress{DenyPrivate: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := g.tryDial("10.77.0.2:80"); err == nil {
		t.Error("private addresses are open")
	}
	g.dial("203.0.113.5:80")
	lookForWhoIsGone(t)
}

// lookForWhoIsGone cuts the link to the other host, as a Mac's sleep or another
// network does: nobody says that connections have ended. The limits are the
// kernel's to keep, and shorter here.
func lookForWhoIsGone(t *testing.T) {
	option := func(conn net.Conn, name int) (value int) {
		raw := must(conn.(*net.TCPConn).SyscallConn())
		if err := raw.Control(func(fd uintptr) { value, _ = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, name) }); err != nil {
			t.Error(err)
		}
		return value
	}
	ours, theirs, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	n, err := Open(Config{Link: ours, MAC: guestMAC, Dial: func(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
		conn, err := dialHost(ctx, network, to)
		if err != nil {
			return nil, err
		}
		for name, want := range map[int]int{
			unix.TCP_KEEPIDLE: 60, unix.TCP_KEEPINTVL: 15, unix.TCP_KEEPCNT: 9, unix.TCP_USER_TIMEOUT: 195_000,
		} {
			if got := option(conn, name); got != want {
				t.Errorf("TCP option %d is %d, want %d", name, got, want)
			}
		}
		raw := must(conn.(*net.TCPConn).SyscallConn())
		return conn, errors.Join(
			conn.(*net.TCPConn).SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 2}),
			raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 3000) }),
		)
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	g := newGuest(t, theirs, DefaultMTU)
	idle, busy := g.dial("10.77.0.2:80"), g.dial("10.77.0.2:80")
	for _, conn := range []net.Conn{idle, busy} {
		_, _ = conn.Write([]byte("x"))
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	run(t, "ip", "link", "set", "here", "down")
	_, _ = busy.Write([]byte("x"))
	for what, conn := range map[string]net.Conn{"idle": idle, "busy": busy} {
		_ = conn.SetReadDeadline(time.Now().Add(30 * time.Second))
		if n, err := conn.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "reset") {
			t.Errorf("the one that is %s: %d, %v, want a reset", what, n, err)
		}
	}
	eventually(t, "the host's side is closed", func() bool { return n.Stats().TCPOpen == 0 })
}
