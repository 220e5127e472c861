package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"
)

func listen(ctx context.Context, s streams, args []string) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", args[0])
	if err != nil {
		return err
	}
	return echo(ctx, s, l)
}

func connect(ctx context.Context, _ streams, args []string) error {
	d := net.Dialer{Timeout: 5 * time.Second}
	c, err := d.DialContext(ctx, "tcp", args[0])
	if err != nil {
		return err
	}
	return c.Close()
}

func guestEcho(ctx context.Context, s streams, args []string) error {
	path := filepath.Join(args[0], args[1]+".sock")
	// Left by an earlier life, which was killed.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return err
	}
	// Whoever dials is another user on the host than this one is.
	if err := os.Chmod(path, 0o666); err != nil {
		return errors.Join(err, l.Close())
	}
	return echo(ctx, s, l)
}

// echo sends back what comes in on each connection to l, and with the end of
// the incoming stream ends the outgoing one. It closes l and returns nil when
// ctx ends; open connections end with the process.
func echo(ctx context.Context, s streams, l net.Listener) error {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	fmt.Fprintln(s.stdout, "listening on", l.Addr())
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return errors.Join(err, l.Close())
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, c) // a peer that hangs up is no error of ours
		}()
	}
}
