package server_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
	"github.com/choiros/agent/internal/server"
)

type clients struct {
	conn      *grpc.ClientConn
	sandboxes agentv1.SandboxServiceClient
	images    agentv1.ImageServiceClient
	host      agentv1.HostServiceClient
}

func dial(t *testing.T, agent *testAgent) clients {
	t.Helper()
	return clientsOf(agent.Dial(t))
}

func clientsOf(conn *grpc.ClientConn) clients {
	return clients{
		conn, agentv1.NewSandboxServiceClient(conn),
		agentv1.NewImageServiceClient(conn), agentv1.NewHostServiceClient(conn),
	}
}

// eventually waits for what has no event to wait for.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for !condition() {
		select {
		case <-deadline:
			t.Fatalf("not within 30 s: %s", what)
		case <-time.After(time.Millisecond):
		}
	}
}

func wantCode(t *testing.T, err error, code codes.Code) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("error = %v, want code %s", err, code)
	}
}

// wantError checks an error's code and what it tells programs.
func wantError(t *testing.T, err error, code codes.Code, reason, field string) *status.Status {
	t.Helper()
	s := status.Convert(err)
	var info *errdetails.ErrorInfo
	violation := ""
	for _, detail := range s.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			info = detail
		case *errdetails.BadRequest:
			violation = detail.GetFieldViolations()[0].GetField()
		}
	}
	if s.Code() != code || info.GetReason() != reason || info.GetDomain() != server.ErrorDomain {
		t.Errorf("error = %v (%v), want %s with reason %s", err, info, code, reason)
	}
	if field != "" && (info.GetMetadata()["field"] != field || violation != field) {
		t.Errorf("error = %v names field %q, violation %q; want %q", err, info.GetMetadata()["field"], violation, field)
	}
	return s
}

// logged is a log that tests read while it is written.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) contains(s string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.text.String(), s)
}

func TestHealthAndReflection(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{Drivers: processes(t)})
	conn := agent.Dial(t)
	health := healthpb.NewHealthClient(conn)
	services := []string{"", "choiros.agent.v1.SandboxService", "choiros.agent.v1.ImageService", "choiros.agent.v1.HostService"}
	for _, service := range services {
		eventually(t, service+" serves", func() bool {
			answer, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{Service: service})
			return err == nil && answer.GetStatus() == healthpb.HealthCheckResponse_SERVING
		})
	}
	stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&reflectionpb.ServerReflectionRequest{
		MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{},
	}); err != nil {
		t.Fatal(err)
	}
	answer, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	listed := answer.GetListServicesResponse().String()
	for _, service := range services[1:] {
		if !strings.Contains(listed, service) {
			t.Errorf("%s is not among %s", service, listed)
		}
	}
}

func TestPanicIsOneRequestsOnly(t *testing.T) {
	t.Parallel()
	var log logged
	shelf, agent := newShelf(t, agentOptions{Log: &log})
	c := dial(t, agent)
	shelf.images = []sandbox.Image{{ID: "sha256:panic"}}
	_, err := c.images.ListImages(t.Context(), &agentv1.ListImagesRequest{})
	wantError(t, err, codes.Internal, "INTERNAL", "")
	for _, text := range []string{"level=ERROR", "the shelf broke", "images_test.go"} {
		if !log.contains(text) {
			t.Errorf("the log does not have %s", text)
		}
	}
	if _, err := c.host.GetInfo(t.Context(), &agentv1.GetInfoRequest{}); err != nil {
		t.Errorf("the next request: %v", err)
	}
}

func TestShutdownEndsStreamsAndLeavesSandboxes(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{Drivers: processes(t)})
	c := dial(t, agent)
	mustCreate(t, c, "a", process.Spec("ready-after", "0s", filepath.Join(t.TempDir(), "ready")), true)
	watch, err := c.sandboxes.WatchSandboxes(t.Context(), &agentv1.WatchSandboxesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	logs, err := c.sandboxes.StreamSandboxLogs(t.Context(), &agentv1.StreamSandboxLogsRequest{Name: "a", Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	for synced := false; !synced; {
		event, err := watch.Recv()
		if err != nil {
			t.Fatal(err)
		}
		synced = event.GetSync() != nil
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	agent.Server.Shutdown(ctx)
	if ctx.Err() != nil {
		t.Error("shutdown waited for streams that never end by themselves")
	}
	for err = nil; err == nil; {
		_, err = watch.Recv()
	}
	wantError(t, err, codes.Unavailable, "AGENT_STOPPING", "")
	for err = nil; err == nil; {
		_, err = logs.Recv()
	}
	wantError(t, err, codes.Unavailable, "AGENT_STOPPING", "")
	sb, err := agent.Manager.Sandbox(t.Context(), "a")
	if err != nil || sb.Phase != "ready" {
		t.Errorf("sandbox = %+v, %v", sb, err)
	}
	if err := agent.Manager.Delete(t.Context(), "a", 0, false, storeRequest()); err != nil {
		t.Error(err)
	}
}

func TestDeadlinesAndCancellation(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{Drivers: processes(t)})
	c := dial(t, agent)
	mustCreate(t, c, "slow", slowSpec(t, "5s"), false)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := c.sandboxes.StartSandbox(ctx, &agentv1.StartSandboxRequest{Name: "slow"})
	wantCode(t, err, codes.DeadlineExceeded)
	// The caller's leaving ended nothing.
	eventually(t, "the boot goes on", func() bool {
		sb, err := c.sandboxes.GetSandbox(t.Context(), &agentv1.GetSandboxRequest{Name: "slow"})
		return err == nil && sb.GetSandbox().GetStatus().GetPhase() == agentv1.Phase_PHASE_STARTING
	})
	if _, err := c.sandboxes.DeleteSandbox(t.Context(), &agentv1.DeleteSandboxRequest{Name: "slow"}); err != nil {
		t.Error(err)
	}
}

func TestMessagesHaveABound(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{Drivers: processes(t)})
	c := dial(t, agent)
	_, err := c.sandboxes.GetSandbox(t.Context(), &agentv1.GetSandboxRequest{Name: strings.Repeat("a", 3<<20)})
	wantCode(t, err, codes.ResourceExhausted)
	_, err = c.sandboxes.GetSandbox(t.Context(), &agentv1.GetSandboxRequest{Name: strings.Repeat("é", 1<<19)})
	if s := wantError(t, err, codes.InvalidArgument, "INVALID", "name"); len(s.Message()) > 5000 {
		t.Errorf("the message is %d bytes long", len(s.Message()))
	}
}

func recvAll[T any](t *testing.T, recv func() (T, error)) []T {
	t.Helper()
	var all []T
	for {
		one, err := recv()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, one)
	}
}
