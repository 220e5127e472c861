// Command workload is what runs inside the project's own test images: one
// static binary whose subcommands behave well, badly or oddly, so that a test
// can see what a sandbox does about it.
//
// Every subcommand that runs on ends with status 0 on SIGTERM or SIGINT, but
// for ignore-term. Status 2 means that it was called wrongly; status 1 that it
// tried and could not, with the reason on stderr.
//
// It depends on no file of its image, and it has no option that would make one
// subcommand behave like another.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run runs the subcommand args[0] and returns its exit status.
func run(args []string, stdout, stderr io.Writer) int {
	// Even as PID 1, for whom the kernel drops signals that have no handler.
	// To the end: one that comes twice is not to kill it on its way out.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGTERM, syscall.SIGINT)
	go func() { <-asked; cancel() }()
	return runContext(ctx, args, stdout, stderr)
}

// runContext is run, with SIGTERM being the end of ctx.
func runContext(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		printUsage(stderr)
		return 2
	}
	c, ok := find(args[0])
	if !ok {
		fmt.Fprintf(stderr, "workload: unknown subcommand %q\n", args[0])
		printUsage(stderr)
		return 2
	}
	if n := len(args) - 1; n < c.minArgs || n > c.maxArgs {
		fmt.Fprintf(stderr, "usage: workload %s\n", c.usage)
		return 2
	}
	err := c.run(ctx, streams{stdout, stderr}, args[1:])
	var code exitStatus
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	default:
		fmt.Fprintf(stderr, "workload %s: %v\n", args[0], err)
		if errors.Is(err, errUsage) {
			return 2
		}
		return 1
	}
}

// streams is where a subcommand writes.
type streams struct{ stdout, stderr io.Writer }

// exitStatus is the error of a subcommand that was asked to end with a status.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// errUsage is wrapped by the errors of arguments that cannot be understood.
var errUsage = errors.New("bad argument")

// command is one subcommand.
type command struct {
	usage            string // name first
	does             string
	minArgs, maxArgs int
	run              func(ctx context.Context, s streams, args []string) error
}

const anyNumber = 1 << 10

// commands lists the subcommands, in the order of the help text.
func commands() []command {
	return []command{
		{"sleep", "print ready, run until SIGTERM", 0, 0, sleep},
		{"ignore-term", "print ready, run until SIGKILL", 0, 0, ignoreTerm},
		{"exit STATUS [AFTER]", "end with STATUS, after a time", 1, 2, exit},
		{"print-loop INTERVAL", "print numbered lines, odd to stdout, even to stderr", 1, 1, printLoop},
		{"spew N", "print N such lines and end", 1, 1, spew},
		{"write FILE TEXT", "append the line TEXT to FILE, then sleep", 2, 2, write},
		{"ready-after TIME FILE", "print ready, create FILE after TIME, run on", 2, 2, readyAfter},
		{"test-file FILE", "end with 0 if FILE exists, else 1", 1, 1, testFile},
		{"touch FILE", "create FILE if it is absent", 1, 1, touch},
		{"cat FILE", "print FILE", 1, 1, cat},
		{"args [ARG...]", "print each argument quoted, one a line", 0, anyNumber, args},
		{"env [NAME...]", "print the environment, or the named part of it, sorted", 0, anyNumber, env},
		{"id", "print who and how confined this process is, as KEY=VALUE", 0, 0, id},
		{"limits", "print memory.max, pids.max and cpu.max of this cgroup, as KEY=VALUE", 0, 0, limits},
		{"mounts", "print TARGET TYPE OPTIONS of each mount", 0, 0, mounts},
		{"listen HOST:PORT", "accept and echo TCP connections", 1, 1, listen},
		{"greet HOST:PORT TEXT", "accept TCP connections, send each the line TEXT, then echo", 2, 2, greet},
		{"connect HOST:PORT", "end with 0 if a TCP connection succeeds, else 1", 1, 1, connect},
		{"guest-echo DIR PORT", "accept and echo connections to the socket DIR/PORT.sock, or vsock's port PORT if DIR is vsock", 2, 2, guestEcho},
		{"guest-wedge DIR PORT", "listen there and never accept", 2, 2, guestWedge},
		{"fill FILE MIB", "write FILE, of so many mebibytes, and flush it to the disk", 2, 2, fill},
		{"memory MIB", "allocate and touch MIB mebibytes, then sleep", 1, 1, memory},
		{"spin", "keep every CPU busy", 0, 0, spin},
		{"fork N", "start N children that sleep, print their pids, then sleep", 1, 1, fork},
		{"orphan", "start a child whose own child sleeps and ignores SIGTERM, end the former, then sleep", 0, 0, orphan},
		{"orphan-child", "what orphan starts", 0, 0, orphanChild},
	}
}
