package manager

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/choiros/agent/internal/forward"
	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
	"github.com/choiros/agent/internal/store"
)

// serviceFlag makes the test binary a service inside a sandbox.
const serviceFlag = "-test-service"

// serviceMain takes over if this process is such a service: it greets each
// connection with its pid and $SECRET, and then echoes. On SIGHUP it prints a
// line.
func serviceMain() {
	if len(os.Args) != 3 || os.Args[1] != serviceFlag {
		return
	}
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	listener, err := net.Listen("tcp", os.Args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	go func() {
		for range hup {
			fmt.Println("hup")
		}
	}()
	for {
		conn, err := listener.Accept()
		if err != nil {
			os.Exit(1)
		}
		go func() {
			defer conn.Close()
			fmt.Fprintf(conn, "%d %s\n", os.Getpid(), os.Getenv("SECRET"))
			_, _ = io.Copy(conn, conn)
		}()
	}
}

// service is a spec of one that is reachable on a leased port.
func service(t *testing.T) sandbox.Spec {
	t.Helper()
	return serviceAt(t, "127.0.0.1")
}

// serviceAt is one that listens at an address of its loopback.
func serviceAt(t *testing.T, address string) sandbox.Spec {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		t.Fatal(err)
	}
	port := listener.Addr().(*net.TCPAddr).AddrPort().Port()
	listener.Close()
	return sandbox.Spec{
		Driver: process.Name, Image: self, Command: []string{serviceFlag, listener.Addr().String()},
		Ports:       []sandbox.Port{{Name: "app", GuestPort: port}},
		AutoForward: sandbox.AutoForward{Mode: sandbox.AutoForwardOff},
	}
}

// greeted connects to an endpoint and returns the connection with what the
// service said.
func greeted(t *testing.T, address string) (net.Conn, string) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		t.Fatalf("%s says %q, %v", address, line, err)
	}
	return conn, strings.TrimSpace(line)
}

func TestConnectionWakesASandbox(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := service(t)
	s, err := h.m.Create(t.Context(), CreateRequest{Name: "web", Spec: spec})
	if err != nil || len(s.Endpoints) != 1 || s.Endpoints[0].Name != "app" || s.Generation != 0 {
		t.Fatalf("%+v, %v", s, err)
	}
	address := s.Endpoints[0].Address.String()
	first, said := greeted(t, address)
	if s := h.get("web"); s.Phase != PhaseReady || s.Generation != 1 {
		t.Errorf("woken: %s, generation %d", s.Phase, s.Generation)
	}
	if _, err := h.m.Stop(t.Context(), "web", time.Second); err != nil {
		t.Fatal(err)
	}
	if n, err := first.Read(make([]byte, 1)); err == nil {
		t.Errorf("a connection to a past life reads %d bytes", n)
	}
	if _, again := greeted(t, address); again == said {
		t.Errorf("the same process answers after a stop: %q", again)
	}
	// The port stays the sandbox's across a restart of the agent.
	h.restart()
	if s := h.get("web"); len(s.Endpoints) != 1 || s.Endpoints[0].Address.String() != address || s.Generation != 2 {
		t.Errorf("after a restart: %+v", s.Endpoints)
	}
	greeted(t, address)
}

func TestOpenConnectionIsActivity(t *testing.T) {
	t.Parallel()
	h := newHost(t, func(c *Config) { c.IdleScan = 50 * time.Millisecond })
	spec := service(t)
	spec.Idle.Timeout = time.Second
	s := h.create("web", spec)
	conn, _ := greeted(t, s.Endpoints[0].Address.String())
	deadline := time.Now().Add(2500 * time.Millisecond)
	for time.Now().Before(deadline) {
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			t.Fatalf("cut off while in use: %v; it is %s", err, h.get("web").Phase)
		}
	}
	conn.Close()
	h.await("web", "stopped for idleness", func(s *Sandbox) bool { return s.Phase == PhaseStopped && s.Reason == "IDLE" })
}

func TestVisitIsActivity(t *testing.T) {
	t.Parallel()
	h := newHost(t, func(c *Config) { c.IdleScan = 20 * time.Millisecond })
	spec := process.Spec("sleep")
	spec.Idle.Timeout = time.Second
	h.create("web", spec)
	visit, err := h.m.Visit(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	exec, err := visit.Guest.Exec(t.Context(), guest.Command{Args: []string{"sleep", "1.5"}, NoInput: true})
	if err != nil {
		t.Fatal(err)
	}
	for {
		out, err := exec.Receive()
		if err != nil {
			t.Fatalf("%v; it is %s", err, h.get("web").Phase)
		}
		if out.Exit != nil {
			break
		}
	}
	exec.Close()
	visit.Leave()
	h.await("web", "stopped for idleness", func(s *Sandbox) bool { return s.Phase == PhaseStopped && s.Reason == "IDLE" })
	if _, err := h.m.Visit(t.Context(), "web"); !errors.Is(err, sandbox.ErrState) {
		t.Errorf("visit of a stopped sandbox: %v", err)
	}
}

func TestPortsAddedAndRemoved(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := service(t)
	port := spec.Ports[0]
	spec.Ports = nil
	h.create("web", spec)
	added, err := h.m.AddPort(t.Context(), "web", port)
	if err != nil || added.Problem != "" {
		t.Fatalf("%+v, %v", added, err)
	}
	address := added.Endpoint.Address.String()
	greeted(t, address)
	if again, err := h.m.AddPort(t.Context(), "web", port); err != nil || again.Endpoint != added.Endpoint {
		t.Errorf("added again: %+v, %v", again, err)
	}
	if s := h.get("web"); len(s.Endpoints) != 1 || len(s.Spec.Ports) != 1 {
		t.Errorf("shown: %+v, spec %+v", s.Endpoints, s.Spec.Ports)
	}
	// A record written before the agent died is enough.
	h.restart()
	conn, _ := greeted(t, address)
	if err := h.m.RemovePort(t.Context(), "web", port.GuestPort, false, false, Request{}); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("an open connection reads %d bytes after its forward was removed", n)
	}
	if conn, err := net.Dial("tcp", address); err == nil {
		conn.Close()
		t.Error("something listens after the forward was removed")
	}
	if err := h.m.RemovePort(t.Context(), "web", port.GuestPort, false, false, Request{}); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("removed again: %v", err)
	}
	if s := h.get("web"); len(s.Endpoints) != 0 || len(s.Spec.Ports) != 0 {
		t.Errorf("still shown: %+v", s)
	}
	bad := port
	bad.GuestPort = 0
	var wrong *sandbox.FieldError
	if _, err := h.m.AddPort(t.Context(), "web", bad); !errors.As(err, &wrong) || wrong.Field != "port.guest_port" {
		t.Errorf("%v", err)
	}
}

func TestRestartFromOutsideIsABootOfItsOwn(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("web", service(t))
	ref := h.m.ref("web")
	e, err := h.m.find("web")
	if err != nil {
		t.Fatal(err)
	}
	// Held up meanwhile, the manager finds it running again.
	if err := e.lock(t.Context()); err != nil {
		t.Fatal(err)
	}
	err = errors.Join(h.driver().Stop(t.Context(), ref, 0), h.driver().Start(t.Context(), ref))
	e.unlock()
	if err != nil {
		t.Fatal(err)
	}
	s := h.await("web", "ready anew", func(s *Sandbox) bool { return s.Phase == PhaseReady && s.Generation == 2 })
	greeted(t, s.Endpoints[0].Address.String())

	// One that is to be stopped, and was started from outside, is nobody's life
	// of before either.
	if _, err := h.m.Stop(t.Context(), "web", 0); err != nil {
		t.Fatal(err)
	}
	if err := h.driver().Start(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if s, err = h.m.Start(t.Context(), "web"); err != nil || s.Generation != 3 {
		t.Fatalf("generation %d, %v", s.Generation, err)
	}
	greeted(t, s.Endpoints[0].Address.String())
}

// output runs a command inside and returns what it prints.
func (h *host) output(name string, command ...string) string {
	h.t.Helper()
	visit, err := h.m.Visit(h.t.Context(), name)
	if err != nil {
		h.t.Fatal(err)
	}
	defer visit.Leave()
	exec, err := visit.Guest.Exec(h.t.Context(), guest.Command{Args: command, NoInput: true})
	if err != nil {
		h.t.Fatal(err)
	}
	defer exec.Close()
	var text strings.Builder
	for {
		out, err := exec.Receive()
		if err != nil {
			h.t.Fatal(err)
		}
		text.Write(out.Data)
		if out.Exit != nil {
			return text.String()
		}
	}
}

func TestUsageIsOfWhatRuns(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.create("a", process.Spec("sleep"))
	enough := errors.New("enough")
	rounds := 0
	err := h.m.WatchUsage(t.Context(), "", Selector{}, 100*time.Millisecond, false, func(all []Usage) error {
		rounds++
		switch {
		case rounds == 1:
			if len(all) != 1 || all[0].Name != "a" || all[0].Sample.GetProcesses() == 0 || all[0].Sample.GetMemoryBytes() == 0 {
				t.Errorf("%+v", all)
			}
			h.create("b", process.Spec("sleep"))
		case len(all) == 2:
			return enough
		case rounds > 100:
			return errors.New("the second never appeared")
		}
		return nil
	})
	if !errors.Is(err, enough) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.m.WatchUsage(ctx, "", Selector{}, time.Second, false, func([]Usage) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestLeaseIsRecordedBeforeItIsBound(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := service(t)
	port := spec.Ports[0]
	spec.Ports = nil
	h.create("web", spec)
	recorded := false
	h.onStep(func(step string) {
		if step == "port:intent" {
			recorded = len(h.m.forward.Leases("web")) == 1 && h.m.forward.Leases("web")[0].State == "reserved"
		}
	})
	if _, err := h.m.AddPort(t.Context(), "web", port); err != nil || !recorded {
		t.Errorf("%v; at the intent it was reserved and not bound: %v", err, recorded)
	}
	records, err := h.store.Load()
	if err != nil || len(records) != 1 || !slices.ContainsFunc(records[0].Leases, func(l store.Lease) bool { return l.GuestPort == port.GuestPort }) {
		t.Errorf("%+v, %v", records, err)
	}
}

func TestDetectedPortsAreOfferedOrForwarded(t *testing.T) {
	t.Parallel()
	h := newHost(t, func(c *Config) { c.Ports = forward.Config{First: 13000, Last: 13099} })
	spec := service(t)
	port := spec.Ports[0].GuestPort
	spec.Ports = nil
	h.create("web", spec)
	e, err := h.m.find("web")
	if err != nil {
		t.Fatal(err)
	}
	see := func(auto sandbox.AutoForward, ports ...uint16) *Sandbox {
		t.Helper()
		if err := e.lock(t.Context()); err != nil {
			t.Fatal(err)
		}
		defer e.unlock()
		e.unguard() // what the host's other programs listen on is seen inside too
		e.rec.Spec.AutoForward = auto
		var listeners []guest.Listener
		for _, p := range ports {
			listeners = append(listeners, guest.Listener{Address: "127.0.0.1", Port: p, Program: "app"})
		}
		h.m.seeListeners(e, listeners)
		return h.get("web")
	}
	s := see(sandbox.AutoForward{}, port, 22)
	if len(s.Endpoints) != 0 || len(s.Detected) != 2 || s.Detected[0].Refusal == "" || s.Detected[1] != (Detected{Port: port, Program: "app"}) {
		t.Errorf("offered: %+v, endpoints %+v", s.Detected, s.Endpoints)
	}
	forwards := sandbox.AutoForward{Mode: sandbox.AutoForwardForward}
	s = see(forwards, port, 22)
	if len(s.Endpoints) != 1 || !s.Endpoints[0].Auto || s.Endpoints[0].GuestPort != port || len(s.Detected) != 1 {
		t.Fatalf("forwarded: %+v, detected %+v", s.Endpoints, s.Detected)
	}
	greeted(t, s.Endpoints[0].Address.String())
	if again := see(forwards, port); !slices.Equal(again.Endpoints, s.Endpoints) {
		t.Errorf("seen again: %+v", again.Endpoints)
	}
	if s = see(sandbox.AutoForward{Mode: sandbox.AutoForwardForward, Deny: []uint16{9999}}, port, 9999); len(s.Endpoints) != 1 || len(s.Detected) != 1 || s.Detected[0].Refusal == "" {
		t.Errorf("denied: %+v, %+v", s.Endpoints, s.Detected)
	}
	// A guest that goes from port to port has no more than its share.
	for next := uint16(1000); next < 1000+10*forward.MaxAuto; next++ {
		s = see(forwards, next)
	}
	if len(s.Endpoints) > forward.MaxAuto {
		t.Errorf("%d ports are forwarded by themselves", len(s.Endpoints))
	}
}

func TestPortThatIsTakenAtTheLastMomentIsReplaced(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	spec := service(t)
	var thief net.Listener
	h.onStep(func(step string) {
		if step != "create:artefacts" || thief != nil {
			return
		}
		leased := h.m.forward.Leases("web")[0].HostPort
		var err error
		if thief, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", leased)); err != nil {
			t.Error(err)
		}
	})
	s := h.create("web", spec)
	defer thief.Close()
	if s.Endpoints[0].Address.String() == thief.Addr().String() {
		t.Errorf("%s is shown, and is another program's", thief.Addr())
	}
	greeted(t, s.Endpoints[0].Address.String())
}
