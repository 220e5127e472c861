package container

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/containers/podman/v5/pkg/bindings/containers"

	"github.com/choiros/agent/internal/sandbox"
)

// logLimit is how long it may take to read what is there of a log.
const logLimit = 30 * time.Minute

// followLimit stands for no limit at all.
const followLimit = 10 * 365 * 24 * time.Hour

// maxEntry is how long a LogEntry may be.
const maxEntry = 16 << 10

// Logs implements sandbox.LogSource.
func (d *Driver) Logs(ctx context.Context, ref sandbox.Ref, opts sandbox.LogOptions, yield func(sandbox.LogEntry) error) error {
	data, _, err := d.inspect(ctx, ref.ID)
	if err == nil && data == nil {
		err = d.whyAbsent(ctx, ref.ID)
	}
	if err != nil {
		return op("read the log of", ref.ID, err)
	}
	if !opts.Stdout && !opts.Stderr {
		return nil
	}
	tail := opts.Tail
	if tail > 0 && opts.Stdout != opts.Stderr {
		if tail, err = d.tailOfBoth(ctx, data.ID, opts); err != nil {
			return op("read the log of", ref.ID, err)
		}
	}
	return op("read the log of", ref.ID, d.readLog(ctx, data.ID, opts, tail, yield))
}

// tailOfBoth returns how many of the last lines of both streams hold so many of
// one: Podman counts before it chooses.
func (d *Driver) tailOfBoth(ctx context.Context, containerID string, opts sandbox.LogOptions) (int, error) {
	var wanted []int // where the last lines of the chosen stream are
	lines, begins := 0, true
	err := d.readLog(ctx, containerID, sandbox.LogOptions{Stdout: true, Stderr: true}, -1, func(entry sandbox.LogEntry) error {
		if begins && entry.Stderr == opts.Stderr {
			if wanted = append(wanted, lines); len(wanted) > opts.Tail {
				wanted = wanted[1:]
			}
		}
		if begins = strings.HasSuffix(string(entry.Data), "\n"); begins {
			lines++
		}
		return nil
	})
	if err != nil || len(wanted) == 0 {
		return 0, err
	}
	if !begins {
		lines++
	}
	return lines - wanted[0], nil
}

// readLog reads entries from Podman.
func (d *Driver) readLog(ctx context.Context, containerID string, opts sandbox.LogOptions, tail int, yield func(sandbox.LogEntry) error) error {
	options := new(containers.LogOptions).WithTimestamps(true).
		WithFollow(opts.Follow).WithStdout(opts.Stdout).WithStderr(opts.Stderr)
	if tail >= 0 {
		options = options.WithTail(strconv.Itoa(tail))
	}
	if !opts.Since.IsZero() {
		options = options.WithSince(opts.Since.UTC().Format(time.RFC3339Nano))
	}
	limit := logLimit
	if opts.Follow {
		limit = followLimit
	}
	// The bindings send to these and take no notice of a context, so they are
	// received from until Logs has returned. Unbuffered, they keep the order.
	stdout, stderr, done := make(chan string), make(chan string), make(chan error, 1)
	reading, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		done <- d.call(reading, limit, func(ctx context.Context) error {
			return containers.Logs(ctx, containerID, options, stdout, stderr)
		})
	}()
	var refused error
	take := func(frame string, isStderr bool) {
		if refused != nil || ctx.Err() != nil {
			return
		}
		if refused = deliver(frame, isStderr, yield); refused != nil {
			stop()
		}
	}
	for {
		select {
		case frame := <-stdout:
			take(frame, false)
		case frame := <-stderr:
			take(frame, true)
		case err := <-done:
			if refused != nil {
				return refused
			}
			return err
		}
	}
}

// deliver yields what Podman sent as one frame: a line of the log with its time
// in front, or a part of one.
func deliver(frame string, isStderr bool, yield func(sandbox.LogEntry) error) error {
	stamp, text, ok := strings.Cut(frame, " ")
	// Podman writes whole seconds before version 5.5.
	when, err := time.Parse(time.RFC3339Nano, stamp)
	if !ok || err != nil {
		return fmt.Errorf("%w: a log entry without a time: %.40q", sandbox.ErrCorrupt, frame)
	}
	for text != "" {
		part := text[:min(len(text), maxEntry)]
		text = text[len(part):]
		if err := yield(sandbox.LogEntry{Time: when, Stderr: isStderr, Data: []byte(part)}); err != nil {
			return err
		}
	}
	return nil
}
