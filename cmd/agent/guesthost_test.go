package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// What makes the test binary something else than tests.
const (
	greeterFlag = "-test-greeter" // ADDRESS TEXT: a workload that greets
	callerFlag  = "-test-caller"  // SOCKET NAME COMMAND…: a client that is killed
)

func self() string {
	path, err := os.Executable()
	if err != nil {
		return os.Args[0]
	}
	return path
}

// greeterMain takes over if this process is a workload that sends TEXT, a line,
// to whoever connects to ADDRESS, and then echoes.
func greeterMain() {
	if len(os.Args) != 4 || os.Args[1] != greeterFlag {
		return
	}
	listener, err := net.Listen("tcp", os.Args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			os.Exit(1)
		}
		go func() {
			defer conn.Close()
			_, _ = io.WriteString(conn, os.Args[3]+"\n")
			_, _ = io.Copy(conn, conn)
		}()
	}
}

// callerMain takes over if this process is a client: it begins a command inside
// a sandbox, says so with a line, and waits for its end.
func callerMain() {
	if len(os.Args) < 5 || os.Args[1] != callerFlag {
		return
	}
	conn, err := grpc.NewClient("unix://"+os.Args[2], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err == nil {
		_, err = runInside(context.Background(), conn, &agentv1.ExecStart{Name: os.Args[3], Command: os.Args[4:]},
			func(*agentv1.ExecStarted) { fmt.Println("started") })
	}
	fmt.Println("ended:", err)
	os.Exit(1)
}

// portRange is a piece of the host's ports that no other test uses.
type portRange struct {
	first, last int // for leases
	guest       int // and for what listens in sandboxes that share the host's network
}

const (
	firstTestPort = 20000
	leasedPorts   = 16
	guestPorts    = 48
)

// takePorts finds one. Whoever holds a socket named for it has it: those names
// are the same for every process and every user in this network.
func takePorts(t testing.TB) portRange {
	t.Helper()
	for i := range 190 {
		held, err := net.Listen("unix", fmt.Sprintf("@agent-test-ports-%d", i))
		if err != nil {
			continue
		}
		t.Cleanup(func() { held.Close() })
		first := firstTestPort + i*(leasedPorts+guestPorts)
		return portRange{first: first, last: first + leasedPorts - 1, guest: first + leasedPorts}
	}
	t.Fatal("other tests use all ports")
	return portRange{}
}

// listening adds to a spec that it is reached on a port, and ready once it is.
func listening(spec *agentv1.SandboxSpec, port uint32) *agentv1.SandboxSpec {
	spec.Ports = []*agentv1.Port{{Name: "app", GuestPort: port}}
	spec.Readiness = &agentv1.Readiness{Probe: &agentv1.Readiness_Tcp{Tcp: &agentv1.TcpProbe{Port: port}}}
	return spec
}

// secretValue is what a served sandbox has as SECRET.
const secretValue = "not-for-everybody"

// guestPort is where the n-th sandbox of a host listens inside.
func (h *crashHost) guestPort(n int) uint32 { return uint32(h.ports.guest + n%guestPorts) }

// greeting is what a sandbox of this host says, and no other.
func (h *crashHost) greeting(name string) string { return filepath.Base(h.dir) + " " + name }

// served is a sandbox that greets, and has a secret. Its n is no other's who
// lives at the same time.
func (h *crashHost) served(name string, n int) *agentv1.SandboxSpec {
	spec := h.backend.greeter(h.guestPort(n), h.greeting(name))
	spec.Secrets = []*agentv1.SecretRef{{Name: "SECRET", Source: "env-file:" + filepath.Join(h.dir, "secrets.env")}}
	return spec
}

// create makes and starts a sandbox.
func (h *crashHost) create(name string, spec *agentv1.SandboxSpec) *agentv1.Sandbox {
	h.t.Helper()
	r, err := h.client().CreateSandbox(h.t.Context(), &agentv1.CreateSandboxRequest{
		Sandbox: &agentv1.Sandbox{Name: name, Spec: spec}, Start: true,
	})
	if err != nil {
		h.t.Fatalf("create %s: %v", name, err)
	}
	return r.GetSandbox()
}

func (h *crashHost) get(name string) *agentv1.Sandbox {
	h.t.Helper()
	r, err := h.client().GetSandbox(h.t.Context(), &agentv1.GetSandboxRequest{Name: name})
	if err != nil {
		h.t.Fatalf("get %s: %v", name, err)
	}
	return r.GetSandbox()
}

func (h *crashHost) delete(name string) {
	h.t.Helper()
	if _, err := h.client().DeleteSandbox(h.t.Context(), &agentv1.DeleteSandboxRequest{Name: name}); err != nil {
		h.t.Errorf("delete %s: %v", name, err)
	}
}

// output runs a command inside and returns what it prints.
func (h *crashHost) output(name string, command ...string) (string, error) {
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	return runInside(ctx, h.conn, &agentv1.ExecStart{Name: name, Command: command, NoStdin: true}, nil)
}

// errExit is a command that ended badly.
var errExit = errors.New("ended badly")

func runInside(ctx context.Context, conn *grpc.ClientConn, start *agentv1.ExecStart, began func(*agentv1.ExecStarted)) (string, error) {
	stream, err := agentv1.NewExecServiceClient(conn).Exec(ctx)
	if err != nil {
		return "", err
	}
	_ = stream.Send(&agentv1.ExecRequest{Message: &agentv1.ExecRequest_Start{Start: start}}) // Recv has the error
	return collect(stream, began)
}

// collect reads an exec to its end.
func collect(stream agentv1.ExecService_ExecClient, began func(*agentv1.ExecStarted)) (string, error) {
	var text strings.Builder
	for {
		answer, err := stream.Recv()
		if err != nil {
			return text.String(), err
		}
		text.Write(answer.GetStdout())
		text.Write(answer.GetStderr())
		if started := answer.GetStarted(); started != nil && began != nil {
			began(started)
		}
		if exit := answer.GetExit(); exit != nil {
			if exit.GetCode() != 0 || exit.GetSignal() != 0 {
				err = fmt.Errorf("%w: status %d, signal %d", errExit, exit.GetCode(), exit.GetSignal())
			}
			return text.String(), err
		}
	}
}

// call connects to an address and returns the line that it is greeted with.
func call(ctx context.Context, address string) (string, error) {
	d := net.Dialer{Timeout: 10 * time.Second}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	line, err := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSuffix(line, "\n"), err
}

// reach calls a sandbox until it answers, whatever happens to the agent.
func (h *crashHost) reach(name, address string) {
	h.t.Helper()
	h.eventually(name+" answers at "+address, func() error {
		said, err := call(h.t.Context(), address)
		if err == nil && said != h.greeting(name) {
			h.t.Errorf("%s answers at the port of %s", said, name)
		}
		return err
	})
}

// endpoint is where a port of a sandbox is reached; empty: nowhere.
func endpoint(s *agentv1.Sandbox, guestPort uint32) string {
	for _, e := range s.GetStatus().GetEndpoints() {
		if e.GetGuestPort() == guestPort {
			return e.GetAddress()
		}
	}
	return ""
}

// running finds the processes whose command line has a text in it.
func running(text string) (pids []int) {
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range lines {
		line, _ := os.ReadFile(path) // gone
		if strings.Contains(string(line), text) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// within fails the test if work takes longer.
func within(t *testing.T, limit time.Duration, what string, work func()) {
	t.Helper()
	began := time.Now()
	work()
	if took := time.Since(began); took > limit {
		t.Errorf("%s took %s; the bound is %s", what, took, limit)
	}
}

// together runs works at once and waits for them.
func together(works ...func()) {
	var all sync.WaitGroup
	for _, work := range works {
		all.Go(work)
	}
	all.Wait()
}
