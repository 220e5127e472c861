package server_test

import (
	"errors"
	"io"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

// plain is a driver that can do nothing beyond the basics.
type plain struct{ sandbox.Driver }

func plainProcesses(t *testing.T) func(owner string) map[string]sandbox.Driver {
	t.Helper()
	drivers := processes(t)
	return func(owner string) map[string]sandbox.Driver {
		return map[string]sandbox.Driver{process.Name: plain{drivers(owner)[process.Name]}}
	}
}

func TestPauseOverTheAPI(t *testing.T) {
	t.Parallel()
	conn := insider(t, nil)
	c := clientsOf(conn)
	watch, err := c.sandboxes.WatchSandboxes(t.Context(), &agentv1.WatchSandboxesRequest{Name: "web"})
	if err != nil {
		t.Fatal(err)
	}
	await := func(phase agentv1.Phase, reason string) {
		t.Helper()
		for {
			event, err := watch.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if s := event.GetChanged().GetStatus(); s.GetPhase() == phase && s.GetReason() == reason {
				return
			}
		}
	}
	await(agentv1.Phase_PHASE_READY, "")
	pause := func(id string) *agentv1.Sandbox {
		t.Helper()
		answer, err := c.sandboxes.PauseSandbox(t.Context(), &agentv1.PauseSandboxRequest{Name: "web", RequestId: id})
		if err != nil {
			t.Fatal(err)
		}
		return answer.GetSandbox()
	}
	sb := pause("one")
	if s := sb.GetStatus(); s.GetPhase() != agentv1.Phase_PHASE_PAUSED || s.GetReason() != "PAUSED" || s.GetGeneration() != 1 ||
		sb.GetDesiredState() != agentv1.DesiredState_DESIRED_STATE_RUNNING {
		t.Errorf("paused: %v", sb)
	}
	await(agentv1.Phase_PHASE_PAUSED, "PAUSED")
	resumed, err := c.sandboxes.ResumeSandbox(t.Context(), &agentv1.ResumeSandboxRequest{Name: "web", RequestId: "two"})
	if s := resumed.GetSandbox().GetStatus(); err != nil || s.GetPhase() != agentv1.Phase_PHASE_READY || s.GetGeneration() != 1 {
		t.Errorf("resumed: %v, %v", resumed, err)
	}
	await(agentv1.Phase_PHASE_READY, "")
	// A retry is the request that was answered, and not a pause.
	if kept := pause("one"); kept.GetVersion() != sb.GetVersion() {
		t.Errorf("the retry was answered with %v, not with %v", kept, sb)
	}
	if sb, err := c.sandboxes.GetSandbox(t.Context(), &agentv1.GetSandboxRequest{Name: "web"}); err != nil || sb.GetSandbox().GetStatus().GetPhase() != agentv1.Phase_PHASE_READY {
		t.Errorf("after the retry: %v, %v", sb, err)
	}
	pause("")
	r, err := exec(t, conn, &agentv1.ExecStart{Command: []string{"sh", "-c", "echo on"}, NoStdin: true}, nil)
	if err != nil || r.stdout != "on\n" {
		t.Errorf("exec in one that is paused: %+v, %v", r, err)
	}
	if _, err := c.sandboxes.StopSandbox(t.Context(), &agentv1.StopSandboxRequest{Name: "web"}); err != nil {
		t.Fatal(err)
	}
	_, err = c.sandboxes.PauseSandbox(t.Context(), &agentv1.PauseSandboxRequest{Name: "web"})
	wantError(t, err, codes.FailedPrecondition, "WRONG_STATE", "")
	_, err = c.sandboxes.ResumeSandbox(t.Context(), &agentv1.ResumeSandboxRequest{Name: "web"})
	wantError(t, err, codes.FailedPrecondition, "WRONG_STATE", "")
	_, err = c.sandboxes.PauseSandbox(t.Context(), &agentv1.PauseSandboxRequest{Name: "Web"})
	wantError(t, err, codes.InvalidArgument, "INVALID", "name")
	_, err = c.sandboxes.ResumeSandbox(t.Context(), &agentv1.ResumeSandboxRequest{Name: "nobody"})
	wantError(t, err, codes.NotFound, "NOT_FOUND", "")
}

func TestAbilitiesThatADriverLacks(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{Drivers: plainProcesses(t)})
	c := dial(t, agent)
	mustCreate(t, c, "a", process.Spec("sleep"), false)
	stream, err := c.sandboxes.AttachConsole(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(openConsole("a")); err != nil {
		t.Fatal(err)
	}
	_, console := stream.Recv()
	_, pause := c.sandboxes.PauseSandbox(t.Context(), &agentv1.PauseSandboxRequest{Name: "a"})
	_, resume := c.sandboxes.ResumeSandbox(t.Context(), &agentv1.ResumeSandboxRequest{Name: "a"})
	_, refusals := c.sandboxes.ListRefusals(t.Context(), &agentv1.ListRefusalsRequest{Name: "a"})
	for what, err := range map[string]error{"console": console, "pause": pause, "resume": resume, "refusals": refusals} {
		if s := wantError(t, err, codes.Unimplemented, "UNSUPPORTED", ""); !strings.Contains(s.Message(), "driver process") {
			t.Errorf("%s: %q does not name the driver", what, s.Message())
		}
	}
}

func openConsole(name string) *agentv1.AttachConsoleRequest {
	return &agentv1.AttachConsoleRequest{Message: &agentv1.AttachConsoleRequest_Open{Open: &agentv1.ConsoleOpen{Name: name}}}
}

func typed(text string) *agentv1.AttachConsoleRequest {
	return &agentv1.AttachConsoleRequest{Message: &agentv1.AttachConsoleRequest_Data{Data: []byte(text)}}
}

// attached is an open console, and what it has said so far.
type attached struct {
	agentv1.SandboxService_AttachConsoleClient
	said string
}

func attach(t *testing.T, c clients, name string) *attached {
	t.Helper()
	stream, err := c.sandboxes.AttachConsole(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(openConsole(name)); err != nil {
		t.Fatal(err)
	}
	answer, err := stream.Recv()
	if err != nil || answer.GetOpened().GetGeneration() != 1 {
		t.Fatalf("opened: %v, %v", answer, err)
	}
	return &attached{SandboxService_AttachConsoleClient: stream}
}

// until reads until the console has said a text.
func (a *attached) until(t *testing.T, text string) {
	t.Helper()
	for !strings.Contains(a.said, text) {
		answer, err := a.Recv()
		if err != nil {
			t.Fatalf("it said %q, and then: %v", a.said, err)
		}
		a.said += string(answer.GetData())
	}
}

func TestConsoleOverTheAPI(t *testing.T) {
	t.Parallel()
	c := clientsOf(insider(t, nil))
	first := attach(t, c, "web")
	if err := first.Send(typed("knock\n")); err != nil {
		t.Fatal(err)
	}
	first.until(t, "knock\n")
	second := attach(t, c, "web") // who sees what was said before
	second.until(t, "knock\n")
	if err := second.CloseSend(); err != nil { // and types no more
		t.Fatal(err)
	}
	if err := first.Send(typed("again\n")); err != nil {
		t.Fatal(err)
	}
	second.until(t, "again\n")
	sb, err := c.sandboxes.GetSandbox(t.Context(), &agentv1.GetSandboxRequest{Name: "web"})
	if err != nil {
		t.Fatal(err)
	}
	if last := sb.GetSandbox().GetStatus().GetLastActivityTime().AsTime(); last.Before(sb.GetSandbox().GetStatus().GetReadyTime().AsTime()) {
		t.Errorf("attached, and used last at %s", last)
	}
	if _, err := c.sandboxes.StopSandbox(t.Context(), &agentv1.StopSandboxRequest{Name: "web"}); err != nil {
		t.Fatal(err)
	}
	for _, a := range []*attached{first, second} {
		for err = nil; err == nil; {
			_, err = a.Recv()
		}
		if !errors.Is(err, io.EOF) {
			t.Errorf("its life has ended, and the console with %v", err)
		}
	}
}

func TestWrongRequestsToAConsole(t *testing.T) {
	t.Parallel()
	c := clientsOf(insider(t, nil))
	for _, test := range []struct {
		requests []*agentv1.AttachConsoleRequest
		code     codes.Code
		reason   string
		field    string
	}{
		{nil, codes.InvalidArgument, "INVALID", "open"},
		{[]*agentv1.AttachConsoleRequest{typed("x")}, codes.InvalidArgument, "INVALID", "open"},
		{[]*agentv1.AttachConsoleRequest{openConsole("")}, codes.InvalidArgument, "INVALID", "name"},
		{[]*agentv1.AttachConsoleRequest{openConsole("nobody")}, codes.NotFound, "NOT_FOUND", ""},
		{[]*agentv1.AttachConsoleRequest{openConsole("web"), openConsole("web")}, codes.InvalidArgument, "INVALID", "open"},
	} {
		stream, err := c.sandboxes.AttachConsole(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, req := range test.requests {
			_ = stream.Send(req) // Recv says why not
		}
		_ = stream.CloseSend()
		for err = nil; err == nil; {
			_, err = stream.Recv()
		}
		wantError(t, err, test.code, test.reason, test.field)
	}
}
