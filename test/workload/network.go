package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

func listen(ctx context.Context, s streams, args []string) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", args[0])
	if err != nil {
		return err
	}
	return echo(ctx, s, l, "")
}

func greet(ctx context.Context, s streams, args []string) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", args[0])
	if err != nil {
		return err
	}
	return echo(ctx, s, l, args[1]+"\n")
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
	l, err := guestListen(ctx, args[0], args[1])
	if err != nil {
		return err
	}
	return echo(ctx, s, l, "")
}

// guestWedge listens and never accepts: the first connection waits for ever,
// the next ones cannot even begin.
func guestWedge(ctx context.Context, s streams, args []string) error {
	l, err := guestListen(ctx, args[0], args[1])
	if err != nil {
		return err
	}
	defer l.Close()
	if listener, ok := l.(syscall.Conn); ok {
		raw, err := listener.SyscallConn()
		if err != nil {
			return err
		}
		var shrunk error
		// A second listen(2) changes the backlog.
		if err := raw.Control(func(fd uintptr) { shrunk = syscall.Listen(int(fd), 0) }); err != nil || shrunk != nil {
			return errors.Join(err, shrunk)
		}
	}
	fmt.Fprintln(s.stdout, "listening on", l.Addr())
	<-ctx.Done()
	return nil
}

// inMachine is the folder that stands for vsock.
const inMachine = "vsock"

// guestListen listens where the guest channel is looked for.
func guestListen(ctx context.Context, dir, port string) (net.Listener, error) {
	if dir == inMachine {
		return listenVsock(port)
	}
	path := filepath.Join(dir, port+".sock")
	// Left by an earlier life, which was killed.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	// Whoever dials is another user on the host than this one is.
	if err := os.Chmod(path, 0o666); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// echo sends a greeting and then what comes in back on each connection to l,
// and with the end of the incoming stream ends the outgoing one. It closes l and
// returns nil when ctx ends; open connections end with the process.
func echo(ctx context.Context, s streams, l net.Listener, greeting string) error {
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
			_, _ = io.WriteString(c, greeting)
			_, _ = io.Copy(c, c) // a peer that hangs up is no error of ours
		}()
	}
}
