package server_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
	"github.com/choiros/agent/internal/secrets"
)

// insider starts an agent with a sandbox that runs, and returns its connection.
func insider(t *testing.T, edit func(*agentv1.SandboxSpec)) *grpc.ClientConn {
	t.Helper()
	resolver, err := secrets.New(secrets.Config{})
	if err != nil {
		t.Fatal(err)
	}
	agent := startAgent(t, agentOptions{Drivers: processes(t), Manager: manager.Config{Secrets: resolver}})
	conn := agent.Dial(t)
	spec := &agentv1.SandboxSpec{
		Driver: process.Name, Source: &agentv1.SandboxSpec_Image{Image: process.Image}, Command: []string{"sleep"},
	}
	if edit != nil {
		edit(spec)
	}
	client := agentv1.NewSandboxServiceClient(conn)
	if _, err := client.CreateSandbox(t.Context(), &agentv1.CreateSandboxRequest{
		Sandbox: &agentv1.Sandbox{Name: "web", Spec: spec}, Start: true,
		SecretValues: inlineValues(spec),
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := client.DeleteSandbox(context.Background(), &agentv1.DeleteSandboxRequest{Name: "web", AllowMissing: true}); err != nil {
			t.Error(err)
		}
	})
	return conn
}

func inlineValues(spec *agentv1.SandboxSpec) map[string][]byte {
	values := map[string][]byte{}
	for _, ref := range spec.GetSecrets() {
		if name, ok := strings.CutPrefix(ref.GetSource(), "inline:"); ok {
			values[name] = []byte("value of " + name)
		}
	}
	return values
}

// ran is what a command printed and how it ended.
type ran struct {
	stdout, stderr string
	exit           *agentv1.ExecExit
	id             string
}

// exec runs a command to its end, or until done says that it is enough.
func exec(t *testing.T, conn *grpc.ClientConn, start *agentv1.ExecStart, then func(agentv1.ExecService_ExecClient)) (ran, error) {
	t.Helper()
	stream, err := agentv1.NewExecServiceClient(conn).Exec(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if start.GetName() == "" {
		start.Name = "web"
	}
	if err := stream.Send(&agentv1.ExecRequest{Message: &agentv1.ExecRequest_Start{Start: start}}); err != nil {
		t.Fatal(err)
	}
	if then != nil {
		then(stream)
	}
	return finish(stream)
}

func finish(stream agentv1.ExecService_ExecClient) (r ran, err error) {
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return r, nil
		}
		if err != nil {
			return r, err
		}
		switch m := resp.GetMessage().(type) {
		case *agentv1.ExecResponse_Started:
			r.id = m.Started.GetExecId()
		case *agentv1.ExecResponse_Stdout:
			r.stdout += string(m.Stdout)
		case *agentv1.ExecResponse_Stderr:
			r.stderr += string(m.Stderr)
		case *agentv1.ExecResponse_Exit:
			r.exit = m.Exit
		}
	}
}

func TestExecOverTheAPI(t *testing.T) {
	t.Parallel()
	conn := insider(t, nil)
	sh := func(script string) *agentv1.ExecStart {
		return &agentv1.ExecStart{Command: []string{"sh", "-c", script}, NoStdin: true}
	}
	if r, err := exec(t, conn, sh("echo out; echo err >&2; exit 7"), nil); err != nil || r.stdout != "out\n" || r.stderr != "err\n" || r.exit.GetCode() != 7 {
		t.Errorf("%+v, %v", r, err)
	}
	start := &agentv1.ExecStart{Command: []string{"cat"}, Env: map[string]string{"A": "b"}, WorkingDir: "/"}
	r, err := exec(t, conn, start, func(s agentv1.ExecService_ExecClient) {
		for range 3 {
			_ = s.Send(&agentv1.ExecRequest{Message: &agentv1.ExecRequest_Stdin{Stdin: bytes.Repeat([]byte("x"), 1000)}})
		}
		_ = s.CloseSend()
	})
	if err != nil || len(r.stdout) != 3000 || r.exit.GetCode() != 0 {
		t.Errorf("%d bytes, %v, %v", len(r.stdout), r.exit, err)
	}
	r, err = exec(t, conn, &agentv1.ExecStart{Command: []string{"sleep", "60"}}, func(s agentv1.ExecService_ExecClient) {
		if _, err := s.Recv(); err != nil {
			t.Error(err)
		}
		_ = s.Send(&agentv1.ExecRequest{Message: &agentv1.ExecRequest_Signal{Signal: "USR1"}})
	})
	if err != nil || r.exit.GetSignal() != 10 || r.exit.GetCode() != 138 {
		t.Errorf("signalled: %+v, %v", r.exit, err)
	}
	tty := &agentv1.ExecStart{
		Command: []string{"sh", "-c", "stty size"}, Tty: true,
		TerminalSize: &agentv1.TerminalSize{Columns: 101, Rows: 33},
	}
	if r, err = exec(t, conn, tty, nil); err != nil || strings.TrimSpace(r.stdout) != "33 101" {
		t.Errorf("terminal: %q, %v", r.stdout, err)
	}
}

func TestExecIsLeftAndAttachedTo(t *testing.T) {
	t.Parallel()
	conn := insider(t, nil)
	client := agentv1.NewExecServiceClient(conn)
	go1 := filepath.Join(t.TempDir(), "go")
	start := &agentv1.ExecStart{Command: []string{"sh", "-c", "echo one; while ! test -e " + go1 + "; do sleep 0.02; done; echo two; exit 3"}}
	r, err := exec(t, conn, start, func(s agentv1.ExecService_ExecClient) {
		_ = s.Send(&agentv1.ExecRequest{Message: &agentv1.ExecRequest_Detach{Detach: &agentv1.ExecDetach{}}})
	})
	if err != nil || r.exit != nil || r.id == "" {
		t.Fatalf("detached: %+v, %v", r, err)
	}
	list, err := client.ListExecs(t.Context(), &agentv1.ListExecsRequest{Name: "web"})
	if err != nil || len(list.GetExecs()) != 1 || list.GetExecs()[0].GetExecId() != r.id || list.GetExecs()[0].GetExit() != nil {
		t.Errorf("%v, %v", list, err)
	}
	if err := os.WriteFile(go1, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	stream, err := client.Exec(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.Send(&agentv1.ExecRequest{Message: &agentv1.ExecRequest_Attach{Attach: &agentv1.ExecAttach{Name: "web", ExecId: r.id}}})
	again, err := finish(stream)
	if err != nil || again.exit.GetCode() != 3 || !strings.HasSuffix(again.stdout, "two\n") {
		t.Errorf("attached: %+v, %v", again, err)
	}
	// One that nobody ever was attached to has said nothing in vain.
	alone, err := exec(t, conn, &agentv1.ExecStart{Command: []string{"sh", "-c", "echo alone; exit 4"}, Detached: true, NoStdin: true}, nil)
	if err != nil || alone.exit != nil || alone.stdout != "" {
		t.Fatalf("detached at once: %+v, %v", alone, err)
	}
	if stream, err = client.Exec(t.Context()); err != nil {
		t.Fatal(err)
	}
	_ = stream.Send(&agentv1.ExecRequest{Message: &agentv1.ExecRequest_Attach{Attach: &agentv1.ExecAttach{Name: "web", ExecId: alone.id}}})
	if again, err = finish(stream); err != nil || again.exit.GetCode() != 4 || again.stdout != "alone\n" {
		t.Errorf("attached: %+v, %v", again, err)
	}
	// What is killed from aside.
	kept, err := exec(t, conn, &agentv1.ExecStart{Command: []string{"sleep", "60"}, Keep: true}, func(s agentv1.ExecService_ExecClient) {
		_ = s.Send(&agentv1.ExecRequest{Message: &agentv1.ExecRequest_Detach{Detach: &agentv1.ExecDetach{}}})
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.SignalExec(t.Context(), &agentv1.SignalExecRequest{Name: "web", ExecId: kept.id, Signal: "SIGKILL"}); err != nil {
		t.Error(err)
	}
	if _, err := client.SignalExec(t.Context(), &agentv1.SignalExecRequest{Name: "web", ExecId: "no-such", Signal: "KILL"}); status.Code(err) != codes.NotFound {
		t.Errorf("%v", err)
	}
}

func TestExecSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	conn := insider(t, nil)
	for name, test := range map[string]struct {
		start *agentv1.ExecStart
		code  codes.Code
	}{
		"no command":      {&agentv1.ExecStart{}, codes.InvalidArgument},
		"no such sandbox": {&agentv1.ExecStart{Name: "other", Command: []string{"true"}}, codes.NotFound},
		"no such command": {&agentv1.ExecStart{Command: []string{"no-such-command"}}, codes.NotFound},
		"no such folder":  {&agentv1.ExecStart{Command: []string{"true"}, WorkingDir: "/no/such"}, codes.NotFound},
		"bad env":         {&agentv1.ExecStart{Command: []string{"true"}, Env: map[string]string{"1": ""}}, codes.InvalidArgument},
		"not executable":  {&agentv1.ExecStart{Command: []string{"/etc/passwd"}}, codes.PermissionDenied},
	} {
		if r, err := exec(t, conn, test.start, nil); status.Code(err) != test.code {
			t.Errorf("%s: %+v, %v; want %s", name, r, err, test.code)
		}
	}
	stream, err := agentv1.NewExecServiceClient(conn).Exec(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.Send(&agentv1.ExecRequest{Message: &agentv1.ExecRequest_Stdin{Stdin: []byte("x")}})
	if _, err := finish(stream); status.Code(err) != codes.InvalidArgument {
		t.Errorf("input first: %v", err)
	}
	r, err := exec(t, conn, &agentv1.ExecStart{Command: []string{"sleep", "60"}}, func(s agentv1.ExecService_ExecClient) {
		_ = s.Send(&agentv1.ExecRequest{Message: &agentv1.ExecRequest_Signal{Signal: "NOPE"}})
	})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("an unknown signal: %+v, %v", r, err)
	}
}

// echoServer is a service on the loopback that sandboxes of child processes
// share with this test.
func echoServer(t *testing.T) uint16 {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	return listener.Addr().(*net.TCPAddr).AddrPort().Port()
}

func TestPortsOverTheAPI(t *testing.T) {
	t.Parallel()
	port := uint32(echoServer(t))
	conn := insider(t, nil)
	client := agentv1.NewPortServiceClient(conn)
	ctx := t.Context()
	added, err := client.AddPort(ctx, &agentv1.AddPortRequest{Name: "web", Port: &agentv1.Port{GuestPort: port, Name: "echo"}, RequestId: "1"})
	if err != nil {
		t.Fatal(err)
	}
	again, err := client.AddPort(ctx, &agentv1.AddPortRequest{Name: "web", Port: &agentv1.Port{GuestPort: port, Name: "echo"}, RequestId: "1"})
	if err != nil || again.GetForward().GetEndpoint().GetAddress() != added.GetForward().GetEndpoint().GetAddress() {
		t.Errorf("a retry: %v, %v", again, err)
	}
	direct, err := net.Dial("tcp", added.GetForward().GetEndpoint().GetAddress())
	if err != nil {
		t.Fatal(err)
	}
	defer direct.Close()
	if _, err := io.WriteString(direct, "hello"); err != nil {
		t.Fatal(err)
	}
	_ = direct.(*net.TCPConn).CloseWrite()
	if back, err := io.ReadAll(direct); err != nil || string(back) != "hello" {
		t.Errorf("%q, %v", back, err)
	}
	list, err := client.ListPorts(ctx, &agentv1.ListPortsRequest{Name: "web"})
	if err != nil || len(list.GetForwards()) != 1 || list.GetForwards()[0].GetTotalConnections() != 1 || list.GetForwards()[0].GetProblem() != "" {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := client.RemovePort(ctx, &agentv1.RemovePortRequest{Name: "web", GuestPort: port}); err != nil {
		t.Error(err)
	}
	if _, err := client.RemovePort(ctx, &agentv1.RemovePortRequest{Name: "web", GuestPort: port}); status.Code(err) != codes.NotFound {
		t.Errorf("removed again: %v", err)
	}
	if _, err := client.AddPort(ctx, &agentv1.AddPortRequest{Name: "web", Port: &agentv1.Port{GuestPort: 70000}}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("%v", err)
	}
}

func TestTunnelOverTheAPI(t *testing.T) {
	t.Parallel()
	port := uint32(echoServer(t))
	conn := insider(t, nil)
	client := agentv1.NewPortServiceClient(conn)
	if _, err := agentv1.NewSandboxServiceClient(conn).StopSandbox(t.Context(), &agentv1.StopSandboxRequest{Name: "web"}); err != nil {
		t.Fatal(err)
	}
	open := func(o *agentv1.TunnelOpen) (agentv1.PortService_TunnelClient, *agentv1.TunnelOpened, error) {
		t.Helper()
		tunnel, err := client.Tunnel(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		_ = tunnel.Send(&agentv1.TunnelRequest{Message: &agentv1.TunnelRequest_Open{Open: o}})
		first, err := tunnel.Recv()
		return tunnel, first.GetOpened(), err
	}
	if _, _, err := open(&agentv1.TunnelOpen{Name: "web", GuestPort: port, NoWake: true}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("to a stopped sandbox: %v", err)
	}
	tunnel, opened, err := open(&agentv1.TunnelOpen{Name: "web", GuestPort: port})
	if err != nil || opened.GetGeneration() != 2 {
		t.Fatalf("%v, %v", opened, err)
	}
	data := bytes.Repeat([]byte("tunnel"), 100_000)
	go func() {
		for chunk := range slices.Chunk(data, 60_000) {
			_ = tunnel.Send(&agentv1.TunnelRequest{Message: &agentv1.TunnelRequest_Data{Data: chunk}})
		}
		_ = tunnel.CloseSend()
	}()
	var back []byte
	eof := false
	for {
		part, err := tunnel.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		back = append(back, part.GetData()...)
		eof = eof || part.GetEof() != nil
	}
	if !bytes.Equal(back, data) || !eof {
		t.Errorf("%d bytes came back, end %v", len(back), eof)
	}
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := uint32(closed.Addr().(*net.TCPAddr).AddrPort().Port())
	closed.Close()
	if _, _, err := open(&agentv1.TunnelOpen{Name: "web", GuestPort: nobody, NoWake: true}); status.Code(err) != codes.Unavailable {
		t.Errorf("where nobody listens: %v", err)
	}
}

func TestSecretsOverTheAPI(t *testing.T) {
	t.Parallel()
	conn := insider(t, func(s *agentv1.SandboxSpec) {
		s.Secrets = []*agentv1.SecretRef{{Name: "KEY", Source: "inline:key"}, {Name: "NONE", Source: "file:/no/such", Optional: true}}
	})
	client := agentv1.NewSecretServiceClient(conn)
	env := &agentv1.ExecStart{Command: []string{"sh", "-c", "echo $KEY"}, NoStdin: true}
	if r, err := exec(t, conn, env, nil); err != nil || r.stdout != "value of key\n" {
		t.Errorf("%+v, %v", r, err)
	}
	set, err := client.SetSecrets(t.Context(), &agentv1.SetSecretsRequest{Name: "web", Values: map[string][]byte{"key": []byte("other")}})
	if err != nil || set.GetDelivery().GetOutcome() != agentv1.SecretDelivery_OUTCOME_ACKNOWLEDGED || !slices.Equal(set.GetDelivery().GetChanged(), []string{"KEY"}) {
		t.Errorf("%v, %v", set, err)
	}
	if r, err := exec(t, conn, env, nil); err != nil || r.stdout != "other\n" {
		t.Errorf("%+v, %v", r, err)
	}
	push, err := client.PushSecrets(t.Context(), &agentv1.PushSecretsRequest{})
	if err != nil || len(push.GetDeliveries()) != 1 || push.GetDeliveries()[0].GetOutcome() != agentv1.SecretDelivery_OUTCOME_UNCHANGED {
		t.Errorf("%v, %v", push, err)
	}
	list, err := client.ListSecrets(t.Context(), &agentv1.ListSecretsRequest{Name: "web"})
	if err != nil || len(list.GetSecrets()) != 2 || list.GetSecrets()[0].GetVersion() == "" || !list.GetSecrets()[1].GetMissing() {
		t.Errorf("%v, %v", list, err)
	}
	if text := fmt.Sprint(list, push, set); strings.Contains(text, "other") || strings.Contains(text, "value of") {
		t.Errorf("an answer has a value: %s", text)
	}
	if _, err := client.SetSecrets(t.Context(), &agentv1.SetSecretsRequest{Name: "web", Values: map[string][]byte{"no": nil}}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("%v", err)
	}
}

func TestStatsOverTheAPI(t *testing.T) {
	t.Parallel()
	conn := insider(t, nil)
	client := agentv1.NewStatsServiceClient(conn)
	stream, err := client.StreamStats(t.Context(), &agentv1.StreamStatsRequest{Interval: durationpb.New(100 * time.Millisecond)})
	if err != nil {
		t.Fatal(err)
	}
	for round := 0; ; round++ {
		resp, err := stream.Recv()
		if err != nil || len(resp.GetSamples()) != 1 || resp.GetSamples()[0].GetName() != "web" || resp.GetSamples()[0].GetMemoryBytes() == 0 {
			t.Fatalf("round %d: %v, %v", round, resp, err)
		}
		if resp.GetSamples()[0].CpuMillis != nil {
			break
		}
		if round > 50 {
			t.Fatal("no sample says what of a CPU was used")
		}
	}
	for _, bad := range []*agentv1.StreamStatsRequest{
		{Interval: durationpb.New(time.Millisecond)}, {Name: "web", LabelSelector: "a=b"}, {LabelSelector: "=="},
	} {
		stream, err := client.StreamStats(t.Context(), bad)
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v", bad, err)
		}
	}
}
