package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

func (a *app) completionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print a script that completes agentctl's commands and sandbox names",
		Example: `  # bash, now and in every new shell (needs the package bash-completion):
  source <(agentctl completion bash)
  agentctl completion bash > ~/.local/share/bash-completion/completions/agentctl
  # zsh: a folder of your fpath
  agentctl completion zsh > "${fpath[1]}/_agentctl"
  # fish
  agentctl completion fish > ~/.config/fish/completions/agentctl.fish`,
		ValidArgs: []string{"bash", "zsh", "fish"},
		Args: func(cmd *cobra.Command, args []string) error {
			if err := exactly("the shell")(cmd, args); err != nil {
				return err
			}
			if !slices.Contains(cmd.ValidArgs, args[0]) {
				return fmt.Errorf("%q is none of bash, zsh and fish", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			root := cmd.Root()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(a.stdout, true)
			case "zsh":
				return root.GenZshCompletion(a.stdout)
			default:
				return root.GenFishCompletion(a.stdout, true)
			}
		},
	}
}

// completeNames completes sandbox names from what the agent says: up to so
// many arguments, or any number if most is negative.
func (a *app) completeNames(most int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if most >= 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		c, err := a.client()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), time.Second)
		defer cancel()
		all, err := c.list(ctx, "")
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var names []cobra.Completion
		for _, sb := range all {
			if strings.HasPrefix(sb.GetName(), toComplete) && !slices.Contains(args, sb.GetName()) {
				names = append(names, cobra.CompletionWithDesc(sb.GetName(), phaseText(sb, time.Now())))
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}
