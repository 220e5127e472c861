package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

func (a *app) sandboxCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "sandbox",
		Aliases: []string{"sb"},
		Short:   "Make, start, stop, watch and delete sandboxes",
		Example: `  agentctl sandbox start --image docker.io/library/alpine:3 -- sleep infinity
  agentctl sandbox list
  agentctl sandbox logs -f web
  agentctl sandbox delete web`,
	}
	cmd.AddCommand(a.sandboxStart(), a.sandboxStop(), a.sandboxRestart(), a.sandboxDelete(), a.sandboxList(),
		a.sandboxPause(), a.sandboxResume(), a.sandboxHibernate(), a.sandboxShow(), a.sandboxLogs(), a.sandboxWatch(), a.sandboxExec(),
		a.sandboxShell(), a.sandboxConsole(), a.sandboxCopy(), a.sandboxUpdate(), a.sandboxTouch())
	return cmd
}

// sandbox returns one sandbox as it is now.
func (c *client) sandbox(ctx context.Context, name string) (*agentv1.Sandbox, error) {
	ctx, cancel := quick(ctx)
	defer cancel()
	answer, err := c.sandboxes.GetSandbox(ctx, &agentv1.GetSandboxRequest{Name: name})
	return answer.GetSandbox(), err
}

// list returns all sandboxes that a selector selects, page by page.
func (c *client) list(ctx context.Context, selector string) ([]*agentv1.Sandbox, error) {
	ctx, cancel := quick(ctx)
	defer cancel()
	var all []*agentv1.Sandbox
	for token := ""; ; {
		answer, err := c.sandboxes.ListSandboxes(ctx, &agentv1.ListSandboxesRequest{LabelSelector: selector, PageToken: token})
		if err != nil {
			return nil, err
		}
		all = append(all, answer.GetSandboxes()...)
		if token = answer.GetNextPageToken(); token == "" {
			return all, nil
		}
	}
}

// graceFlag is --grace; the API tells absent from zero.
type graceFlag struct{ text string }

func (g *graceFlag) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&g.text, "grace", "", "`duration` between SIGTERM and SIGKILL; 0s kills at once (default 10s)")
}

func (g *graceFlag) value(cmd *cobra.Command) (*durationpb.Duration, error) {
	if !cmd.Flags().Changed("grace") {
		return nil, nil
	}
	d, err := parseDuration(g.text)
	if err != nil {
		return nil, usagef(cmd, "--grace: %s", err)
	}
	return durationpb.New(d), nil
}

func (a *app) sandboxStop() *cobra.Command {
	grace := &graceFlag{}
	cmd := &cobra.Command{
		Use:               "stop NAME...",
		Short:             "Stop sandboxes; they keep their data and can be started again",
		Long:              "Stop sandboxes: SIGTERM, the grace period, SIGKILL. Stopping one that is stopped\nsucceeds. Data, workspace and settings stay.",
		Example:           "  agentctl sandbox stop web\n  agentctl sandbox stop web worker --grace 1m",
		Args:              atLeastOne("NAME"),
		ValidArgsFunction: a.completeNames(-1),
		RunE: func(cmd *cobra.Command, names []string) error {
			wait, err := grace.value(cmd)
			if err != nil {
				return err
			}
			return a.each(cmd.Context(), names, "stopped", func(ctx context.Context, c *client, name string) (any, error) {
				answer, err := c.sandboxes.StopSandbox(ctx, &agentv1.StopSandboxRequest{Name: name, Grace: wait, RequestId: requestID()})
				return answer.GetSandbox(), err
			})
		},
	}
	grace.register(cmd)
	return cmd
}

func (a *app) sandboxRestart() *cobra.Command {
	grace := &graceFlag{}
	cmd := &cobra.Command{
		Use:               "restart NAME...",
		Short:             "Stop sandboxes if they run, and boot them anew",
		Long:              "Stop sandboxes if they run, boot them, and wait until they are ready. It is always\na new generation.",
		Example:           "  agentctl sandbox restart web\n  agentctl sandbox restart web --grace 0s",
		Args:              atLeastOne("NAME"),
		ValidArgsFunction: a.completeNames(-1),
		RunE: func(cmd *cobra.Command, names []string) error {
			wait, err := grace.value(cmd)
			if err != nil {
				return err
			}
			return a.each(cmd.Context(), names, "is ready", func(ctx context.Context, c *client, name string) (any, error) {
				answer, err := c.sandboxes.RestartSandbox(ctx, &agentv1.RestartSandboxRequest{Name: name, Grace: wait, RequestId: requestID()})
				return answer.GetSandbox(), err
			})
		},
	}
	grace.register(cmd)
	return cmd
}

// deleted is what `delete` prints of each sandbox for programs.
type deleted struct {
	Name    string `json:"name"`
	Deleted bool   `json:"deleted"`
}

func (a *app) sandboxDelete() *cobra.Command {
	grace, force := &graceFlag{}, false
	cmd := &cobra.Command{
		Use:               "delete NAME...",
		Aliases:           []string{"rm"},
		Short:             "Stop sandboxes and remove them",
		Long:              "Stop sandboxes and remove them and what they wrote inside themselves. Folders that\nwere mounted (workspace, data) are never touched. It does not ask.",
		Example:           "  agentctl sandbox delete web\n  agentctl sandbox delete web worker --force --grace 0s",
		Args:              atLeastOne("NAME"),
		ValidArgsFunction: a.completeNames(-1),
		RunE: func(cmd *cobra.Command, names []string) error {
			wait, err := grace.value(cmd)
			if err != nil {
				return err
			}
			return a.each(cmd.Context(), names, "deleted", func(ctx context.Context, c *client, name string) (any, error) {
				_, err := c.sandboxes.DeleteSandbox(ctx, &agentv1.DeleteSandboxRequest{
					Name: name, Grace: wait, AllowMissing: force, RequestId: requestID(),
				})
				return deleted{name, true}, err
			})
		},
	}
	grace.register(cmd)
	cmd.Flags().BoolVarP(&force, "force", "f", false, "succeed also if there is no such sandbox")
	return cmd
}

// maxAtOnce is how many sandboxes one command works on at a time.
const maxAtOnce = 8

// each does something to each sandbox, several at a time, and tells the
// outcomes in the order of the names. One's failure does not keep the others.
func (a *app) each(ctx context.Context, names []string, done string, act func(context.Context, *client, string) (any, error)) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	type outcome struct {
		value any
		err   error
		ended chan struct{}
	}
	outcomes := make([]outcome, len(names))
	var all sync.WaitGroup
	slots := make(chan struct{}, maxAtOnce)
	subject := names[0]
	if len(names) > 1 {
		subject = fmt.Sprintf("%d sandboxes", len(names))
	}
	shown := a.newProgress(subject)
	shown.say("waiting for the agent", false)
	for i, name := range names {
		outcomes[i].ended = make(chan struct{})
		all.Go(func() {
			defer close(outcomes[i].ended)
			slots <- struct{}{}
			defer func() { <-slots }()
			outcomes[i].value, outcomes[i].err = act(ctx, c, name)
		})
	}
	all.Wait()
	shown.stop()

	values, failures := []any{}, []error{}
	for i, name := range names {
		switch o := outcomes[i]; {
		case o.err != nil:
			failures = append(failures, left(ctx, name, o.err))
		case a.forPrograms():
			values = append(values, o.value)
		case !a.quiet:
			fmt.Fprintln(a.stdout, name, done)
		}
	}
	if a.forPrograms() {
		if err := a.print(values); err != nil {
			return err
		}
	}
	return a.reportAll(ctx, failures, len(names))
}

// left says of a call that its caller's leaving ended that the agent goes on.
func left(ctx context.Context, name string, err error) error {
	if cause := context.Cause(ctx); cause != nil && errors.Is(err, cause) {
		return withHint(&leftError{name: name, by: cause}, "agentctl sandbox show %s", name)
	}
	return err
}

// reportAll reports failures of one command for several sandboxes. If there is
// but one to report, it is the command's own.
func (a *app) reportAll(ctx context.Context, failures []error, of int) error {
	if len(failures) == 0 {
		return nil
	}
	if of == 1 {
		return failures[0]
	}
	status := exitStatus(failures[0])
	for _, err := range failures {
		a.printError(err)
		if exitStatus(err) != status {
			status = exitFailed
		}
	}
	err := errors.Join(failures...)
	if sig := (interrupted{}); errors.As(context.Cause(ctx), &sig) {
		status = exitSignal + int(sig.signal)
	}
	return &reported{err, status}
}

func (a *app) sandboxUpdate() *cobra.Command {
	var labels []string
	var idle string
	cmd := &cobra.Command{
		Use:   "update NAME",
		Short: "Change a sandbox's labels or when it counts as idle",
		Long: `Change what can be changed of a sandbox that exists: its labels and its idle
policy. ("agentctl egress set" changes what it may connect to.) For anything else,
delete it and start it anew.`,
		Example: `  agentctl sandbox update web --label tier=web --label old-
  agentctl sandbox update web --idle 2h
  agentctl sandbox update web --idle off`,
		Args:              exactly("NAME"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			req := &agentv1.UpdateSandboxRequest{
				Sandbox: &agentv1.Sandbox{Name: args[0]}, UpdateMask: &fieldmaskpb.FieldMask{}, RequestId: requestID(),
			}
			if cmd.Flags().Changed("idle") {
				policy, err := parseIdle(idle)
				if err != nil {
					return usagef(cmd, "--idle: %s", err)
				}
				req.Sandbox.Spec = &agentv1.SandboxSpec{Idle: policy}
				req.UpdateMask.Paths = append(req.UpdateMask.Paths, "spec.idle")
			}
			if len(labels) > 0 {
				changes, err := parseLabelChanges(labels)
				if err != nil {
					return usagef(cmd, "--label: %s", err)
				}
				// The API replaces labels as a whole.
				sb, err := c.sandbox(cmd.Context(), args[0])
				if err != nil {
					return err
				}
				req.Sandbox.Labels = changes.apply(sb.GetLabels())
				req.UpdateMask.Paths = append(req.UpdateMask.Paths, "labels")
			}
			if len(req.GetUpdateMask().GetPaths()) == 0 {
				return usagef(cmd, "nothing to change: give --label or --idle")
			}
			ctx, cancel := quick(cmd.Context())
			defer cancel()
			answer, err := c.sandboxes.UpdateSandbox(ctx, req)
			if err != nil {
				return err
			}
			return a.confirm(answer.GetSandbox(), args[0]+" updated")
		},
	}
	cmd.Flags().StringArrayVarP(&labels, "label", "l", nil, "`KEY=VALUE` to set, or KEY- to take away")
	cmd.Flags().StringVar(&idle, "idle", "", "`duration[:stop|hibernate]` of idleness after which to stop it, or off")
	return cmd
}

func (a *app) sandboxTouch() *cobra.Command {
	return &cobra.Command{
		Use:               "touch NAME...",
		Short:             "Count sandboxes as used just now",
		Long:              "Count sandboxes as used just now, so that they do not become idle.",
		Example:           "  agentctl sandbox touch web",
		Args:              atLeastOne("NAME"),
		ValidArgsFunction: a.completeNames(-1),
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.each(cmd.Context(), names, "touched", func(ctx context.Context, c *client, name string) (any, error) {
				ctx, cancel := quick(ctx)
				defer cancel()
				answer, err := c.sandboxes.TouchSandbox(ctx, &agentv1.TouchSandboxRequest{Name: name, RequestId: requestID()})
				return struct {
					Name             string    `json:"name"`
					LastActivityTime time.Time `json:"last_activity_time"`
				}{name, answer.GetLastActivityTime().AsTime()}, err
			})
		},
	}
}

// confirm prints the outcome of a command: the message for programs, a line
// for people.
func (a *app) confirm(value any, line string) error {
	if a.forPrograms() {
		return a.print(value)
	}
	if a.quiet {
		return nil
	}
	_, err := fmt.Fprintln(a.stdout, line)
	return err
}

// labelChanges are labels to set, and those to take away.
type labelChanges struct {
	set  map[string]string
	drop []string
}

func parseLabelChanges(list []string) (labelChanges, error) {
	changes := labelChanges{set: map[string]string{}}
	for _, s := range list {
		if key, ok := dropped(s); ok {
			changes.drop = append(changes.drop, key)
		} else if err := setPair(changes.set, s); err != nil {
			return changes, fmt.Errorf("%q is neither KEY=VALUE nor KEY-", s)
		}
	}
	return changes, nil
}

// dropped reads KEY-, a label to take away.
func dropped(s string) (key string, ok bool) {
	key, ok = strings.CutSuffix(s, "-")
	return key, ok && key != "" && !strings.Contains(key, "=")
}

func (c labelChanges) apply(to map[string]string) map[string]string {
	labels := maps.Clone(to)
	if labels == nil {
		labels = map[string]string{}
	}
	for _, key := range c.drop {
		delete(labels, key)
	}
	maps.Copy(labels, c.set)
	return labels
}
