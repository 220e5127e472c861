package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

func (a *app) execCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "exec",
		Short: "List, take up and end commands that run inside sandboxes",
		Long: `List, take up again and end the commands that "agentctl sandbox exec" and
"agentctl sandbox shell" started.`,
		Example: `  agentctl exec list web
  agentctl exec attach web e1
  agentctl exec kill web e1 -s INT`,
	}
	cmd.AddCommand(a.execList(), a.execAttach(), a.execKill())
	return cmd
}

// list returns the commands of a sandbox that run or ended lately.
func (c *client) listExecs(ctx context.Context, name string) ([]*agentv1.ExecSession, error) {
	ctx, cancel := quick(ctx)
	defer cancel()
	answer, err := c.execs.ListExecs(ctx, &agentv1.ListExecsRequest{Name: name})
	return answer.GetExecs(), err
}

func (a *app) execList() *cobra.Command {
	return &cobra.Command{
		Use:               "list NAME",
		Aliases:           []string{"ls"},
		Short:             "List the commands that run inside a sandbox, and those that ended unseen",
		Example:           "  agentctl exec list web\n  agentctl exec list web -o json",
		Args:              exactly("NAME"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			execs, err := c.listExecs(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			switch {
			case a.forPrograms():
				return a.print(messages(execs))
			case a.quiet:
				for _, e := range execs {
					fmt.Fprintln(a.stdout, e.GetExecId())
				}
				return nil
			case len(execs) == 0:
				fmt.Fprintln(a.stderr, "no commands")
				return nil
			}
			return a.execTable(execs, time.Now())
		},
	}
}

func (a *app) execTable(execs []*agentv1.ExecSession, now time.Time) error {
	t := table{heads: []string{"ID", "PID", "STATE", "AGE", "COMMAND"}}
	for _, e := range execs {
		t.add(plain(e.GetExecId()), plain(fmt.Sprint(e.GetPid())), a.execState(e),
			plain(age(now.Sub(e.GetStartTime().AsTime()))), plain(clipText(oneLine(quoteWords(e.GetCommand())), 60)))
	}
	return t.write(a.stdout, a.out.bold)
}

func (a *app) execState(e *agentv1.ExecSession) cell {
	switch exit := e.GetExit(); {
	case exit.GetSignal() != 0:
		return cell{"ended (" + sandbox.SignalName(exit.GetSignal()) + ")", a.out.red}
	case exit.GetCode() != 0:
		return cell{fmt.Sprintf("ended (exit %d)", exit.GetCode()), a.out.red}
	case exit != nil:
		return cell{"ended", a.out.dim}
	case e.GetAttached():
		return cell{"attached", a.out.green}
	}
	return cell{"detached", a.out.yellow}
}

func (a *app) execAttach() *cobra.Command {
	input, skip, keys := false, false, ""
	cmd := &cobra.Command{
		Use:   "attach NAME ID",
		Short: "Take up a command that was left running",
		Long: `Take up a command that was left running inside a sandbox: print the last that it
printed meanwhile (64 KiB of it are kept) and what it prints from now on, and
exit with its exit status. If it has a terminal and this is one, keys go to it;
otherwise -i passes stdin on.`,
		Example:           "  agentctl exec attach web e1\n  agentctl exec attach web e1 --skip-backlog",
		Args:              exactly("NAME", "ID"),
		ValidArgsFunction: a.completeExecs,
		RunE: func(cmd *cobra.Command, args []string) error {
			sequence, err := parseKeys(keys)
			if err != nil {
				return usagef(cmd, "--detach-keys: %s", err)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			execs, err := c.listExecs(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			i := slices.IndexFunc(execs, func(e *agentv1.ExecSession) bool { return e.GetExecId() == args[1] })
			if i < 0 {
				return withHint(fmt.Errorf("%s: command %s: %w", args[0], args[1], sandbox.ErrNotFound), "agentctl exec list %s", args[0])
			}
			tty := execs[i].GetTty()
			s := &session{a: a, c: c, name: args[0], tty: tty, keep: true, input: input || tty && terminalOf(a.stdin) != nil, keys: sequence}
			return s.run(cmd.Context(), &agentv1.ExecRequest{Message: &agentv1.ExecRequest_Attach{
				Attach: &agentv1.ExecAttach{Name: args[0], ExecId: args[1], SkipBacklog: skip},
			}})
		},
	}
	cmd.Flags().BoolVarP(&input, "interactive", "i", false, "pass stdin on to the command, and its end")
	cmd.Flags().BoolVar(&skip, "skip-backlog", false, "leave out what it printed meanwhile")
	keysFlag(cmd, &keys)
	return cmd
}

func (a *app) execKill() *cobra.Command {
	signal := ""
	cmd := &cobra.Command{
		Use:               "kill NAME ID...",
		Short:             "Send commands inside a sandbox a signal",
		Long:              "Send commands that run inside a sandbox, and what they started, a signal.",
		Example:           "  agentctl exec kill web e1\n  agentctl exec kill web e1 -s KILL",
		Args:              atLeast("NAME", "ID"),
		ValidArgsFunction: a.completeExecs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := sandbox.ParseSignal("--signal", signal); err != nil {
				return usagef(cmd, "%s", err)
			}
			return a.each(cmd.Context(), args[1:], "signalled", func(ctx context.Context, c *client, id string) (any, error) {
				ctx, cancel := quick(ctx)
				defer cancel()
				_, err := c.execs.SignalExec(ctx, &agentv1.SignalExecRequest{Name: args[0], ExecId: id, Signal: signal})
				if reasonOf(err) == "NOT_FOUND" {
					err = withHint(err, "agentctl exec list %s", args[0])
				}
				return struct {
					ExecID string `json:"exec_id"`
					Signal string `json:"signal"`
				}{id, signal}, err
			})
		},
	}
	cmd.Flags().StringVarP(&signal, "signal", "s", "TERM", "`signal`, by name or number")
	return cmd
}

// completeExecs completes a sandbox's name, then the ids of its commands.
func (a *app) completeExecs(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return a.completeNames(1)(cmd, args, toComplete)
	}
	c, err := a.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), time.Second)
	defer cancel()
	execs, err := c.listExecs(ctx, args[0])
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var ids []cobra.Completion
	for _, e := range execs {
		if e.GetExit() == nil && !slices.Contains(args[1:], e.GetExecId()) {
			ids = append(ids, cobra.CompletionWithDesc(e.GetExecId(), quoteWords(e.GetCommand())))
		}
	}
	return ids, cobra.ShellCompDirectiveNoFileComp
}
