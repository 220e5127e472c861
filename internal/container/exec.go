package container

import (
	"context"
	"errors"
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
	err = d.call(ctx, execLimit, func(ctx context.Context) error { return startExec(ctx, session) })
	broken := err != nil
	// In the background, for it is of no interest to who asks.
	defer d.background.Go(func() { d.dropExec(context.WithoutCancel(ctx), session, broken) })
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

// dropExec removes a session, and what would stay behind of it: Podman has its
// monitors sleep for five minutes after each, for somebody to come and ask
// (exit_command_delay of containers.conf). At five probes a second that is a
// crowd. A session that was broken off may still be starting, or running its
// command.
func (d *Driver) dropExec(ctx context.Context, session string, broken bool) {
	for tries := 0; ; tries++ {
		if broken {
			// Podman would give the command ten seconds to end by itself.
			killChildren(monitorsOf(session))
		}
		err := d.call(ctx, readLimit, func(ctx context.Context) error {
			return containers.ExecRemove(ctx, session, new(containers.ExecRemoveOptions).WithForce(true))
		})
		if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
			return // it goes with its sandbox
		}
		monitors := monitorsOf(session)
		kill(monitors)
		// Podman may only just have begun to start it.
		if !broken || len(monitors) == 0 && tries > 3 || tries == maxTries {
			return
		}
		if pause(ctx, tryPause) != nil {
			return
		}
	}
}
