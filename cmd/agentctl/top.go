package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// topFlags are the flags of `top`.
type topFlags struct {
	selector, interval string
	once               bool
}

func (a *app) topCommand() *cobra.Command {
	f := &topFlags{}
	cmd := &cobra.Command{
		Use:   "top [NAME]",
		Short: "Watch what running sandboxes use",
		Long: `Watch what running sandboxes use, as seen from inside. On a terminal it is a live
view; otherwise, and with --once, lines. With -o json, each round of samples is a
line of JSON. Watching does not count as activity.

Keys: c, m, n, d, p sort by CPU, memory, network, disk and processes, a by name;
up and down (or k and j) select; enter shows the processes of the selected
sandbox, esc goes back; space pauses; q quits.`,
		Example: `  agentctl top
  agentctl top web --interval 500ms
  agentctl top --selector tier=web
  agentctl top --once`,
		Args:              atMost(1),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			interval, err := parseDuration(f.interval)
			if err == nil && (interval < 100*time.Millisecond || interval > time.Minute) {
				err = fmt.Errorf("%q is not from 100ms to 1m", f.interval)
			}
			if err != nil {
				return usagef(cmd, "--interval: %s", err)
			}
			req := &agentv1.StreamStatsRequest{LabelSelector: f.selector, Interval: durationpb.New(interval), Once: f.once}
			if len(args) > 0 {
				req.Name = args[0]
			}
			return a.top(cmd.Context(), req)
		},
	}
	cmd.Flags().StringVarP(&f.selector, "selector", "l", "", "only those with these labels: `key=value,key!=value,key,!key`")
	cmd.Flags().StringVar(&f.interval, "interval", "1s", "`duration` between two rounds, from 100ms to 1m")
	cmd.Flags().BoolVar(&f.once, "once", false, "print one round and end")
	return cmd
}

func (a *app) top(ctx context.Context, req *agentv1.StreamStatsRequest) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	keyboard, screen := terminalOf(a.stdin), terminalOf(a.stdout)
	switch {
	case req.GetOnce():
		return a.topOnce(ctx, c, req)
	case a.forPrograms() || !a.out.live || keyboard == nil || screen == nil:
		return a.topLines(ctx, c, req)
	}
	return a.topScreen(ctx, c, req)
}

// rounds calls see for each round of samples until the stream ends.
func (c *client) rounds(ctx context.Context, req *agentv1.StreamStatsRequest, see func(*agentv1.StreamStatsResponse) error) error {
	stream, err := c.stats.StreamStats(ctx, req)
	if err != nil {
		return c.link.explain(ctx, err)
	}
	for {
		round, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return c.link.explain(ctx, err)
		}
		if err := see(round); err != nil {
			return err
		}
	}
}

// topOnce prints one round. What is used by the second takes two, an interval
// apart.
func (a *app) topOnce(ctx context.Context, c *client, req *agentv1.StreamStatsRequest) error {
	state := newTopState()
	if a.forPrograms() {
		return c.rounds(ctx, req, func(round *agentv1.StreamStatsResponse) error { return a.printEvent(round) })
	}
	for i := range 2 {
		if i > 0 {
			select {
			case <-time.After(req.GetInterval().AsDuration()):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		err := c.rounds(ctx, req, func(round *agentv1.StreamStatsResponse) error {
			state.add(round)
			return nil
		})
		if err != nil {
			return err
		}
		if len(state.order()) == 0 {
			break
		}
	}
	return a.writeTop(state)
}

// topLines prints a table for each round until ctx ends.
func (a *app) topLines(ctx context.Context, c *client, req *agentv1.StreamStatsRequest) error {
	state := newTopState()
	rounds := 0
	return c.rounds(ctx, req, func(round *agentv1.StreamStatsResponse) error {
		if a.forPrograms() {
			return a.printEvent(round)
		}
		state.add(round)
		if rounds++; rounds == 1 && len(round.GetSamples()) > 0 {
			return nil // it has no rates yet
		}
		return a.writeTop(state)
	})
}

// writeTop prints a round as a table without anything that moves.
func (a *app) writeTop(state *topState) error {
	rows := state.order()
	if len(rows) == 0 {
		fmt.Fprintln(a.stderr, "no running sandboxes")
		return nil
	}
	if a.quiet {
		for _, r := range rows {
			fmt.Fprintln(a.stdout, r.name)
		}
		return nil
	}
	t := table{heads: []string{"NAME", "CPU", "MEMORY", "LIMIT", "NET IN", "NET OUT", "DISK READ", "DISK WRITE", "ROOT", "PROCESSES"}}
	for _, r := range rows {
		s, limit, root := r.last, "", ""
		if s.GetMemoryLimitBytes() > 0 {
			limit = size(s.GetMemoryLimitBytes())
		}
		if s.GetRootSizeBytes() > 0 {
			root = size(s.GetRootUsedBytes())
		}
		t.add(plain(r.name), plain(percentText(r.cpuMillis)), plain(size(s.GetMemoryBytes())), plain(limit),
			plain(rateText(r.netIn)), plain(rateText(r.netOut)), plain(rateText(r.diskRead)), plain(rateText(r.diskWrite)),
			plain(root), plain(fmt.Sprint(s.GetProcesses())))
	}
	return t.write(a.stdout, a.out.bold)
}
