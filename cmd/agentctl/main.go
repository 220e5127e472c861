// Command agentctl is the command line of the agent: people and scripts make,
// watch and end sandboxes with it.
//
// It is a client and nothing more: whatever it shows it was told by the agent
// over the public API, and it keeps no state of its own. Only doctor, agent and
// guest-kit deal with the host itself, because they must work when the agent
// does not.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Getenv)) }

// run is agentctl. It returns the exit status.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer, getenv func(string) string) int {
	return runOn(machine{runtime.GOOS, os.Getuid()}, args, stdin, stdout, stderr, getenv)
}

// runOn is run on a machine that tests exchange.
func runOn(on machine, args []string, stdin io.Reader, stdout, stderr io.Writer, getenv func(string) string) int {
	ctx, signals := catchSignals()
	defer signals.close()
	a := &app{stdin: stdin, stdout: stdout, stderr: stderr, getenv: getenv, signals: signals, on: on}
	defer a.close()
	root := a.rootCommand()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	return a.report(ctx, err)
}

// app is one run of agentctl: its streams, its global flags, its connection.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
	signals        *signals
	on             machine

	address string
	tls     tlsFiles
	output  string
	timeout time.Duration
	quiet   bool

	out, err terminal // of stdout and of stderr
	conn     *client  // nil until the first call
	cancel   context.CancelFunc
}

const rootLong = `agentctl makes, watches and ends sandboxes through the agent of this host.

A sandbox is an isolated workload: a container or a virtual machine, made from
an image, with a folder of yours as its workspace. In a folder with a
sandbox.yaml, "agentctl sandbox start" is all it takes.

Exit status: 0 on success, 2 for wrong usage; "agentctl help exit-codes" has all.`

const rootExample = `  agentctl doctor                                   # does this host have what it takes?
  agentctl sandbox start --image docker.io/library/alpine:3 -- sleep infinity
  agentctl sandbox list
  agentctl sandbox logs -f web`

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:               "agentctl",
		Short:             "Make, watch and end sandboxes",
		Long:              rootLong,
		Example:           rootExample,
		SilenceErrors:     true,
		SilenceUsage:      true,
		PersistentPreRunE: a.prepare,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	flags := root.PersistentFlags()
	flags.SortFlags = false
	flags.StringVar(&a.address, "agent", "", "the agent's `address`: unix:///path, or host:port with TLS (default: this\nuser's agent; environment: CHOIROS_AGENT)")
	flags.StringVar(&a.tls.cert, "tls-cert", "", "client certificate `file` (PEM), for host:port")
	flags.StringVar(&a.tls.key, "tls-key", "", "the certificate's key `file` (PEM)")
	flags.StringVar(&a.tls.ca, "tls-ca", "", "`file` with the authorities that the agent's certificate is checked against")
	flags.StringVarP(&a.output, "output", "o", "table", "`format` of the output: table, json or yaml")
	flags.DurationVar(&a.timeout, "timeout", 0, "give up after this `duration`; what was asked for goes on")
	flags.BoolVarP(&a.quiet, "quiet", "q", false, "print nothing but results and errors; lists print names only")
	must(root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp)))

	root.AddCommand(a.sandboxCommand(), a.execCommand(), a.fileCommand(), a.portCommand(), a.egressCommand(), a.diskCommand(), a.secretCommand(), a.topCommand(),
		a.imageCommand(), a.guestKitCommand(), a.hostCommand(), a.agentCommand(), a.doctorCommand(), a.versionCommand(), a.completionCommand(), exitCodesTopic(), specFileTopic())
	root.SetHelpCommand(a.helpCommand())
	root.SetUsageTemplate(usageTemplate)
	finish(root)
	return root
}

// prepare runs before every command, once its flags are known.
func (a *app) prepare(cmd *cobra.Command, _ []string) error {
	a.out, a.err = newTerminal(a.stdout, a.getenv), newTerminal(a.stderr, a.getenv)
	switch a.output {
	case "table", "json", "yaml":
	default:
		return usagef(cmd, "--output: %q is none of table, json and yaml", a.output)
	}
	if a.timeout < 0 {
		return usagef(cmd, "--timeout: %s is negative", a.timeout)
	}
	if a.timeout > 0 {
		ctx, cancel := context.WithTimeoutCause(cmd.Context(), a.timeout, gaveUp{a.timeout})
		a.cancel = cancel
		cmd.SetContext(ctx)
	}
	return nil
}

func (a *app) close() {
	if a.cancel != nil {
		a.cancel()
	}
	if a.conn != nil {
		a.conn.close()
	}
}

// finish gives every command of the tree what all have: usage errors with exit
// status 2, and subcommands that are missing or unknown reported as such.
func finish(cmd *cobra.Command) {
	cmd.Flags().SortFlags = false
	cmd.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return usagef(c, "%s", err) })
	if check := cmd.Args; check != nil {
		cmd.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return usagef(c, "%s", err)
			}
			return nil
		}
	}
	if cmd.HasSubCommands() && cmd.RunE == nil {
		cmd.Args = cobra.ArbitraryArgs
		cmd.RunE = func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return c.Help()
			}
			problem := fmt.Sprintf("%q is not a command of %q", args[0], c.CommandPath())
			if near := c.SuggestionsFor(args[0]); len(near) > 0 {
				problem += "; did you mean " + strings.Join(near, " or ") + "?"
			}
			return usagef(c, "%s", problem)
		}
		cmd.SuggestionsMinimumDistance = 2
	}
	for _, child := range cmd.Commands() {
		finish(child)
	}
}

// usageError is a command line that makes no sense.
type usageError struct {
	problem string
	command string
}

func (e *usageError) Error() string { return e.problem }

func usagef(cmd *cobra.Command, format string, args ...any) error {
	if already := (*usageError)(nil); len(args) == 1 {
		if err, ok := args[0].(error); ok && errors.As(err, &already) {
			return already
		}
	}
	return &usageError{problem: fmt.Sprintf(format, args...), command: cmd.CommandPath()}
}

// must is for what fails only when this program is wrong.
func must(err error) {
	if err != nil {
		panic(err)
	}
}
