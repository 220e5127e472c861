package container

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/containers/podman/v5/libpod/define"
	"github.com/containers/podman/v5/pkg/api/handlers"
	"github.com/containers/podman/v5/pkg/bindings"
	"github.com/containers/podman/v5/pkg/bindings/containers"
	"github.com/docker/docker/api/types/container"

	"github.com/choiros/agent/internal/sandbox"
)

// execLimit is how long a readiness command may run.
const execLimit = time.Hour

// ProbeExec implements sandbox.Prober. As in a shell, 127 stands for a command
// that is not there and 126 for one that cannot be executed.
func (d *Driver) ProbeExec(ctx context.Context, ref sandbox.Ref, command []string) (int, error) {
	code, err := d.probeExec(ctx, ref, command)
	return code, op("run a command in", ref.ID, err)
}

func (d *Driver) probeExec(ctx context.Context, ref sandbox.Ref, command []string) (int, error) {
	data, _, err := d.inspect(ctx, ref.ID)
	if err == nil && data == nil {
		err = d.whyAbsent(ctx, ref.ID)
	}
	if err != nil {
		return 0, err
	}
	if observation(data.State).State != sandbox.StateRunning {
		return 0, fmt.Errorf("%w: it does not run", sandbox.ErrState)
	}
	var session string
	err = d.call(ctx, readLimit, func(ctx context.Context) (err error) {
		session, err = containers.ExecCreate(ctx, data.ID, &handlers.ExecCreateConfig{
			ExecOptions: container.ExecOptions{Cmd: command, AttachStdout: true, AttachStderr: true},
		})
		return err
	})
	if err != nil {
		return 0, err
	}
	// The command is not left to Podman when ctx ends, for it would run on. It
	// is watched to its end, and then all that it leaves is removed.
	result := make(chan execResult, 1)
	d.background.Go(func() {
		detached, over := context.WithoutCancel(ctx), make(chan struct{})
		d.background.Go(func() { d.breakOff(ctx, session, over) })
		code, err := d.runExec(detached, session)
		close(over)
		result <- execResult{code, err}
		d.dropExec(detached, session)
	})
	select {
	case r := <-result:
		return r.code, r.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

type execResult struct {
	code int
	err  error
}

// runExec runs a session's command and returns its exit status.
func (d *Driver) runExec(ctx context.Context, session string) (int, error) {
	err := d.call(ctx, execLimit, func(ctx context.Context) error { return startExec(ctx, session) })
	switch {
	case caused(err, define.ErrOCIRuntimeNotFound):
		return 127, nil
	case caused(err, define.ErrOCIRuntimePermissionDenied):
		return 126, nil
	case err != nil:
		return 0, err
	}
	var result *define.InspectExecSession
	err = d.call(ctx, readLimit, func(ctx context.Context) (err error) {
		result, err = containers.ExecInspect(ctx, session, nil)
		return err
	})
	if isNotFound(err) {
		// The sandbox ended, and its sessions with it.
		return 0, fmt.Errorf("%w: it does not run", sandbox.ErrState)
	}
	if err != nil {
		return 0, err
	}
	return result.ExitCode, nil
}

// startExec runs a session to its end. The bindings' ExecStart does not wait,
// and their ExecStartAndAttach replaces the transport of all other calls.
func startExec(ctx context.Context, session string) error {
	conn, err := bindings.GetClient(ctx)
	if err != nil {
		return err
	}
	resp, err := conn.DoRequest(ctx, strings.NewReader(`{"Detach":false,"Tty":false}`),
		http.MethodPost, "/exec/%s/start", nil, http.Header{"Content-Type": {"application/json"}}, session)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if !resp.IsSuccess() {
		return resp.Process(nil)
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// breakOff kills a session's command if ctx ends before it.
func (d *Driver) breakOff(ctx context.Context, session string, over <-chan struct{}) {
	select {
	case <-over:
		return
	case <-ctx.Done():
	}
	// Podman may only just be starting it.
	for range maxTries {
		killChildren(monitorsOf(session))
		select {
		case <-over:
			return
		case <-time.After(tryPause):
		}
	}
	// Another user's, or in a virtual machine. Podman can, after ten seconds.
	_ = d.removeExec(context.WithoutCancel(ctx), session)
}

// dropExec removes a session that is over, and what would stay behind of it:
// Podman has its monitors sleep for five minutes after each, for somebody to
// come and ask (exit_command_delay of containers.conf). At five probes a second
// that is a crowd.
func (d *Driver) dropExec(ctx context.Context, session string) {
	// If it cannot be removed it goes with its sandbox.
	_ = d.removeExec(ctx, session)
	kill(monitorsOf(session))
}

func (d *Driver) removeExec(ctx context.Context, session string) error {
	return d.call(ctx, readLimit, func(ctx context.Context) error {
		return containers.ExecRemove(ctx, session, new(containers.ExecRemoveOptions).WithForce(true))
	})
}
