package main

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// guestBound is how long a call may take whose guest does not answer.
const guestBound = 25 * time.Second

// guestUnavailable checks that a call failed for its guest's sake.
func guestUnavailable(t *testing.T, what string, err error) {
	t.Helper()
	reason := ""
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			reason = info.GetReason()
		}
	}
	if status.Code(err) != codes.Unavailable || reason != "GUEST_UNAVAILABLE" {
		t.Errorf("%s: %s, %v", what, reason, err)
	}
}

// TestUsurpedGuestHarmsOnlyItself puts another socket into the place of
// guestd's, as anything inside can: one that echoes what it is sent, and one
// that never accepts. Child processes have no such place of their own.
func TestUsurpedGuestHarmsOnlyItself(t *testing.T) {
	t.Parallel()
	b := podmanBackend(t)
	for _, kind := range []string{"guest-echo", "guest-wedge"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			h := newCrashHost(t, b)
			h.start()
			h.create("good", h.served("good", 0))
			bad := h.create("bad", h.served("bad", 1))
			h.eventually("the agent is in touch with both", func() error {
				if h.get("bad").GetStatus().GetGuestdVersion() == "" {
					return errors.New("no version")
				}
				return nil
			})
			began := make(chan struct{})
			go func() {
				_, _ = runInside(t.Context(), h.conn, &agentv1.ExecStart{
					Name: "bad", Keep: true, Command: b.command(kind, "/run/choiros", "1024"),
				}, func(*agentv1.ExecStarted) { close(began) })
			}()
			<-began
			h.eventually("the socket is the workload's", func() error {
				if _, err := execs(h, "bad"); err == nil {
					return errors.New("guestd still answers")
				}
				return nil
			})
			// Both at once: the good one is not to wait for the bad one.
			ended := make(chan struct{})
			together(func() {
				callUsurped(t, h, endpoint(bad, h.guestPort(1)))
				close(ended)
			}, func() {
				for busy := true; busy; {
					within(t, 5*time.Second, "an exec in the good one", func() {
						if _, err := h.output("good", b.command("exit", "0")...); err != nil {
							t.Errorf("the good one: %v", err)
						}
					})
					select {
					case <-ended:
						busy = false
					case <-time.After(50 * time.Millisecond):
					}
				}
			})
			h.eventually("it is shown", func() error {
				if now := h.get("bad").GetStatus(); now.GetReason() != "GUEST_UNREACHABLE" {
					return errors.New(now.GetPhase().String() + " " + now.GetReason())
				}
				return nil
			})
			h.reach("good", endpoint(h.get("good"), h.guestPort(0)))
			within(t, guestBound, "stop", func() {
				if _, err := h.client().StopSandbox(t.Context(), &agentv1.StopSandboxRequest{Name: "bad"}); err != nil {
					t.Error(err)
				}
			})
			if now := h.get("bad").GetStatus(); now.GetPhase() != agentv1.Phase_PHASE_STOPPED || now.GetReason() == "GUEST_UNREACHABLE" {
				t.Errorf("stopped it is %s %s", now.GetPhase(), now.GetReason())
			}
			within(t, guestBound, "delete", func() { h.delete("bad") })
			h.delete("good")
		})
	}
}

// callUsurped does all that needs the guest, at once.
func callUsurped(t *testing.T, h *crashHost, address string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	bounded := func(what string, work func()) func() {
		return func() { within(t, guestBound, what, work) }
	}
	together(
		bounded("exec", func() {
			_, err := h.output("bad", "true")
			guestUnavailable(t, "exec", err)
		}),
		bounded("list execs", func() {
			_, err := execs(h, "bad")
			guestUnavailable(t, "list execs", err)
		}),
		bounded("stat", func() {
			_, err := agentv1.NewFileServiceClient(h.conn).StatFile(ctx, &agentv1.StatFileRequest{Name: "bad", Path: "/"})
			guestUnavailable(t, "stat", err)
		}),
		bounded("read", func() {
			stream, err := agentv1.NewFileServiceClient(h.conn).ReadFile(ctx, &agentv1.ReadFileRequest{Name: "bad", Path: "/workload"})
			if err == nil {
				_, err = stream.Recv()
			}
			guestUnavailable(t, "read", err)
		}),
		bounded("tunnel", func() {
			stream, err := agentv1.NewPortServiceClient(h.conn).Tunnel(ctx)
			if err == nil {
				_ = stream.Send(&agentv1.TunnelRequest{Message: &agentv1.TunnelRequest_Open{
					Open: &agentv1.TunnelOpen{Name: "bad", GuestPort: 80},
				}})
				_, err = stream.Recv()
			}
			guestUnavailable(t, "tunnel", err)
		}),
		bounded("push secrets", func() {
			_, err := agentv1.NewSecretServiceClient(h.conn).PushSecrets(ctx, &agentv1.PushSecretsRequest{Name: "bad", Force: true})
			if err != nil {
				t.Errorf("push secrets: %v", err)
			}
		}),
		bounded("connect", func() {
			conn, err := net.Dial("tcp", address)
			if errors.Is(err, syscall.ECONNRESET) {
				return // at once
			}
			if err != nil {
				t.Errorf("connect: %v", err)
				return
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(time.Minute))
			if data, err := io.ReadAll(conn); err == nil || len(data) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the forward says %q, %v", data, err)
			}
		}),
	)
}
