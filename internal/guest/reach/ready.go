//go:build linux

package reach

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

const (
	socketTimeout  = 5 * time.Second
	commandTimeout = time.Minute
	minInterval    = 10 * time.Millisecond
	// firstPause is that between the first probes.
	firstPause = 2 * time.Millisecond
	// maxNote is the longest message of a ProbeNote, in bytes.
	maxNote = 1 << 10
)

// probe is one way to find out whether the workload is ready.
type probe struct {
	// check returns nil if it is, or why it is not.
	check   func(ctx context.Context) error
	timeout time.Duration
	// patience: the pause after a probe is this fraction of the time waited so
	// far. A workload is seen that much late at most, and costly probes are few.
	patience time.Duration
}

// AwaitReady probes until the workload is ready.
func (s *Service) AwaitReady(ctx context.Context, conn *wire.Conn, call *guestv1.AwaitReady) error {
	probe, err := s.probe(call)
	if err != nil {
		return err
	}
	if err := conn.Send(&guestv1.Response{Protocol: wire.Protocol}); err != nil {
		return err
	}
	defer conn.Bind(ctx)()
	interval := max(time.Duration(call.GetIntervalMillis())*time.Millisecond, minInterval)
	start, last := time.Now(), ""
	for {
		err := probe.once(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err == nil {
			return conn.Send(&guestv1.ProbeNote{Ready: true})
		}
		if message := note(err); message != last {
			if err := conn.Send(&guestv1.ProbeNote{Message: message}); err != nil {
				return err
			}
			last = message
		}
		if err := pause(ctx, min(max(time.Since(start)/probe.patience, firstPause), interval)); err != nil {
			return err
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func (p probe) once(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	err := p.check(ctx)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("no answer within %v", p.timeout)
	}
	return err
}

// note is an error as a ProbeNote has it.
func note(err error) string {
	message := err.Error()
	return strings.ToValidUTF8(message[:min(len(message), maxNote)], "?")
}

func (s *Service) probe(call *guestv1.AwaitReady) (probe, error) {
	switch kind := call.GetProbe().(type) {
	case nil:
		return probe{check: func(context.Context) error { return nil }, timeout: socketTimeout, patience: 1}, nil
	case *guestv1.AwaitReady_Tcp:
		return tcpProbe(kind.Tcp.GetPort())
	case *guestv1.AwaitReady_Http:
		return httpProbe(kind.Http.GetPort(), kind.Http.GetPath())
	case *guestv1.AwaitReady_Exec:
		return s.execProbe(kind.Exec.GetCommand())
	default:
		return probe{}, failure(guestv1.Failure_CODE_UNIMPLEMENTED, "a probe of an unknown kind")
	}
}

func tcpProbe(number uint32) (probe, error) {
	port, err := validPort(number)
	if err != nil {
		return probe{}, err
	}
	check := func(ctx context.Context) error {
		conn, err := dialTCP(ctx, port)
		if err != nil {
			return connectError(port, err)
		}
		return conn.Close()
	}
	return probe{check, socketTimeout, 8}, nil
}

// connectError is what people are told of a port that is not there.
func connectError(port uint16, err error) error {
	if errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("nothing listens on port %d", port)
	}
	return err
}

func (s *Service) execProbe(command []string) (probe, error) {
	if len(command) == 0 {
		return probe{}, failure(guestv1.Failure_CODE_INVALID, "an exec probe needs a command")
	}
	check := func(ctx context.Context) error {
		code, err := s.run(ctx, command)
		if err == nil && code != 0 {
			err = fmt.Errorf("exit status %d", code)
		}
		return err
	}
	return probe{check, commandTimeout, 2}, nil
}
