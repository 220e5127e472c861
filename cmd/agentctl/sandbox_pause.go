package main

import (
	"context"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

func (a *app) sandboxPause() *cobra.Command {
	return &cobra.Command{
		Use:   "pause NAME...",
		Short: "Halt sandboxes with all that is in their memory",
		Long: `Halt sandboxes that are ready, with all that is in their memory, on drivers that
can. They take up memory as before, and their idle time goes on. Whatever needs
what is inside lets them go on: a start, an exec, a copy, a connection to one of
their ports. "agentctl sandbox resume" does so too.`,
		Example:           "  agentctl sandbox pause web\n  agentctl sandbox pause web worker",
		Args:              atLeastOne("NAME"),
		ValidArgsFunction: a.completeNames(-1),
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.each(cmd.Context(), names, "paused", func(ctx context.Context, c *client, name string) (any, error) {
				answer, err := c.sandboxes.PauseSandbox(ctx, &agentv1.PauseSandboxRequest{Name: name, RequestId: requestID()})
				return answer.GetSandbox(), err
			})
		},
	}
}

func (a *app) sandboxResume() *cobra.Command {
	return &cobra.Command{
		Use:               "resume NAME...",
		Short:             "Let paused sandboxes go on",
		Long:              "Let paused sandboxes go on where they were halted. It is no boot: the generation\nstays. One that is not paused is left as it is.",
		Example:           "  agentctl sandbox resume web",
		Args:              atLeastOne("NAME"),
		ValidArgsFunction: a.completeNames(-1),
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.each(cmd.Context(), names, "is ready", func(ctx context.Context, c *client, name string) (any, error) {
				answer, err := c.sandboxes.ResumeSandbox(ctx, &agentv1.ResumeSandboxRequest{Name: name, RequestId: requestID()})
				return answer.GetSandbox(), err
			})
		},
	}
}

func (a *app) sandboxHibernate() *cobra.Command {
	return &cobra.Command{
		Use:   "hibernate NAME...",
		Short: "Keep the memory of sandboxes on disk and end them",
		Long: `Keep the memory of sandboxes that are ready on disk, sealed, and end them, on
drivers that can. They take no memory then. Their next start, or the next
connection to one of their ports, goes on from there, once. After a restart of
the host, or if their size or disks were changed, they boot as ever.`,
		Example:           "  agentctl sandbox hibernate web\n  agentctl sandbox start web",
		Args:              atLeastOne("NAME"),
		ValidArgsFunction: a.completeNames(-1),
		RunE: func(cmd *cobra.Command, names []string) error {
			return a.each(cmd.Context(), names, "hibernated", func(ctx context.Context, c *client, name string) (any, error) {
				answer, err := c.sandboxes.HibernateSandbox(ctx, &agentv1.HibernateSandboxRequest{Name: name, RequestId: requestID()})
				return answer.GetSandbox(), err
			})
		},
	}
}
