package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

// eventually waits for what has no event to wait for.
func eventually(t interface{ Fatalf(string, ...any) }, what string, holds func() bool) {
	for deadline := time.Now().Add(time.Minute); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// daemon is an agent in a process of its own.
type daemon struct {
	cmd    *exec.Cmd
	dir    string
	socket string
	log    *lockedBuffer
	ended  chan error // closed after what Wait returned
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// startDaemon starts an agent that serves when it returns. It, and what its
// sandboxes run, is killed when the test ends.
func startDaemon(t *testing.T, dir string, env []string, flags ...string) *daemon {
	t.Helper()
	d := &daemon{dir: dir, socket: filepath.Join(dir, "agent.sock"), log: &lockedBuffer{}, ended: make(chan error, 1)}
	d.cmd = exec.Command(os.Args[0], append([]string{
		"--state-dir", filepath.Join(dir, "state"), "--socket", d.socket,
		"--default-driver", process.Name, "--min-free-memory-mib", "0",
	}, flags...)...)
	d.cmd.Env = append(append(os.Environ(), agentEnv+"="+dir, "HOME="+dir, "GORACE=atexit_sleep_ms=0"), env...)
	d.cmd.Stderr = d.log
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		d.ended <- d.cmd.Wait()
		close(d.ended)
	}()
	t.Cleanup(func() {
		_ = d.cmd.Process.Kill()
		<-d.ended
		if t.Failed() {
			t.Log(d.log)
		}
	})
	eventually(t, "the agent serves", func() bool {
		select {
		case err := <-d.ended:
			t.Fatalf("the agent ended: %v\n%s", err, d.log)
		default:
		}
		return strings.Contains(d.log.String(), "agent serves")
	})
	return d
}

// host makes a folder with a short name, and sees to it that no process of a
// sandbox's outlives the test.
func host(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ad") // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		pids, err := process.Processes(filepath.Join(dir, "processes"))
		if err != nil {
			t.Error(err)
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		_ = os.RemoveAll(dir)
	})
	return dir
}

func (d *daemon) dial(t *testing.T) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+d.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// wait returns how the agent ended, once it has.
func (d *daemon) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-d.ended:
		return err
	case <-time.After(time.Minute):
		t.Fatal("the agent does not end")
		return nil
	}
}

func (d *daemon) signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := d.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

func create(t *testing.T, conn *grpc.ClientConn, name string, spec *agentv1.SandboxSpec) *agentv1.Sandbox {
	t.Helper()
	answer, err := agentv1.NewSandboxServiceClient(conn).CreateSandbox(t.Context(), &agentv1.CreateSandboxRequest{
		Sandbox: &agentv1.Sandbox{Name: name, Spec: spec}, Start: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	return answer.GetSandbox()
}

func sleeper() *agentv1.SandboxSpec {
	return &agentv1.SandboxSpec{Source: &agentv1.SandboxSpec_Image{Image: process.Image}}
}

func TestGracefulStopLeavesSandboxesRunning(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			dir := host(t)
			first := startDaemon(t, dir, nil)
			conn := first.dial(t)
			before := create(t, conn, "web", sleeper())
			watch, err := agentv1.NewSandboxServiceClient(conn).WatchSandboxes(t.Context(), &agentv1.WatchSandboxesRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := watch.Recv(); err != nil {
				t.Fatal(err)
			}
			first.signal(t, sig)
			for err = nil; err == nil; {
				_, err = watch.Recv()
			}
			if status.Code(err) != codes.Unavailable {
				t.Errorf("the watch ended with %v", err)
			}
			if err := first.wait(t); err != nil {
				t.Errorf("the agent ended with %v", err)
			}
			second := startDaemon(t, dir, nil)
			answer, err := agentv1.NewSandboxServiceClient(second.dial(t)).GetSandbox(t.Context(), &agentv1.GetSandboxRequest{Name: "web"})
			after := answer.GetSandbox()
			if err != nil || after.GetStatus().GetPhase() != agentv1.Phase_PHASE_READY ||
				after.GetUid() != before.GetUid() || after.GetStatus().GetGeneration() != before.GetStatus().GetGeneration() {
				t.Errorf("after: %v, %v; before: %v", after, err, before)
			}
		})
	}
}

// slow makes a sandbox whose start takes that long.
func slow(t *testing.T, delay string) *agentv1.SandboxSpec {
	t.Helper()
	spec := sleeper()
	var err error
	if spec.DriverOptions, err = structpb.NewStruct(map[string]any{"start_delay": delay}); err != nil {
		t.Fatal(err)
	}
	return spec
}

func TestStopWaitsForRequestsWithinItsBound(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		delay, timeout string
		code           codes.Code
	}{
		{"1s", "1m", codes.OK},
		{"1m", "1s", codes.Unavailable},
	} {
		t.Run(test.timeout, func(t *testing.T) {
			t.Parallel()
			d := startDaemon(t, host(t), nil, "--stop-timeout", test.timeout)
			client := agentv1.NewSandboxServiceClient(d.dial(t))
			spec := slow(t, test.delay)
			if _, err := client.CreateSandbox(t.Context(), &agentv1.CreateSandboxRequest{
				Sandbox: &agentv1.Sandbox{Name: "web", Spec: spec},
			}); err != nil {
				t.Fatal(err)
			}
			started := make(chan error, 1)
			go func() {
				_, err := client.StartSandbox(context.WithoutCancel(t.Context()), &agentv1.StartSandboxRequest{Name: "web"})
				started <- err
			}()
			eventually(t, "the sandbox starts", func() bool {
				answer, err := client.GetSandbox(t.Context(), &agentv1.GetSandboxRequest{Name: "web"})
				return err == nil && answer.GetSandbox().GetStatus().GetPhase() == agentv1.Phase_PHASE_STARTING
			})
			d.signal(t, syscall.SIGTERM)
			if err := <-started; status.Code(err) != test.code {
				t.Errorf("the request ended with %v, want %s", err, test.code)
			}
			if err := d.wait(t); err != nil {
				t.Errorf("the agent ended with %v", err)
			}
		})
	}
}

func TestSecondSignalQuitsAtOnce(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, host(t), nil, "--stop-timeout", "10m")
	client := agentv1.NewSandboxServiceClient(d.dial(t))
	go func() {
		_, _ = client.CreateSandbox(context.WithoutCancel(t.Context()), &agentv1.CreateSandboxRequest{
			Sandbox: &agentv1.Sandbox{Name: "web", Spec: slow(t, "5m")}, Start: true,
		})
	}()
	eventually(t, "the sandbox starts", func() bool {
		answer, err := client.GetSandbox(t.Context(), &agentv1.GetSandboxRequest{Name: "web"})
		return err == nil && answer.GetSandbox().GetStatus().GetPhase() == agentv1.Phase_PHASE_STARTING
	})
	d.signal(t, syscall.SIGTERM)
	eventually(t, "it stops", func() bool { return strings.Contains(d.log.String(), "agent stops") })
	d.signal(t, syscall.SIGINT)
	exit, ok := errors.AsType[*exec.ExitError](d.wait(t))
	if !ok || exit.ExitCode() != exitFailed || !strings.Contains(d.log.String(), "stopped at once") {
		t.Errorf("the agent ended with %v", exit)
	}
}

func TestServiceManagerIsTold(t *testing.T) {
	t.Parallel()
	dir := host(t)
	address := &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"}
	conn, err := net.ListenUnixgram("unixgram", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	read := func() string {
		buf := make([]byte, 100)
		_ = conn.SetReadDeadline(time.Now().Add(time.Minute))
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
	d := startDaemon(t, dir, []string{"NOTIFY_SOCKET=" + address.Name})
	if got := read(); got != "READY=1" {
		t.Errorf("told %q", got)
	}
	d.signal(t, syscall.SIGTERM)
	if got := read(); got != "STOPPING=1" {
		t.Errorf("told %q", got)
	}
	if err := d.wait(t); err != nil {
		t.Error(err)
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	d := startDaemon(t, host(t), nil, "--metrics-listen", "127.0.0.1:"+port)
	conn := d.dial(t)
	create(t, conn, "web", sleeper())
	_, err := agentv1.NewSandboxServiceClient(conn).GetSandbox(t.Context(), &agentv1.GetSandboxRequest{Name: "none"})
	if status.Code(err) != codes.NotFound {
		t.Fatal(err)
	}
	_ = conn.Invoke(t.Context(), "/choiros.agent.v1.SandboxService/Nonsense", &agentv1.GetSandboxRequest{}, &agentv1.GetSandboxResponse{})
	scrape := func() string {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1:"+port+"/metrics", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(body)
	}
	// The end of a request is counted after its answer was sent.
	eventually(t, "the request is counted", func() bool {
		return strings.Contains(scrape(), `method="/choiros.agent.v1.SandboxService/GetSandbox"`)
	})
	body := scrape()
	for _, line := range []string{
		`choiros_agent_requests_total{code="OK",method="/choiros.agent.v1.SandboxService/CreateSandbox"} 1`,
		`choiros_agent_requests_total{code="NotFound",method="/choiros.agent.v1.SandboxService/GetSandbox"} 1`,
		`choiros_agent_request_seconds_count{method="/choiros.agent.v1.SandboxService/CreateSandbox"} 1`,
		`choiros_agent_sandboxes{phase="ready"} 1`,
		`choiros_agent_boots{state="running"} 0`,
		`choiros_agent_build_info{go="go`,
		`choiros_agent_host_memory_bytes{kind="total"} `,
		"process_resident_memory_bytes ",
	} {
		if !strings.Contains(body, line) {
			t.Errorf("no line %s", line)
		}
	}
	if strings.Contains(body, "Nonsense") {
		t.Error("a method that does not exist has become a label")
	}
}

// spans is a collector that counts.
type spans struct {
	collector.UnimplementedTraceServiceServer
	names chan string
}

func (s *spans) Export(_ context.Context, req *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	for _, resource := range req.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			for _, span := range scope.GetSpans() {
				s.names <- span.GetName()
			}
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

func TestTraces(t *testing.T) {
	t.Parallel()
	var config net.ListenConfig
	listener, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	got := &spans{names: make(chan string, 100)}
	server := grpc.NewServer()
	collector.RegisterTraceServiceServer(server, got)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	d := startDaemon(t, host(t), nil, "--traces-otlp-endpoint", "http://"+listener.Addr().String())
	if _, err := agentv1.NewHostServiceClient(d.dial(t)).GetInfo(t.Context(), &agentv1.GetInfoRequest{}); err != nil {
		t.Fatal(err)
	}
	d.signal(t, syscall.SIGTERM) // what is left is sent before it ends
	if err := d.wait(t); err != nil {
		t.Error(err)
	}
	select {
	case name := <-got.names:
		if name != "choiros.agent.v1.HostService/GetInfo" {
			t.Errorf("span %s", name)
		}
	default:
		t.Error("no span was sent")
	}
}

func TestNoCoreDumps(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, host(t), nil)
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", d.cmd.Process.Pid))
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("this system has no /proc; run it on Linux")
	}
	if !regexp.MustCompile(`(?m)^Max core file size +0 +0 `).Match(limits) {
		t.Errorf("limits:\n%s", limits)
	}
}

func TestLogWhoseReaderHasGoneEndsNothing(t *testing.T) {
	t.Parallel()
	dir := host(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{dir: dir, socket: filepath.Join(dir, "agent.sock"), log: &lockedBuffer{}, ended: make(chan error, 1)}
	d.cmd = exec.Command(os.Args[0], "--state-dir", filepath.Join(dir, "state"), "--socket", d.socket,
		"--default-driver", process.Name, "--log-level", "debug")
	d.cmd.Env = append(os.Environ(), agentEnv+"="+dir, "HOME="+dir)
	d.cmd.Stderr = w
	if err := errors.Join(d.cmd.Start(), w.Close(), r.Close()); err != nil {
		t.Fatal(err)
	}
	go func() { d.ended <- d.cmd.Wait() }()
	t.Cleanup(func() { _ = d.cmd.Process.Kill() })
	host := agentv1.NewHostServiceClient(d.dial(t))
	for range 3 {
		if _, err := host.GetInfo(t.Context(), &agentv1.GetInfoRequest{}, grpc.WaitForReady(true)); err != nil {
			t.Fatal(err)
		}
	}
	d.signal(t, syscall.SIGTERM)
	if err := d.wait(t); err != nil {
		t.Errorf("the agent ended with %v", err)
	}
}

func freePort(t *testing.T) string {
	t.Helper()
	var config net.ListenConfig
	listener, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}
