package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

const startLong = `Start a sandbox: make it if there is none of its name, boot it, and wait until
it is ready.

With no flags it does what ./sandbox.yaml says; flags override the file. Without
a name it is called what the file says, otherwise what the folder is called.

The folder (the file's, or the current one) is the sandbox's workspace, mounted
READ-WRITE at /workspace: what runs inside can change and delete your files
there. "--workspace .:ro" protects them, "--no-workspace" leaves them out.

A sandbox that exists is started as it was made; nothing else given here is
applied to it. Ctrl-C stops the waiting, not the start.

Where no agent runs, it asks on a terminal whether to start one.`

const startExample = `  agentctl sandbox start                            # as ./sandbox.yaml says
  agentctl sandbox start --image docker.io/library/node:22 -- node server.js
  agentctl sandbox start web -f deploy/sandbox.yaml --memory 2g --cpus 1.5
  agentctl sandbox start db --no-workspace --data ~/db:/var/lib/db --image localhost/db \
      --ready-exec 'test -S /run/db.sock' --restart on-failure:5 --idle 30m`

func (a *app) sandboxStart() *cobra.Command {
	f := &startFlags{}
	cmd := &cobra.Command{
		Use:     "start [NAME] [flags] [-- COMMAND ARGS...]",
		Short:   "Make a sandbox if needed, boot it, and wait until it is ready",
		Long:    startLong,
		Example: startExample,
		Args: func(cmd *cobra.Command, args []string) error {
			names := len(args)
			if dash := cmd.ArgsLenAtDash(); dash >= 0 {
				names = dash
			}
			if names > 1 {
				return fmt.Errorf("takes one NAME, not %d; a command comes after --", names)
			}
			return nil
		},
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, asked, err := f.define(cmd, args, a.getenv)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			if err := a.needAgent(cmd.Context(), cmd, c, f.startAgent); err != nil {
				return err
			}
			return a.start(cmd.Context(), c, f, d, asked)
		},
	}
	f.register(cmd)
	return cmd
}

func (a *app) start(ctx context.Context, c *client, f *startFlags, d *definition, asked bool) error {
	values, err := a.inlineValues(ctx, d.inline)
	if err != nil {
		return err
	}
	existing, err := c.sandbox(ctx, d.name)
	if err != nil && reasonOf(err) != "NOT_FOUND" {
		return err
	}
	id := orElse(f.requestID, requestID())
	if existing != nil {
		if f.dryRun {
			return &hinted{fmt.Errorf("%s: %w", d.name, sandbox.ErrExists), "agentctl sandbox show " + d.name}
		}
		return a.startExisting(ctx, c, f, d, asked, existing, id, values)
	}
	if d.spec.GetSource() == nil {
		return missingImage(d)
	}
	if err := d.complete(a.getenv("HOME")); err != nil {
		return err
	}
	req := &agentv1.CreateSandboxRequest{Sandbox: d.message(), Start: !f.dryRun, RequestId: id, ValidateOnly: f.dryRun, SecretValues: values}
	if f.dryRun {
		answer, err := c.sandboxes.CreateSandbox(ctx, req)
		if err != nil {
			return startFailure(err, d)
		}
		return a.showStarted(answer.GetSandbox(), d.name+" could be started", 0)
	}
	began := time.Now()
	sb, err := a.await(ctx, c, d.name, 0, f.noWait, func(ctx context.Context) (*agentv1.Sandbox, error) {
		answer, err := c.sandboxes.CreateSandbox(ctx, req)
		return answer.GetSandbox(), err
	})
	if reasonOf(err) == "ALREADY_EXISTS" {
		// Somebody made it in between.
		if existing, err := c.sandbox(ctx, d.name); err == nil {
			return a.startExisting(ctx, c, f, d, asked, existing, id, values)
		}
	}
	return a.started(ctx, c, d, sb, err, began, f.noWait)
}

// startExisting boots a sandbox that was made before.
func (a *app) startExisting(ctx context.Context, c *client, f *startFlags, d *definition, asked bool, existing *agentv1.Sandbox, id string, values map[string][]byte) error {
	if asked {
		a.noteDifferences(d, existing)
	}
	if existing.GetStatus().GetPhase() == agentv1.Phase_PHASE_READY {
		if len(d.inline) > 0 {
			a.notef("%s runs already and keeps the secrets it has; agentctl secret set %s %s gives it another", d.name, d.name, d.inline[0])
		}
		return a.showStarted(existing, fmt.Sprintf("%s is running already", d.name), 0)
	}
	began := time.Now()
	sb, err := a.await(ctx, c, d.name, existing.GetStatus().GetGeneration(), f.noWait, func(ctx context.Context) (*agentv1.Sandbox, error) {
		// Not the id itself: the creation may have used that up.
		answer, err := c.sandboxes.StartSandbox(ctx, &agentv1.StartSandboxRequest{Name: d.name, RequestId: id + ".start", SecretValues: values})
		return answer.GetSandbox(), err
	})
	return a.started(ctx, c, d, sb, err, began, f.noWait)
}

// started tells how a start ended.
func (a *app) started(ctx context.Context, c *client, d *definition, sb *agentv1.Sandbox, err error, began time.Time, noWait bool) error {
	if err == nil {
		return a.showStarted(sb, d.name+" is ready", time.Since(began))
	}
	if left, ok := errors.AsType[*leftError](err); ok && noWait && errors.Is(left.by, errNoWait) {
		return a.showStarted(left.last, d.name+" is being started", 0)
	}
	if reason := reasonOf(err); reason == "NOT_READY" || reason == "WORKLOAD_ENDED" {
		a.showLastOutput(ctx, c, d.name)
		if sb, err := c.sandbox(ctx, d.name); err == nil {
			a.warnOfExposures(sb)
		}
	}
	return startFailure(err, d)
}

func (a *app) showStarted(sb *agentv1.Sandbox, text string, took time.Duration) error {
	a.warnOfExposures(sb)
	if a.forPrograms() {
		return a.print(sb)
	}
	if a.quiet {
		return nil
	}
	notes := []string{}
	if generation := sb.GetStatus().GetGeneration(); generation > 0 {
		notes = append(notes, fmt.Sprintf("generation %d", generation))
	}
	if took > 0 {
		notes = append(notes, "after "+duration(took))
	}
	if len(notes) > 0 {
		text += a.out.dim(" (" + strings.Join(notes, ", ") + ")")
	}
	fmt.Fprintln(a.stdout, text)
	for _, e := range sb.GetStatus().GetEndpoints() {
		fmt.Fprintln(a.stdout, "  "+endpointText(e))
	}
	return nil
}

// showLastOutput prints the end of a sandbox's log, as far as it can be had.
func (a *app) showLastOutput(ctx context.Context, c *client, name string) {
	const lines = 20
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
	defer cancel()
	tail := uint32(lines)
	stream, err := c.sandboxes.StreamSandboxLogs(ctx, &agentv1.StreamSandboxLogsRequest{Name: name, Tail: &tail})
	if err != nil {
		return
	}
	var out strings.Builder
	for {
		entry, err := stream.Recv()
		if err != nil {
			break
		}
		out.Write(entry.GetData())
	}
	text := strings.TrimRight(out.String(), "\n")
	if text == "" {
		a.notef("%s printed nothing", name)
		return
	}
	fmt.Fprintf(a.stderr, "The last that %s printed:\n", name)
	for line := range strings.SplitSeq(text, "\n") {
		fmt.Fprintln(a.stderr, a.err.dim("  | ")+oneLine(line))
	}
}

func missingImage(d *definition) error {
	where := "give one with --image REFERENCE"
	if d.file != "" {
		where = fmt.Sprintf("add a line to %s: image: REFERENCE", d.file)
	}
	return withHint(sandbox.Invalidf("image", "there is no sandbox %s yet, and no image to make it from", d.name),
		"%s, or write a %s (agentctl help sandbox-yaml); agentctl image list shows what is here", where, specFileName)
}

// startFailure adds the hint that only the one who asked can give.
func startFailure(err error, d *definition) error {
	info := errorInfo(err)
	field := info.GetMetadata()["field"]
	switch {
	case info.GetReason() == "NOT_FOUND" && (strings.HasSuffix(field, "image") || field == ""):
		if image := d.spec.GetImage(); image != "" {
			return withHint(err, "agentctl image pull %s, or agentctl image load FILE", image)
		}
	case strings.Contains(field, "spec.mounts[") && strings.HasSuffix(field, ".source"):
		for i, m := range d.spec.GetMounts() {
			if strings.Contains(field, fmt.Sprintf("mounts[%d]", i)) && !exists(m.GetSource()) {
				return withHint(err, "mkdir -p %s", m.GetSource())
			}
		}
	case info.GetReason() == "NOT_READY" || info.GetReason() == "WORKLOAD_ENDED":
		return withHint(err, "mend what it runs, agentctl sandbox delete %s, and start it anew; all it printed: agentctl sandbox logs %s", d.name, d.name)
	}
	return err
}

// noteDifferences tells what was asked for and is not applied to a sandbox
// that exists.
func (a *app) noteDifferences(d *definition, existing *agentv1.Sandbox) {
	var names []string
	want, have := d.spec.ProtoReflect(), existing.GetSpec().ProtoReflect()
	want.Range(func(field protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if field.Name() == "mounts" && !d.workspaceChosen && d.file == "" {
			return true // the workspace that was not asked for is not compared
		}
		if !covers(have, field, v) {
			names = append(names, flagOf("spec."+string(field.Name())))
		}
		return true
	})
	for key, value := range d.labels {
		if existing.GetLabels()[key] != value {
			names = append(names, "labels")
			break
		}
	}
	if len(names) == 0 {
		return
	}
	slices.Sort(names)
	a.notef("%s exists already and stays as it was made; what you give differs in %s and is not applied", d.name, strings.Join(names, ", "))
	if !a.quiet {
		fmt.Fprintf(a.stderr, "%sagentctl sandbox delete %s, then this start again, to apply it\n", a.err.bold(hintPrefix), d.name)
	}
}

// flagOf is what a person calls a field of the spec.
func flagOf(field string) string {
	switch field {
	case "spec.resources":
		return "resources"
	case "spec.mounts":
		return "mounts"
	}
	for _, p := range places {
		if p.field == field {
			return p.key
		}
	}
	return strings.TrimPrefix(field, "spec.")
}

// covers reports whether a message says in a field at least what v says: the
// agent fills in what was left open.
func covers(have protoreflect.Message, field protoreflect.FieldDescriptor, v protoreflect.Value) bool {
	got := have.Get(field)
	switch {
	case field.IsMap():
		same := true
		v.Map().Range(func(key protoreflect.MapKey, value protoreflect.Value) bool {
			same = got.Map().Has(key) && got.Map().Get(key).Equal(value)
			return same
		})
		return same
	case field.IsList():
		return got.Equal(v)
	case field.Message() != nil:
		if field.Message().FullName() == "google.protobuf.Duration" {
			return proto.Equal(got.Message().Interface(), v.Message().Interface())
		}
		same := true
		v.Message().Range(func(inner protoreflect.FieldDescriptor, value protoreflect.Value) bool {
			same = covers(got.Message(), inner, value)
			return same
		})
		return same
	default:
		return got.Equal(v)
	}
}
