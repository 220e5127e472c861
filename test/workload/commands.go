package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func find(name string) (command, bool) {
	for _, c := range commands() {
		if n, _, _ := strings.Cut(c.usage, " "); n == name {
			return c, true
		}
	}
	return command{}, false
}

func printUsage(w io.Writer) {
	fmt.Fprintln(w, "usage: workload SUBCOMMAND [ARG...]")
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-22s %s\n", c.usage, c.does)
	}
}

func sleep(ctx context.Context, s streams, _ []string) error {
	fmt.Fprintln(s.stdout, "ready")
	<-ctx.Done()
	return nil
}

func ignoreTerm(_ context.Context, s streams, _ []string) error {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT)
	fmt.Fprintln(s.stdout, "ready")
	for {
		// A timer, so that Go's runtime does not take this for a deadlock.
		time.Sleep(time.Hour)
	}
}

func exit(ctx context.Context, _ streams, args []string) error {
	status, err := number(args[0])
	if err != nil {
		return err
	}
	if len(args) > 1 {
		after, err := duration(args[1])
		if err != nil {
			return err
		}
		if !pause(ctx, after) {
			return nil
		}
	}
	return exitStatus(status)
}

func printLoop(ctx context.Context, s streams, args []string) error {
	interval, err := duration(args[0])
	if err != nil {
		return err
	}
	for i := 1; ; i++ {
		if err := printLine(s, i); err != nil {
			return err
		}
		if !pause(ctx, interval) {
			return nil
		}
	}
}

func spew(_ context.Context, s streams, args []string) error {
	n, err := number(args[0])
	if err != nil {
		return err
	}
	for i := 1; i <= n; i++ {
		if err := printLine(s, i); err != nil {
			return err
		}
	}
	return nil
}

// printLine prints line i: odd ones to stdout, even ones to stderr.
func printLine(s streams, i int) error {
	w := s.stdout
	if i%2 == 0 {
		w = s.stderr
	}
	_, err := fmt.Fprintf(w, "line %d\n", i)
	return err
}

func write(ctx context.Context, s streams, args []string) error {
	f, err := os.OpenFile(args[0], os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(f, args[1])
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return sleep(ctx, s, nil)
}

func readyAfter(ctx context.Context, s streams, args []string) error {
	after, err := duration(args[0])
	if err != nil {
		return err
	}
	// A restarted container keeps its file system: it must not look ready. Only
	// a file is removed: root, outside a container, could remove a device.
	if info, err := os.Lstat(args[1]); err == nil && info.Mode().IsRegular() {
		if err := os.Remove(args[1]); err != nil {
			return err
		}
	}
	fmt.Fprintln(s.stdout, "ready")
	if !pause(ctx, after) {
		return nil
	}
	if err := touch(ctx, s, args[1:]); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

func testFile(_ context.Context, _ streams, args []string) error {
	_, err := os.Stat(args[0])
	return err
}

func fill(ctx context.Context, _ streams, args []string) (err error) {
	n, err := number(args[1])
	if err != nil {
		return err
	}
	f, err := os.Create(args[0])
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	mebibyte := bytes.Repeat([]byte("fill"), 1<<18)
	for range n {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if _, err := f.Write(mebibyte); err != nil {
			return err
		}
	}
	return f.Sync()
}

func touch(_ context.Context, _ streams, args []string) error {
	f, err := os.OpenFile(args[0], os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

func cat(_ context.Context, s streams, args []string) error {
	f, err := os.Open(args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(s.stdout, f)
	return err
}

func args(_ context.Context, s streams, args []string) error {
	for _, a := range args {
		fmt.Fprintf(s.stdout, "%q\n", a)
	}
	return nil
}

func env(_ context.Context, s streams, args []string) error {
	all := os.Environ()
	slices.Sort(all)
	for _, e := range all {
		name, _, _ := strings.Cut(e, "=")
		if len(args) == 0 || slices.Contains(args, name) {
			fmt.Fprintln(s.stdout, e)
		}
	}
	return nil
}

func memory(ctx context.Context, s streams, args []string) error {
	n, err := number(args[0])
	if err != nil {
		return err
	}
	const mebibyte = 1 << 20
	blocks := make([][]byte, n)
	for i := range blocks {
		blocks[i] = make([]byte, mebibyte)
		for at := 0; at < mebibyte; at += 4096 {
			blocks[i][at] = 1
		}
	}
	fmt.Fprintf(s.stdout, "touched %d MiB\n", n)
	err = sleep(ctx, s, nil)
	runtime.KeepAlive(blocks)
	return err
}

func spin(ctx context.Context, s streams, _ []string) error {
	for range runtime.NumCPU() {
		go func() {
			for n := 0; ctx.Err() == nil; {
				n++
			}
		}()
	}
	return sleep(ctx, s, nil)
}

func fork(ctx context.Context, s streams, args []string) error {
	n, err := number(args[0])
	if err != nil {
		return err
	}
	for range n {
		c, err := start("sleep")
		if err != nil {
			return err
		}
		fmt.Fprintln(s.stdout, c.Process.Pid)
	}
	return sleep(ctx, s, nil)
}

func orphan(ctx context.Context, s streams, _ []string) error {
	c, err := start("orphan-child")
	if err != nil {
		return err
	}
	if err := c.Wait(); err != nil {
		return err
	}
	return sleep(ctx, s, nil)
}

func orphanChild(context.Context, streams, []string) error {
	_, err := start("ignore-term")
	return err
}

// start starts this program again, as a subcommand that prints nothing.
func start(subcommand string) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	// No context that ends: the children of this program are to outlive it.
	c := exec.CommandContext(context.Background(), self, subcommand)
	if err := c.Start(); err != nil {
		return nil, err
	}
	return c, nil
}

// pause waits for d and reports false if ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

func number(arg string) (int, error) {
	n, err := strconv.Atoi(arg)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%w: %q is no number of things", errUsage, arg)
	}
	return n, nil
}

func duration(arg string) (time.Duration, error) {
	d, err := time.ParseDuration(arg)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%w: %q is no duration (such as 1s or 200ms)", errUsage, arg)
	}
	return d, nil
}
