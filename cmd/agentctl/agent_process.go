package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

const (
	// comeUpLimit is how long an agent that was started may take to answer.
	comeUpLimit = 30 * time.Second
	// endLimit is how long one that was told to stop may take.
	endLimit = 40 * time.Second
	// lastChance is how long somebody else may still come to answer, after the
	// agent that was started has ended: two may have been started at once.
	lastChance = 2 * time.Second
	// longLog is from where on a log file is begun anew.
	longLog = 16 << 20
)

// listener returns the process that listens on a unix socket, as the kernel
// knows it; 0 if it is not told. Errors are net.Dial's.
func listener(ctx context.Context, path string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	pid := 0
	err = raw.Control(func(fd uintptr) { pid = peerOf(int(fd)) }) //nolint:gosec // a descriptor
	return pid, err
}

// nobodyListens reports whether that is what an error of a dial says.
func nobodyListens(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, errConnectionRefused)
}

// findAgent is the agent's program: given, or the one beside agentctl, or else
// in PATH. Where PATH leads to the one beside agentctl by another name, as by a
// link that the next release moves, it is that name.
func findAgent(given string) (string, error) {
	if given != "" {
		path, err := filepath.Abs(given)
		if err != nil {
			return "", err
		}
		if _, err := exec.LookPath(path); err != nil {
			return "", sandbox.Invalidf("--agent-binary", "%s: %s", path, unwrapAll(err))
		}
		return path, nil
	}
	inPath, err := exec.LookPath("agent")
	if err == nil {
		inPath, err = filepath.Abs(inPath)
	}
	if self, selfErr := os.Executable(); selfErr == nil {
		beside := filepath.Join(filepath.Dir(self), "agent")
		if _, besideErr := exec.LookPath(beside); besideErr == nil && (err != nil || !sameFile(beside, inPath)) {
			return beside, nil
		}
	}
	if err != nil {
		return "", withHint(fmt.Errorf("the agent's program: neither beside agentctl nor in PATH: %w", sandbox.ErrNotFound),
			"install both from one release, or give --agent-binary PATH")
	}
	return inPath, nil
}

func sameFile(a, b string) bool {
	one, err := os.Stat(a)
	if err != nil {
		return false
	}
	other, err := os.Stat(b)
	return err == nil && os.SameFile(one, other)
}

// tryConfig has the agent say whether it could run with these flags.
func tryConfig(ctx context.Context, u unit) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Second, gaveUp{10 * time.Second})
	defer cancel()
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, u.program, append([]string{"check-config"}, u.args...)...)
	cmd.Stderr = &stderr
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", cmd, context.Cause(ctx))
	}
	said := strings.TrimPrefix(strings.TrimSpace(stderr.String()), "agent: ")
	if said == "" {
		said = unwrapAll(err).Error()
	}
	return &hinted{
		sandbox.Invalidf(u.program, "%s", strings.ReplaceAll(said, "\nagent: ", "; ")),
		quoteWords(append([]string{u.program, "check-config"}, u.args...)) + ", after a change",
	}
}

// startDetached starts the agent without a service manager, in a session of its
// own that outlives this one's, with its output in a file. What is returned has
// one error once it has ended.
func startDetached(u unit) (pid int, ended <-chan error, err error) {
	log, err := openLog(u.log)
	if err != nil {
		return 0, nil, err
	}
	defer log.Close()
	cmd := &exec.Cmd{
		Path: u.program, Args: append([]string{u.program}, u.args...), Dir: "/",
		Stdout: log, Stderr: log, SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	keepDescriptors()
	if err := cmd.Start(); err != nil {
		return 0, nil, err
	}
	gone := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		if err == nil {
			err = errors.New("exit status 0")
		}
		gone <- err
	}()
	return cmd.Process.Pid, gone, nil
}

// keepDescriptors passes none of the descriptors that this process was started
// with on: an agent would keep a terminal, or a lock of a script's, for ever.
func keepDescriptors() {
	entries, _ := os.ReadDir("/dev/fd")
	for _, entry := range entries {
		if fd, err := strconv.Atoi(entry.Name()); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
}

// openLog opens a log file for more; one that is long already is put aside as
// PATH.1, in place of the one before.
func openLog(path string) (*os.File, error) {
	if path == "" {
		return nil, withHint(errors.New("no place for the agent's log: HOME is not set"), "set HOME")
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	if info, err := os.Stat(path); err == nil && info.Size() > longLog {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, err
		}
	}
	return os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
}

// comeUp waits until an agent listens on the socket. If ended is not nil it
// tells that process pid, which is to be that agent, has ended; somebody else's
// agent is taken for it only then, or that process could yet take its place.
func comeUp(ctx context.Context, socket string, pid int, ended <-chan error) error {
	over := time.NewTimer(comeUpLimit)
	defer over.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var how error
	for {
		found, err := listener(ctx, socket)
		if err == nil && (ended == nil || found == 0 || found == pid) {
			return nil
		}
		if err != nil && !nobodyListens(err) && ctx.Err() == nil {
			return &connectError{address{"unix", socket}, err}
		}
		select {
		case how = <-ended:
			ended = nil
			over.Reset(lastChance)
		case <-tick.C:
		case <-over.C:
			if how != nil {
				return fmt.Errorf("the agent ended at once: %w: %w", how, sandbox.ErrUnavailable)
			}
			return fmt.Errorf("the agent was started, and nobody listens on %s after %s: %w", socket, comeUpLimit, sandbox.ErrUnavailable)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// endProcess has the agent that listens on a socket end, and waits until it
// has.
func endProcess(ctx context.Context, socket string, pid int) error {
	process, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	defer func() { _ = process.Release() }() // never fails
	// The process that is held now is the one that listens, if it still does.
	if again, err := listener(ctx, socket); err != nil || again != pid {
		return err
	}
	if err := process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		if errors.Is(err, fs.ErrPermission) {
			return withHint(fmt.Errorf("stop the agent, process %d: %w", pid, sandbox.ErrDenied), "this as the user whose agent it is")
		}
		return fmt.Errorf("stop the agent, process %d: %w", pid, err)
	}
	return retry(ctx, endLimit, func() (bool, error) {
		if hasEnded(process) {
			return true, nil
		}
		return false, withHint(fmt.Errorf("the agent, process %d, was told to stop and still runs after %s: %w", pid, endLimit, sandbox.ErrTimeout),
			"kill -KILL %d: the next agent goes on with what it did", pid)
	})
}

// tailCommand prints the end of a file.
func tailCommand(path string, lines int, follow bool) []string {
	command := []string{"tail", "-n", fmt.Sprint(lines)}
	if follow {
		command = append(command, "-F")
	}
	return append(command, path)
}

// logEnd is where a log file ends now; 0 if there is none.
func logEnd(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}

// lastLines returns the last lines of a file after an offset.
func lastLines(path string, after int64, most int) []string {
	file, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer file.Close()
	end, err := file.Seek(0, io.SeekEnd)
	if err != nil || end <= after {
		return nil
	}
	const longest = 16 << 10
	text, err := io.ReadAll(io.NewSectionReader(file, max(after, end-longest), longest))
	if err != nil {
		return nil
	}
	lines := strings.Split(string(bytes.TrimSpace(text)), "\n")
	return lines[max(0, len(lines)-most):]
}
