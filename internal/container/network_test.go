package container

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/choiros/agent/test/image"
)

// countingListener counts the connections that are made to it.
func countingListener(t *testing.T, address string) (port int, count *atomic.Int64) {
	t.Helper()
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	count = new(atomic.Int64)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			count.Add(1)
			_, _ = io.WriteString(conn, "the host's secret")
			conn.Close()
		}
	}()
	return listener.Addr().(*net.TCPAddr).Port, count
}

func TestNetworkReachesNothingOfTheHosts(t *testing.T) {
	t.Parallel()
	d := backend(t)
	loopback, loopbackCount := countingListener(t, "127.0.0.1:0")
	anywhere, anywhereCount := countingListener(t, "[::]:0")
	targets := []string{"127.0.0.1", "[::1]", "0.0.0.0", "169.254.1.1", "169.254.1.2", "host.containers.internal", "10.0.2.2", gateway()}
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range addresses {
		network, ok := address.(*net.IPNet)
		if !ok {
			continue
		}
		switch ip := network.IP; {
		case ip.IsLinkLocalUnicast() && ip.To4() == nil:
			targets = append(targets, fmt.Sprintf("[%s%%eth0]", ip))
		case ip.Equal(outward()) || ip.To4() == nil:
			// IPv4 addresses besides the main one are open, see the package's
			// comment.
			targets = append(targets, net.JoinHostPort(ip.String(), "")[:len(net.JoinHostPort(ip.String(), ""))-1])
		}
	}
	b := newBox(t, d)
	b.start(program(image.RootName, "sleep"))
	for _, target := range targets {
		if target == "" {
			continue
		}
		for _, port := range []int{loopback, anywhere} {
			// The status does not tell: some networks answer for everybody.
			if _, _, err := b.exec("/workload", "connect", fmt.Sprintf("%s:%d", target, port)); err != nil {
				t.Fatal(err)
			}
			if loopbackCount.Load()+anywhereCount.Load() > 0 {
				t.Fatalf("the host was reached as %s", target)
			}
		}
	}
	// The test can fail: whoever is on the host does get through.
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", loopback))
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	eventually(t, "the listener counts", func() bool { return loopbackCount.Load() == 1 })
}

// gateway is the first address of the main network, which often is the router.
func gateway() string {
	ip := outward().To4()
	if ip == nil {
		return ""
	}
	return net.IPv4(ip[0], ip[1], ip[2], 1).String()
}

// outward is the host's main address. Nothing is sent.
func outward() net.IP {
	conn, err := net.Dial("udp4", "192.0.2.254:9")
	if err != nil {
		return nil
	}
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).IP
}

func TestNetworkReachesNoOtherSandbox(t *testing.T) {
	t.Parallel()
	d := backend(t)
	server := newBox(t, d)
	server.start(program(image.RootName, "listen", "0.0.0.0:8765"))
	client := newBox(t, d)
	client.start(program(image.RootName, "sleep"))
	connect := func(b *box, host string) int {
		t.Helper()
		code, _, err := b.exec("/workload", "connect", host+":8765")
		b.must("Exec", err)
		return code
	}
	eventually(t, "the server listens", func() bool { return connect(server, "127.0.0.1") == 0 })
	hosts := []string{"127.0.0.1"}
	if ip := outward(); ip != nil {
		hosts = append(hosts, ip.String())
	}
	for _, host := range hosts {
		if connect(client, host) == 0 {
			t.Errorf("another sandbox is reached at %s", host)
		}
	}
}

func TestNetworkNone(t *testing.T) {
	t.Parallel()
	d := backend(t)
	spec := program(image.RootName, "cat", "/proc/net/dev")
	spec.DriverOptions = json.RawMessage(`{"network":"none"}`)
	output, _ := newBox(t, d).run(spec)
	if lines := strings.Split(strings.TrimSpace(output), "\n"); len(lines) != 3 || !strings.Contains(lines[2], "lo:") {
		t.Errorf("its interfaces are\n%s", output)
	}
}
