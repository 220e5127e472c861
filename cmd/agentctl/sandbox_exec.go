package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

// execFlags are the flags of `sandbox exec`.
type execFlags struct {
	input, tty, keep, detach bool
	env                      []string
	workdir, user            string
	keys                     string
}

const execLong = `Run a command inside a running sandbox, and exit with its exit status.

Its stdout and stderr are printed as they are, byte for byte. Its stdin is this
one with -i, else it has none. With -t it runs in a terminal: use -it for what
is interactive. The command is looked up in the sandbox's PATH; no shell reads
it. It has the environment of the workload, secrets included.

SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 are passed on to it; with
-it, keys go to its terminal as they are typed. If agentctl ends otherwise, the
command is killed, unless it was started with --keep or -d, or left by typing
Ctrl-P Ctrl-Q (--detach-keys). What was left running "agentctl exec list" shows.`

func (a *app) sandboxExec() *cobra.Command {
	f := &execFlags{}
	cmd := &cobra.Command{
		Use:   "exec NAME [flags] -- COMMAND ARGS...",
		Short: "Run a command inside a sandbox",
		Long:  execLong,
		Example: `  agentctl sandbox exec web -- ls -l /workspace
  agentctl sandbox exec -it web -- bash
  echo 'select 1' | agentctl sandbox exec -i db -- psql
  agentctl sandbox exec web -w /workspace -e CI=1 -- make test
  id=$(agentctl sandbox exec -d web -- make test) && agentctl exec attach web $id`,
		Args: func(cmd *cobra.Command, args []string) error {
			dash := cmd.ArgsLenAtDash()
			switch {
			case dash < 0 && len(args) > 1:
				return fmt.Errorf("the command comes after --: %s %s -- %s", cmd.CommandPath(), args[0], quoteWords(args[1:]))
			case dash < 0 || dash == len(args):
				return fmt.Errorf("the command is missing; it comes after --")
			case dash == 0:
				return fmt.Errorf("NAME is missing")
			case dash > 1:
				return fmt.Errorf("takes one NAME, not %d; a command comes after --", dash)
			}
			return nil
		},
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.exec(cmd, f, args[0], args[1:])
		},
	}
	flags := cmd.Flags()
	flags.BoolVarP(&f.input, "interactive", "i", false, "pass stdin on to the command")
	flags.BoolVarP(&f.tty, "tty", "t", false, "run it in a terminal")
	flags.StringArrayVarP(&f.env, "env", "e", nil, "environment variable `NAME=VALUE`, or NAME to pass yours on")
	flags.StringVarP(&f.workdir, "workdir", "w", "", "working `directory` inside (default: the workload's)")
	flags.StringVarP(&f.user, "user", "u", "", "`user[:group]` inside, by name or number (default: the workload's)")
	flags.BoolVar(&f.keep, "keep", false, "let it run on when agentctl ends")
	flags.BoolVarP(&f.detach, "detach", "d", false, "print its exec id and leave it running")
	keysFlag(cmd, &f.keys)
	return cmd
}

func keysFlag(cmd *cobra.Command, keys *string) {
	cmd.Flags().StringVar(keys, "detach-keys", defaultDetachKeys, "`keys` that leave it running, of one with a terminal; empty: none")
}

func (a *app) exec(cmd *cobra.Command, f *execFlags, name string, command []string) error {
	keys, err := parseKeys(f.keys)
	if err != nil {
		return usagef(cmd, "--detach-keys: %s", err)
	}
	start := &agentv1.ExecStart{
		Name: name, Command: command, Env: map[string]string{}, WorkingDir: f.workdir, User: f.user,
		Tty: f.tty, Keep: f.keep, NoStdin: !f.input, Detached: f.detach,
	}
	if f.tty && f.input && !f.detach && terminalOf(a.stdin) == nil {
		return withHint(sandbox.Invalidf("-t", "stdin is not a terminal"), "leave out -t")
	}
	if f.tty {
		a.describeTerminal(start)
	}
	for _, pair := range f.env {
		if err := setEnv(start.Env, pair, a.getenv); err != nil {
			return usagef(cmd, "--env: %s", err)
		}
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	s := &session{a: a, c: c, name: name, tty: f.tty, keep: start.GetKeep(), input: f.input && !f.detach, keys: keys}
	return s.run(cmd.Context(), &agentv1.ExecRequest{Message: &agentv1.ExecRequest_Start{Start: start}})
}

// describeTerminal passes on what a command needs to know of the terminal.
func (a *app) describeTerminal(start *agentv1.ExecStart) {
	start.TerminalSize = terminalSize(a.stdout, a.stdin)
	if kind := a.getenv("TERM"); kind != "" {
		start.Env["TERM"] = kind
	}
}

func (a *app) sandboxShell() *cobra.Command {
	user, keys := "", ""
	cmd := &cobra.Command{
		Use:   "shell NAME",
		Short: "Open a shell inside a sandbox",
		Long: `Open a shell inside a running sandbox: the one that its /etc/passwd has for the
user, otherwise bash, otherwise sh. If stdin is not a terminal, the shell runs
what it reads from it.`,
		Example:           "  agentctl sandbox shell web\n  agentctl sandbox shell web -u root\n  agentctl sandbox shell web < script.sh",
		Args:              exactly("NAME"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			sequence, err := parseKeys(keys)
			if err != nil {
				return usagef(cmd, "--detach-keys: %s", err)
			}
			return a.shell(cmd.Context(), args[0], user, sequence)
		},
	}
	cmd.Flags().StringVarP(&user, "user", "u", "", "`user[:group]` inside, by name or number (default: the workload's)")
	keysFlag(cmd, &keys)
	return cmd
}

// findShell becomes the user's shell, else bash, else $0, with nothing but what
// every sh has.
const findShell = `me=$(id -u 2>/dev/null); mine=
while IFS=: read -r name pass uid gid info home shell; do
  [ "$uid" = "$me" ] && [ -z "$mine" ] && mine=$shell
done 2>/dev/null </etc/passwd
case $mine in */nologin|*/false|*/sync) mine= ;; esac
[ -n "$mine" ] && [ -x "$mine" ] && exec "$mine"
bash=$(command -v bash) && exec "$bash"
exec "$0"`

// shell opens a shell in a sandbox whose shells are not known.
func (a *app) shell(ctx context.Context, name, user string, keys []byte) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	tty := terminalOf(a.stdin) != nil
	for _, shell := range []string{"sh", "/bin/sh", "bash", "/busybox/sh"} {
		start := &agentv1.ExecStart{Name: name, Command: []string{shell, "-c", findShell, shell}, Env: map[string]string{}, User: user, Tty: tty}
		if tty {
			a.describeTerminal(start)
		}
		s := &session{a: a, c: c, name: name, tty: tty, input: true, keys: keys}
		err := s.run(ctx, &agentv1.ExecRequest{Message: &agentv1.ExecRequest_Start{Start: start}})
		if s.started != nil || !noCommand(err) {
			return err
		}
	}
	return &exitingWith{withHint(fmt.Errorf("%s: there is no shell in this sandbox: %w", name, sandbox.ErrNotFound),
		"agentctl sandbox exec %s -- PROGRAM, or agentctl file list %s /", name, name), exitNoCommand}
}
