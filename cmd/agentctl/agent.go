package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/location"
	"github.com/choiros/agent/internal/sandbox"
)

func (a *app) agentCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Keep the agent running on this host",
		Long: `Keep the agent running on this host: as a service of yours that starts when you
log in, with launchd on macOS and systemd on Linux, or for once. Whatever
happens to the agent, sandboxes run on.`,
		Example: `  agentctl agent install          # from now on, at every login
  agentctl agent status
  agentctl agent logs -f
  agentctl agent uninstall`,
	}
	cmd.AddCommand(a.agentInstall(), a.agentUninstall(), a.agentStatus(), a.agentStart(), a.agentStop(), a.agentLogs())
	return cmd
}

func (a *app) agentInstall() *cobra.Command {
	var program, config string
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Start the agent now and at every login",
		Long: `Start the agent now and at every login: with a LaunchAgent on macOS, and a unit
of your own service manager on Linux. Done again, it replaces that and restarts
the agent, with what is given now; sandboxes run on.

The agent is the one beside agentctl. It listens where agentctl looks for it:
--agent unix:///PATH puts it elsewhere. Of your environment it is given
XDG_CONFIG_HOME and XDG_STATE_HOME, and on macOS PATH and XDG_RUNTIME_DIR.`,
		Example: "  agentctl agent install\n  agentctl agent install --agent-binary ~/.local/bin/agent --config ~/agent.toml",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.install(cmd.Context(), program, config)
		},
	}
	cmd.Flags().StringVar(&program, "agent-binary", "", "`path` of the agent (default: the one beside agentctl, or in PATH)")
	cmd.Flags().StringVar(&config, "config", "", "configuration `file` of the agent (default: where it looks by itself)")
	return cmd
}

func (a *app) agentUninstall() *cobra.Command {
	return &cobra.Command{
		Use:   "uninstall",
		Short: "Undo agent install; data and sandboxes stay",
		Long: `Stop the agent and remove what agent install made, and its log. The agent's data
and configuration stay, and sandboxes run on; it says where they are.`,
		Example: "  agentctl agent uninstall",
		Args:    exactly(),
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.uninstall(cmd.Context()) },
	}
}

func (a *app) agentStatus() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show whether the agent runs, and what keeps it",
		Long: `Show whether the agent runs, and what keeps it.

Exit status: 8 if it does not answer.`,
		Example: "  agentctl agent status\n  agentctl agent status -o json | jq .running",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.localClient()
			if err != nil {
				return err
			}
			r, err := a.agentReport(cmd.Context(), c)
			if err != nil {
				return err
			}
			if err := a.showAgent(r); err != nil || r.Running {
				return err
			}
			return &reported{errors.New(r.Problem), sandbox.FailureOf(sandbox.ErrUnavailable).Exit}
		},
	}
}

func (a *app) agentStart() *cobra.Command {
	return &cobra.Command{
		Use:   "start",
		Short: "Start the agent, and wait until it answers",
		Long: `Start the agent, and wait until it answers: as the service that agent install
made, or else in the background until it is stopped or the host restarts.`,
		Example: "  agentctl agent start",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.localClient()
			if err != nil {
				return err
			}
			line := "the agent runs already"
			if _, err := listener(cmd.Context(), c.address.location); err != nil {
				if !nobodyListens(err) {
					return &connectError{c.address, err}
				}
				if line, err = a.startAgent(cmd.Context(), c.address.location); err != nil {
					return err
				}
			}
			return a.confirmAgent(cmd.Context(), c, line)
		},
	}
}

func (a *app) agentStop() *cobra.Command {
	return &cobra.Command{
		Use:   "stop",
		Short: "Stop the agent; sandboxes run on",
		Long: `Stop the agent; sandboxes run on, and nobody looks after them. What agent install
made starts it again at the next login, as does agentctl agent start.`,
		Example: "  agentctl agent stop",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.localClient()
			if err != nil {
				return err
			}
			stopped, err := a.stopAgent(cmd.Context(), c.address.location)
			if err != nil {
				return err
			}
			line := "no agent runs"
			if stopped {
				line = "stopped; sandboxes run on"
			}
			return a.confirmAgent(cmd.Context(), c, line)
		},
	}
}

func (a *app) agentLogs() *cobra.Command {
	lines, follow := 100, false
	cmd := &cobra.Command{
		Use:     "logs",
		Short:   "Show what the agent logged",
		Long:    "Show what the agent logged since agentctl keeps it: its service's log, or the\nfile of one that runs in the background.",
		Example: "  agentctl agent logs\n  agentctl agent logs -f -n 10",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if lines < 0 {
				return usagef(cmd, "--tail: %d is negative", lines)
			}
			return a.agentLog(cmd.Context(), lines, follow)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what it logs from now on, until Ctrl-C")
	cmd.Flags().IntVarP(&lines, "tail", "n", lines, "`number` of lines from the end")
	return cmd
}

// localClient is the connection to an agent of this host.
func (a *app) localClient() (*client, error) {
	addr, err := a.agentAddress()
	if err != nil {
		return nil, err
	}
	if addr.network != "unix" {
		return nil, withHint(fmt.Errorf("the agent at %s is reached over the network: %w", addr, sandbox.ErrUnsupported),
			"this on the agent's own host, without --agent and CHOIROS_AGENT")
	}
	return a.client()
}

// agentReport is what is known of the agent of this host.
type agentReport struct {
	Running bool   `json:"running"`
	Version string `json:"version,omitempty"`
	Address string `json:"address"`
	PID     int    `json:"pid,omitempty"`
	// Unit is the file that a service manager keeps the agent by.
	Unit    string `json:"unit,omitempty"`
	AtLogin bool   `json:"at_login"`
	// ByService says that the agent that answers is the service manager's.
	ByService bool `json:"by_service"`
	// Problem is why no agent answers, or how its service ended last.
	Problem string `json:"problem,omitempty"`
	Log     string `json:"log,omitempty"`
	Data    string `json:"data,omitempty"`
}

func (a *app) agentReport(ctx context.Context, c *client) (*agentReport, error) {
	places := location.On(a.on.goos, a.getenv, a.on.uid)
	s := a.service()
	r := &agentReport{Address: c.address.String(), Unit: s.file(), Log: places.Log, Data: places.State}
	if r.Unit != "" {
		r.Log = quoteWords(s.logs(100, false))
		state, err := s.state(ctx)
		if err != nil {
			return nil, err
		}
		r.PID, r.AtLogin, r.ByService, r.Problem = state.pid, state.atLogin, state.running, state.ended
	}
	pid, err := listener(ctx, c.address.location)
	if err != nil {
		r.ByService = false
		r.Problem = strings.TrimPrefix(r.Problem+"; ", "; ") + (&connectError{c.address, err}).problem()
		return r, nil
	}
	r.ByService = r.ByService && (pid == 0 || r.PID == 0 || pid == r.PID)
	if pid != 0 {
		r.PID = pid
	}
	ctx, cancel := quick(ctx)
	defer cancel()
	info, err := c.host.GetInfo(ctx, &agentv1.GetInfoRequest{})
	if err != nil {
		r.Problem = message(err)
		return r, nil
	}
	r.Running, r.Version, r.Problem = true, info.GetAgentVersion(), ""
	return r, nil
}

func (a *app) showAgent(r *agentReport) error {
	if a.forPrograms() {
		return a.print(r)
	}
	if a.quiet {
		return nil
	}
	p := &page{}
	if r.Running {
		p.add("Agent", r.Version+" answers at "+r.Address)
	} else {
		p.add("Agent", r.Problem)
		p.add("Address", r.Address)
	}
	if r.PID != 0 {
		p.add("Process", fmt.Sprint(r.PID))
	}
	switch {
	case r.Unit == "":
		p.add("Service", "not installed")
	case r.Running && !r.ByService:
		p.add("Service", r.Unit+", which is not what runs this agent")
	default:
		p.add("Service", r.Unit)
	}
	switch {
	case r.AtLogin && a.on.goos == "linux" && lingers(a.on.uid):
		p.add("Starts", "with the host")
	case r.AtLogin:
		p.add("Starts", "at every login")
	case r.Unit != "":
		p.add("Starts", "when it is told to")
	}
	p.add("Log", r.Log)
	p.add("Data", r.Data)
	return p.write(a.stdout, a.out.bold)
}

// confirmAgent says what was done; programs are told how the agent is now.
func (a *app) confirmAgent(ctx context.Context, c *client, line string) error {
	if !a.forPrograms() {
		return a.confirm(nil, line)
	}
	r, err := a.agentReport(ctx, c)
	if err != nil {
		return err
	}
	return a.print(r)
}

// agentLog prints the end of the agent's log with a program of the system's.
func (a *app) agentLog(ctx context.Context, lines int, follow bool) error {
	s, path := a.service(), location.On(a.on.goos, a.getenv, a.on.uid).Log
	command := tailCommand(path, lines, follow)
	if s.file() != "" {
		command = s.logs(lines, follow)
	}
	if command[0] == "tail" && !exists(path) {
		return withHint(fmt.Errorf("%s: %w: agentctl has started no agent", path, sandbox.ErrNotFound), "agentctl agent start")
	}
	cmd := exec.CommandContext(ctx, command[0], command[1:]...) //nolint:gosec // as service has it
	cmd.Stdout, cmd.Stderr = a.stdout, a.stderr
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("%s: %w", command[0], unwrapAll(err))
	}
	return nil
}
