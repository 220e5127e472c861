package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// runWorkload behaves as those subcommands of test/workload that package
// drivertest uses: see there for what they do. The suite is run on both, so
// they cannot come apart unnoticed.
func runWorkload(args []string, stdout, stderr io.Writer) int {
	// Handled to the end: one that comes twice is not to kill it on its way out.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGTERM, syscall.SIGINT)
	go func() { <-asked; cancel() }()
	code, err := workload(ctx, args, stdout, stderr)
	if err != nil {
		fmt.Fprintf(stderr, "workload %s: %v\n", strings.Join(args, " "), err)
		return max(code, 1)
	}
	return code
}

// workload returns the exit status, or an error for which it is 1 or more.
func workload(ctx context.Context, args []string, stdout, stderr io.Writer) (int, error) {
	args = append(args, "", "")
	switch name, args := args[0], args[1:]; name {
	case "sleep":
		return 0, runOn(ctx, stdout)
	case "ignore-term":
		signal.Ignore(syscall.SIGTERM, syscall.SIGINT)
		return 0, runOn(context.Background(), stdout)
	case "ready-after":
		return 0, readyAfter(ctx, args[0], args[1], stdout)
	case "exit":
		code, err := strconv.Atoi(args[0])
		if err == nil && args[1] != "" && !pause(ctx, args[1], &err) {
			code = 0
		}
		return code, err
	case "spew":
		n, err := strconv.Atoi(args[0])
		for i := 1; i <= n && err == nil; i++ {
			err = printLine(i, stdout, stderr)
		}
		return 0, err
	case "print-loop":
		for i := 1; ; i++ {
			err := printLine(i, stdout, stderr)
			if err != nil || !pause(ctx, args[0], &err) {
				return 0, err
			}
		}
	case "write":
		if err := appendTo(args[0], args[1]+"\n"); err != nil {
			return 1, err
		}
		return 0, runOn(ctx, stdout)
	case "cat":
		data, err := os.ReadFile(args[0])
		if err == nil {
			_, err = stdout.Write(data)
		}
		return 0, err
	case "test-file":
		_, err := os.Stat(args[0])
		return 0, err
	case "guest-echo", "guest-wedge":
		return 0, serveGuest(ctx, args[0], args[1], name == "guest-echo", stdout)
	}
	return 2, errors.New("unknown subcommand")
}

func runOn(ctx context.Context, stdout io.Writer) error {
	if _, err := fmt.Fprintln(stdout, "ready"); err != nil {
		return err
	}
	for ctx.Done() == nil {
		time.Sleep(time.Hour) // which is no deadlock
	}
	<-ctx.Done()
	return nil
}

func readyAfter(ctx context.Context, after, file string, stdout io.Writer) error {
	// An earlier life's. Never a device: a test may name one, and run as root.
	if info, err := os.Lstat(file); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", file)
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var err error
	if pause(ctx, after, &err) {
		err = appendTo(file, "")
	}
	if err != nil {
		return err
	}
	return runOn(ctx, stdout)
}

func printLine(i int, stdout, stderr io.Writer) error {
	to := stdout
	if i%2 == 0 {
		to = stderr
	}
	_, err := fmt.Fprintf(to, "line %d\n", i)
	return err
}

func appendTo(path, text string) error {
	file, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = file.WriteString(text)
	return errors.Join(err, file.Close())
}

// serveGuest listens where a guest channel is looked for, and echoes or never
// even accepts.
func serveGuest(ctx context.Context, dir, port string, accepts bool, stdout io.Writer) error {
	// A socket's path has room for 107 bytes, see unix(7); a folder's for 4095.
	if err := os.Chdir(dir); err != nil {
		return err
	}
	name := filepath.Base(port + ".sock")
	if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	socket, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	if err := syscall.Bind(socket, &syscall.SockaddrUnix{Name: name}); err != nil {
		return err
	}
	backlog := 128
	if !accepts {
		backlog = 0 // the first that waits to be accepted fills it
	}
	if err := syscall.Listen(socket, backlog); err != nil {
		return err
	}
	if accepts {
		listener, err := net.FileListener(os.NewFile(uintptr(socket), name))
		if err != nil {
			return err
		}
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				go func() {
					defer conn.Close()
					_, _ = io.Copy(conn, conn)
				}()
			}
		}()
	}
	if _, err := fmt.Fprintf(stdout, "listening on %s\n", filepath.Join(dir, name)); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// pause waits, and reports false if ctx ended first, or if the duration is
// none, which goes to err.
func pause(ctx context.Context, duration string, err *error) bool {
	d, parseErr := time.ParseDuration(duration)
	if parseErr != nil {
		*err = parseErr
		return false
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
