package main

import (
	"context"
	"errors"
	"fmt"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// errNoWait is the cause of leaving a start that --no-wait asked to leave.
var errNoWait = errors.New("not waiting")

// leftError is a call that was left while the agent works on. by says why.
type leftError struct {
	name string
	by   error
	last *agentv1.Sandbox // as last seen; may be nil
}

func (e *leftError) Error() string {
	return fmt.Sprintf("%s: %s; the agent goes on with it", e.name, e.by)
}

func (e *leftError) Unwrap() error { return e.by }

// await makes a call that boots a sandbox, showing what the agent reports of
// it meanwhile. When ctx ends first, or (with noWait) as soon as a boot after
// generation was recorded, it returns a *leftError.
func (a *app) await(ctx context.Context, c *client, name string, generation uint64, noWait bool, call func(context.Context) (*agentv1.Sandbox, error)) (*agentv1.Sandbox, error) {
	inner, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	shown := a.newProgress(name)
	shown.say("waiting for the agent", false)
	var last *agentv1.Sandbox
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		last = follow(inner, c, name, func(sb *agentv1.Sandbox) {
			phase := sb.GetStatus().GetPhase()
			if phase != agentv1.Phase_PHASE_READY && phase != agentv1.Phase_PHASE_STOPPED &&
				phase != agentv1.Phase_PHASE_PAUSED && phase != agentv1.Phase_PHASE_HIBERNATED {
				shown.say(progressText(sb), true)
			}
			if noWait && sb.GetStatus().GetGeneration() > generation && phase != agentv1.Phase_PHASE_CREATING {
				leave(errNoWait)
			}
		})
	}()
	sb, err := call(inner)
	left := context.Cause(inner)
	leave(nil)
	<-watched
	shown.stop()
	if err != nil && left != nil && (errors.Is(err, left) || errors.Is(left, errNoWait)) {
		return nil, withHint(&leftError{name, left, last}, "agentctl sandbox watch %s", name)
	}
	return sb, err
}

// follow calls see for each state of a sandbox until ctx ends, and returns the
// last. It is for show: if the agent does not let it watch, it just returns.
func follow(ctx context.Context, c *client, name string, see func(*agentv1.Sandbox)) (last *agentv1.Sandbox) {
	stream, err := c.sandboxes.WatchSandboxes(ctx, &agentv1.WatchSandboxesRequest{Name: name})
	if err != nil {
		return nil
	}
	synced := false
	for {
		event, err := stream.Recv()
		if err != nil {
			return last
		}
		synced = synced || event.GetSync() != nil
		if sb := event.GetChanged(); sb != nil {
			last = sb
			phase := sb.GetStatus().GetPhase()
			// Before the sync marker it may be how the last life ended.
			if synced || phase == agentv1.Phase_PHASE_CREATING || phase == agentv1.Phase_PHASE_STARTING {
				see(sb)
			}
		}
	}
}

func progressText(sb *agentv1.Sandbox) string {
	text := phaseName(sb.GetStatus().GetPhase())
	if message := sb.GetStatus().GetMessage(); message != "" {
		text += ": " + message
	}
	return text
}
