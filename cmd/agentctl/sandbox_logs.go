package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// logFlags are the flags of `sandbox logs`.
type logFlags struct {
	follow, stdout, stderr, timestamps bool
	tail, since                        string
}

func (a *app) sandboxLogs() *cobra.Command {
	f := &logFlags{}
	cmd := &cobra.Command{
		Use:   "logs NAME",
		Short: "Print what a sandbox's workload printed",
		Long: `Print what a sandbox's workload printed: its stdout to stdout, its stderr to
stderr. With -f, go on until it ends; if the agent restarts meanwhile, the output
continues where it stopped.`,
		Example: `  agentctl sandbox logs web
  agentctl sandbox logs -f --tail 20 web
  agentctl sandbox logs --since 10m --timestamps --stderr web
  agentctl sandbox logs web -o json | jq -r .data`,
		Args:              exactly("NAME"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := f.request(cmd, args[0], time.Now())
			if err != nil {
				return err
			}
			return a.logs(cmd.Context(), req, f.timestamps)
		},
	}
	flags := cmd.Flags()
	flags.BoolVarP(&f.follow, "follow", "f", false, "go on until the workload ends")
	flags.StringVarP(&f.tail, "tail", "n", "all", "only the last `n` lines, or all")
	flags.StringVar(&f.since, "since", "", "only what was printed since: a `duration` ago (10m), or an RFC 3339 time")
	flags.BoolVar(&f.stdout, "stdout", false, "only stdout")
	flags.BoolVar(&f.stderr, "stderr", false, "only stderr")
	flags.BoolVarP(&f.timestamps, "timestamps", "t", false, "begin each line with its time")
	return cmd
}

func (f *logFlags) request(cmd *cobra.Command, name string, now time.Time) (*agentv1.StreamSandboxLogsRequest, error) {
	req := &agentv1.StreamSandboxLogsRequest{Name: name, Follow: f.follow}
	if f.tail != "all" {
		n, err := strconv.ParseUint(f.tail, 10, 32)
		if err != nil {
			return nil, usagef(cmd, "--tail: %q is neither a number of lines nor all", f.tail)
		}
		lines := uint32(n)
		req.Tail = &lines
	}
	if f.since != "" {
		at, err := time.Parse(time.RFC3339Nano, f.since)
		if err != nil {
			ago, err := parseDuration(f.since)
			if err != nil {
				return nil, usagef(cmd, "--since: %q is neither a duration (10m) nor an RFC 3339 time (2026-01-02T15:04:05Z)", f.since)
			}
			at = now.Add(-ago)
		}
		req.Since = timestamppb.New(at)
	}
	if f.stdout {
		req.Streams = append(req.Streams, agentv1.LogStream_LOG_STREAM_STDOUT)
	}
	if f.stderr {
		req.Streams = append(req.Streams, agentv1.LogStream_LOG_STREAM_STDERR)
	}
	return req, nil
}

// logs prints a log. While following, a connection that drops is made again
// and the log resumed after the last entry seen.
func (a *app) logs(ctx context.Context, req *agentv1.StreamSandboxLogsRequest, timestamps bool) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	w := &logWriter{a: a, timestamps: timestamps, atLineStart: [2]bool{true, true}}
	for {
		err := w.copy(ctx, c, req)
		connected, _ := c.link.state()
		if !lost(err) || !req.GetFollow() || !connected {
			return c.link.explain(ctx, err)
		}
		if err := c.reconnect(ctx); err != nil {
			return err
		}
		if w.last != nil {
			req.Since, req.Tail = w.last, nil
			w.skip = w.seen
		}
	}
}

// reconnect waits until an agent that went away answers again.
func (c *client) reconnect(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, reconnectTimeout, gaveUp{reconnectTimeout})
	defer cancel()
	for {
		if _, err := c.host.GetInfo(ctx, &agentv1.GetInfoRequest{}); err == nil || ctx.Err() != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// logWriter prints log entries and remembers where it is.
type logWriter struct {
	a          *app
	timestamps bool

	atLineStart [2]bool                // of stdout and of stderr
	last        *timestamppb.Timestamp // of the last entry
	seen        int                    // entries that had that very time
	skip        int                    // of the next entries of that time
}

func (w *logWriter) copy(ctx context.Context, c *client, req *agentv1.StreamSandboxLogsRequest) error {
	stream, err := c.sandboxes.StreamSandboxLogs(ctx, req)
	if err != nil {
		return err
	}
	for {
		entry, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if w.known(entry) {
			continue
		}
		if err := w.print(entry); err != nil {
			return err
		}
	}
}

// known reports whether an entry was printed before the log was resumed.
func (w *logWriter) known(entry *agentv1.StreamSandboxLogsResponse) bool {
	same := w.last != nil && w.last.AsTime().Equal(entry.GetTime().AsTime())
	if same && w.skip > 0 {
		w.skip--
		return true
	}
	w.skip = 0
	if same {
		w.seen++
	} else {
		w.last, w.seen = entry.GetTime(), 1
	}
	return false
}

// logLine is what a log entry is for programs.
type logLine struct {
	Time   time.Time `json:"time"`
	Stream string    `json:"stream"`
	Data   string    `json:"data"`
}

func (w *logWriter) print(entry *agentv1.StreamSandboxLogsResponse) error {
	to, stream, i := w.a.stdout, "stdout", 0
	if entry.GetStream() == agentv1.LogStream_LOG_STREAM_STDERR {
		to, stream, i = w.a.stderr, "stderr", 1
	}
	if w.a.forPrograms() {
		return w.a.printEvent(logLine{entry.GetTime().AsTime(), stream, string(entry.GetData())})
	}
	data := entry.GetData()
	if w.timestamps && w.atLineStart[i] {
		if _, err := fmt.Fprint(to, entry.GetTime().AsTime().Format("2006-01-02T15:04:05.000Z07:00"), " "); err != nil {
			return err
		}
	}
	if len(data) > 0 {
		w.atLineStart[i] = data[len(data)-1] == '\n'
	}
	_, err := to.Write(data)
	return err
}
