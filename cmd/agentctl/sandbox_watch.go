package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

func (a *app) sandboxWatch() *cobra.Command {
	selector := ""
	cmd := &cobra.Command{
		Use:   "watch [NAME]",
		Short: "Print every change of a sandbox, or of all, as it happens",
		Long: `Print the sandboxes as they are, and then every change as it happens, until
Ctrl-C. If the agent restarts meanwhile, it goes on where it stopped and misses
nothing. With -o json, each step of the API's stream is a line of JSON.`,
		Example:           "  agentctl sandbox watch\n  agentctl sandbox watch web\n  agentctl sandbox watch -o json -l tier=web",
		Args:              atMost(1),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &agentv1.WatchSandboxesRequest{LabelSelector: selector}
			if len(args) > 0 {
				req.Name = args[0]
			}
			return a.watch(cmd.Context(), req)
		},
	}
	cmd.Flags().StringVarP(&selector, "selector", "l", "", "only those with these labels: `key=value,key!=value,key,!key`")
	return cmd
}

// watch prints changes until ctx ends. A connection that drops is made again,
// for as long as it takes, and the stream resumed.
func (a *app) watch(ctx context.Context, req *agentv1.WatchSandboxesRequest) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	pause := 100 * time.Millisecond
	noted := false
	for {
		err := a.copyEvents(ctx, c, req, func() {
			if noted {
				a.notef("connected again")
			}
			noted, pause = false, 100*time.Millisecond
		})
		connected, _ := c.link.state()
		if !lost(err) && !errors.Is(err, io.EOF) || !connected {
			return c.link.explain(ctx, err)
		}
		if !noted {
			a.notef("the connection to the agent was lost; connecting again")
			noted = true
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
		pause = min(2*pause, 5*time.Second)
	}
}

// copyEvents prints one stream's events, keeping in req where to resume.
// began is called at the first.
func (a *app) copyEvents(ctx context.Context, c *client, req *agentv1.WatchSandboxesRequest, began func()) error {
	stream, err := c.sandboxes.WatchSandboxes(ctx, req)
	if err != nil {
		return err
	}
	for empty := true; ; {
		event, err := stream.Recv()
		if err != nil {
			return err
		}
		began()
		if event.GetSync() != nil && empty && req.GetName() != "" {
			a.notef("there is no sandbox %s yet; waiting for it", req.GetName())
		}
		empty = empty && event.GetChanged() == nil
		if event.GetReset_() != nil {
			req.ResumeVersion = ""
		} else if event.GetVersion() != "" {
			req.ResumeVersion = event.GetVersion()
		}
		if err := a.printChange(event); err != nil {
			return err
		}
	}
}

func (a *app) printChange(event *agentv1.WatchSandboxesResponse) error {
	if a.forPrograms() {
		return a.printEvent(event)
	}
	now := time.Now()
	clock := a.out.dim(now.Format(time.TimeOnly))
	switch e := event.GetEvent().(type) {
	case *agentv1.WatchSandboxesResponse_Changed:
		sb := e.Changed
		text := phasePaint(a.out, sb.GetStatus().GetPhase())(phaseText(sb, now))
		if n := sb.GetStatus().GetGeneration(); n > 0 {
			text += fmt.Sprintf(" generation %d", n)
		}
		if ports := portsText(sb.GetStatus()); ports != "" {
			text += " ports " + ports
		}
		if detected := sb.GetStatus().GetDetectedPorts(); len(detected) > 0 {
			var found []string
			for _, d := range detected {
				found = append(found, oneLine(detectedText(d)))
			}
			text += " listens on " + strings.Join(found, ", ")
		}
		if exit := sb.GetStatus().GetExit(); exit.GetSignal() != "" && sb.GetStatus().GetPhase() == agentv1.Phase_PHASE_BACKOFF {
			text += " after " + exit.GetSignal()
		}
		if message := sb.GetStatus().GetMessage(); message != "" {
			text += ": " + oneLine(message)
		}
		_, err := fmt.Fprintf(a.stdout, "%s  %s  %s\n", clock, a.out.bold(sb.GetName()), text)
		return err
	case *agentv1.WatchSandboxesResponse_Deleted:
		_, err := fmt.Fprintf(a.stdout, "%s  %s  deleted\n", clock, a.out.bold(e.Deleted.GetName()))
		return err
	case *agentv1.WatchSandboxesResponse_Reset_:
		a.notef("some changes were missed; this is how things are now")
	}
	return nil
}
