package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/test/image"
)

// Figures of ports. The program behind all of them is the same, of the same
// image, and echoes.

// way is one way to the echoing program.
type way struct{ name, address string }

// createEcho makes a sandbox whose program listens on its own loopback, and
// returns where its port is on the host.
func (h *crashHost) createEcho(b *testing.B) string {
	b.Helper()
	made := h.createBench(b, "echo", &agentv1.SandboxSpec{
		Command:   []string{"listen", "127.0.0.1:7000"},
		Ports:     []*agentv1.Port{{GuestPort: 7000}},
		Readiness: &agentv1.Readiness{Probe: &agentv1.Readiness_Tcp{Tcp: &agentv1.TcpProbe{Port: 7000}}},
	})
	endpoints := made.GetStatus().GetEndpoints()
	if len(endpoints) != 1 {
		b.Fatalf("endpoints %v", endpoints)
	}
	return endpoints[0].GetAddress()
}

// ways are ours, podman's published port, and a program in the host's own
// network: the direct connection that nothing else can be.
func (h *crashHost) ways(b *testing.B) []way {
	b.Helper()
	published := h.runRival(b, "published", "-p", "127.0.0.1::7000", image.RootName, "listen", "0.0.0.0:7000")
	out, err := exec.CommandContext(b.Context(), "podman", "port", published, "7000/tcp").Output()
	if err != nil {
		b.Fatal(err)
	}
	direct := h.runRival(b, "direct", "--network", "host", image.RootName, "listen", "127.0.0.1:0")
	all := []way{{"agent", h.createEcho(b)}, {"podman", strings.TrimSpace(string(out))}, {"direct", listensOn(b, direct)}}
	for _, w := range all {
		h.eventually(w.name+" echoes", func() error { return newConnection(b.Context(), w.address) })
	}
	return all
}

// runRival runs a container of podman's own for as long as the benchmark.
func (h *crashHost) runRival(b *testing.B, name string, args ...string) (container string) {
	b.Helper()
	container = name + "-" + filepath.Base(h.dir)
	run := []string{"run", "-d", "--name", container, "--cap-drop", "all", "--security-opt", "no-new-privileges"}
	b.Cleanup(func() {
		if err := podman("rm", "-f", "-i", "-t", "0", container); err != nil {
			b.Error(err)
		}
	})
	if err := podman(append(run, args...)...); err != nil {
		b.Fatal(err)
	}
	return container
}

// listensOn is the address that the program of a container says it has.
func listensOn(b *testing.B, container string) string {
	b.Helper()
	for range 100 {
		out, err := exec.CommandContext(b.Context(), "podman", "logs", container).Output()
		if err != nil {
			b.Fatal(err)
		}
		if address, ok := strings.CutPrefix(string(out), "listening on "); ok {
			return strings.TrimSpace(address)
		}
	}
	b.Fatalf("%s does not say where it listens", container)
	return ""
}

// newConnection makes a connection, has a byte echoed and ends it.
func newConnection(ctx context.Context, address string) error {
	conn, err := dialEcho(ctx, address)
	if err != nil {
		return err
	}
	defer conn.Close()
	// A reset, or the many connections would use up the host's ports.
	if err := conn.(*net.TCPConn).SetLinger(0); err != nil {
		return err
	}
	return echoed(conn, make([]byte, 1))
}

func dialEcho(ctx context.Context, address string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return conn, conn.SetDeadline(time.Now().Add(time.Minute))
}

// echoed sends data, which fits the sockets' buffers, and reads it back.
func echoed(conn net.Conn, data []byte) error {
	if _, err := conn.Write(data); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, data)
	return err
}

// BenchmarkForwardConnect is a new connection, a byte there and back, and its
// end.
func BenchmarkForwardConnect(b *testing.B) {
	h := newCrashHost(b, podmanBackend(b))
	h.start()
	ways := h.ways(b)
	took := map[string]samples{}
	for b.Loop() {
		for _, w := range ways {
			took[w.name] = append(took[w.name], timed(b, func() error { return newConnection(b.Context(), w.address) }))
		}
	}
	b.ReportMetric(0, "ns/op")
	median := map[string]float64{}
	for name, s := range took {
		median[name] = float64(s.at(50).Nanoseconds()) / 1000
		b.ReportMetric(median[name], name+"-p50-µs")
	}
	b.ReportMetric(median["agent"]/median["podman"], "agent/podman")
	b.ReportMetric(median["agent"]/median["direct"], "agent/direct")
}

// BenchmarkForwardBulk is data there and back over one connection; its rate is
// that of one direction, with the other one as busy.
func BenchmarkForwardBulk(b *testing.B) {
	h := newCrashHost(b, podmanBackend(b))
	h.start()
	ways := h.ways(b)
	conns := map[string]net.Conn{}
	for _, w := range ways {
		conn, err := dialEcho(b.Context(), w.address)
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		conns[w.name] = conn
	}
	const size = 64 << 20
	took := map[string]samples{}
	for b.Loop() {
		for _, w := range ways {
			took[w.name] = append(took[w.name], timed(b, func() error { return bulk(conns[w.name], size) }))
		}
	}
	b.ReportMetric(0, "ns/op")
	rate := map[string]float64{}
	for name, s := range took {
		rate[name] = size / 1e6 / s.at(50).Seconds()
		b.ReportMetric(rate[name], name+"-MB/s")
	}
	b.ReportMetric(rate["agent"]/rate["podman"], "agent/podman")
	b.ReportMetric(rate["agent"]/rate["direct"], "agent/direct")
}

// bulk sends so many bytes and reads them back at the same time.
func bulk(conn net.Conn, size int64) error {
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() {
		chunk := bytes.Repeat([]byte("x"), 1<<20)
		for left := size; left > 0; left -= int64(len(chunk)) {
			if _, err := conn.Write(chunk); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	buf := make([]byte, 1<<20)
	for left := size; left > 0; {
		n, err := conn.Read(buf[:min(int64(len(buf)), left)])
		if err != nil {
			_ = conn.Close() // or the sender would wait for its deadline
			<-sent
			return err
		}
		left -= int64(n)
	}
	return <-sent
}

// BenchmarkIdleForwards is the agent's memory for forwards that nobody uses.
func BenchmarkIdleForwards(b *testing.B) {
	const sandboxes, each = 20, 50
	// Neither those that agents lease by default nor those of other tests.
	const firstPort = 14000
	h := newCrashHost(b, podmanBackend(b))
	h.start()
	ports := agentv1.NewPortServiceClient(h.conn)
	for i := range sandboxes {
		_, err := h.client().CreateSandbox(b.Context(), &agentv1.CreateSandboxRequest{Sandbox: &agentv1.Sandbox{
			Name: fmt.Sprintf("idle-%d", i),
			Spec: &agentv1.SandboxSpec{Driver: "podman", Source: &agentv1.SandboxSpec_Image{Image: image.RootName}},
		}})
		if err != nil {
			b.Fatal(err)
		}
	}
	before := h.agentKiB(b)
	var took samples
	for i := range sandboxes {
		for port := range each {
			took = append(took, timed(b, func() error {
				r, err := ports.AddPort(b.Context(), &agentv1.AddPortRequest{
					Name: fmt.Sprintf("idle-%d", i),
					Port: &agentv1.Port{GuestPort: uint32(7000 + port), HostPort: uint32(firstPort + i*each + port)},
				})
				if err == nil && r.GetForward().GetProblem() != "" {
					err = fmt.Errorf("port %d: %s", port, r.GetForward().GetProblem())
				}
				return err
			}))
		}
	}
	after := h.agentKiB(b)
	for b.Loop() {
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(milliseconds(took.at(50)), "add-p50-ms")
	b.ReportMetric(float64(after-before)/(sandboxes*each), "KiB/forward")
}

// BenchmarkIdleConnections is the agent's memory for open connections that
// have carried something and carry nothing now.
func BenchmarkIdleConnections(b *testing.B) {
	const connections = 1000
	h := newCrashHost(b, podmanBackend(b))
	h.start()
	address := h.createEcho(b)
	guestBefore, before := h.guestdMiB(b, "echo"), h.agentKiB(b)
	data := make([]byte, 100<<10)
	for range connections {
		conn, err := dialEcho(b.Context(), address)
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		if err := echoed(conn, data); err != nil {
			b.Fatal(err)
		}
	}
	after, guestAfter := h.agentKiB(b), h.guestdMiB(b, "echo")
	for b.Loop() {
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(after-before)/connections, "KiB/connection")
	b.ReportMetric((guestAfter-guestBefore)*1024/connections, "guestd-KiB/connection")
}
