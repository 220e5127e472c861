package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/choiros/agent/internal/location"
	"github.com/choiros/agent/internal/sandbox"
)

// toolLimit is how long launchctl or systemctl may take. An agent that is told
// to stop may wait for requests meanwhile.
const toolLimit = 60 * time.Second

// service is the agent as the host's service manager keeps it: launchd on
// macOS, systemd on Linux. It keeps no state: each method asks.
type service interface {
	// file is the unit in force; empty if there is none.
	file() string
	// target is the file that install writes.
	target() string
	// text is what that file says.
	text(u unit) string
	// check says why the service manager cannot be used, with the remedy. It
	// changes nothing.
	check(ctx context.Context) error
	state(ctx context.Context) (serviceState, error)
	// load reads the unit anew, starts the agent with it, ending one that it
	// runs already, and starts it at each login from now on.
	load(ctx context.Context) error
	// start starts the agent unless it runs.
	start(ctx context.Context) error
	// stop ends the agent until the next login.
	stop(ctx context.Context) error
	// unload ends the agent and forgets it; remove, what the unit was in, is
	// called once that holds.
	unload(ctx context.Context, remove func() error) error
	// logs is the command that prints the end of the agent's log.
	logs(lines int, follow bool) []string
}

// serviceState is what a service manager knows of the agent.
type serviceState struct {
	running bool
	pid     int    // 0 if it does not run or is not told
	atLogin bool   // it is started at each login
	ended   string // how it ended last, for people; empty if it did not
}

// machine is the host that services are kept on, apart from its files.
type machine struct {
	goos string
	uid  int
}

func (a *app) service() service {
	places := location.On(a.on.goos, a.getenv, a.on.uid)
	home := a.getenv("HOME")
	if a.on.goos == "darwin" {
		return &launchd{uid: a.on.uid, home: home, log: places.Log}
	}
	config := a.getenv("XDG_CONFIG_HOME")
	if !filepath.IsAbs(config) {
		config = filepath.Join(home, ".config")
	}
	return &systemd{uid: a.on.uid, config: config, getenv: a.getenv}
}

// toolError is a program of the system's that failed.
type toolError struct {
	command string
	code    int    // its exit status; -1 if it did not come to that
	said    string // on either stream
}

func (e *toolError) Error() string {
	if e.said == "" {
		return fmt.Sprintf("%s: exit status %d", e.command, e.code)
	}
	return e.command + ": " + e.said
}

// codeOf is the exit status of a program that failed, or -1.
func codeOf(err error) int {
	if e, ok := errors.AsType[*toolError](err); ok {
		return e.code
	}
	return -1
}

// runTool runs a program of the system's and returns what it printed. An error
// is a *toolError, or the end of ctx.
func runTool(ctx context.Context, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, toolLimit, gaveUp{toolLimit})
	defer cancel()
	var stdout, stderr strings.Builder
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if err == nil {
		return stdout.String(), nil
	}
	if ctx.Err() != nil {
		return "", fmt.Errorf("%s: %w", cmd, context.Cause(ctx))
	}
	failure := &toolError{command: strings.Join(append([]string{name}, args...), " "), code: -1, said: strings.TrimSpace(stderr.String())}
	if failure.said == "" {
		failure.said = strings.TrimSpace(stdout.String())
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		failure.code = exit.ExitCode()
	} else {
		failure.said = unwrapAll(err).Error()
	}
	return "", failure
}

// unavailable is a service manager that cannot be used, with the remedy.
func unavailable(hint, format string, args ...any) error {
	return &hinted{&exitingWith{fmt.Errorf(format, args...), sandbox.FailureOf(sandbox.ErrUnavailable).Exit}, hint}
}

// ours reports whether agentctl made a file, and nil too if there is none.
func ours(path string) (there bool, err error) {
	text, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, err
	case !strings.Contains(string(text), madeBy):
		return true, withHint(fmt.Errorf("%s: %w: agentctl did not make it", path, sandbox.ErrExists),
			"move it away; settings of your own for the agent are best in its config.toml")
	}
	return true, nil
}

// writeUnit replaces a file in one step.
func writeUnit(path, text string) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	file, err := os.CreateTemp(filepath.Dir(path), ".choiros-agent-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(file.Name()))
		}
	}()
	_, err = file.WriteString(text)
	if err == nil {
		err = file.Chmod(0o644) // launchd refuses what others may write
	}
	if err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return err
	}
	return os.Rename(file.Name(), path)
}

// userName is the name of a user, or the number.
func userName(uid int) string {
	number := strconv.Itoa(uid)
	if u, err := user.LookupId(number); err == nil {
		return u.Username
	}
	return number
}
