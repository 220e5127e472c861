package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// Exit statuses of launchctl: errno(2), and codes of its own that `launchctl
// error CODE` explains.
const (
	launchNoProcess  = 3
	launchInputError = 5 // also said of a job that is still on its way out
	launchExists     = 17
	launchInProgress = 36
	launchAlready    = 37
	launchNoDomain   = 112
	launchNoService  = 113
	launchDisabled   = 119
	launchNotInThis  = 125 // "Domain does not support specified action"
)

// launchd keeps the agent in the domain of the user's login at the screen: see
// launchctl(1).
type launchd struct {
	uid  int
	home string
	log  string
}

func (l *launchd) domain() string     { return "gui/" + strconv.Itoa(l.uid) }
func (l *launchd) job() string        { return l.domain() + "/" + launchdLabel }
func (l *launchd) text(u unit) string { return u.plist() }

func (l *launchd) target() string {
	return filepath.Join(l.home, "Library/LaunchAgents", launchdLabel+".plist")
}

func (l *launchd) file() string {
	if l.uid == 0 || !exists(l.target()) {
		return ""
	}
	return l.target()
}

func (l *launchd) check(ctx context.Context) error {
	if l.uid == 0 {
		return withHint(fmt.Errorf("root has no login at the screen that launchd could keep an agent in: %w", sandbox.ErrUnsupported),
			"this as yourself, without sudo: the agent needs no root")
	}
	if _, err := runTool(ctx, "launchctl", "print", l.domain()); err != nil {
		return l.explain(err)
	}
	return nil
}

// explain makes an error of launchctl's one that a person can act on.
func (l *launchd) explain(err error) error {
	switch codeOf(err) {
	case launchNoDomain, launchNotInThis:
		return unavailable("log in at the Mac's screen and run this there; without that, agentctl agent start runs the agent until the Mac restarts",
			"launchd has no place for your agents while you are not logged in at the Mac's screen (over ssh is not enough): %w", err)
	case launchInputError, launchDisabled:
		return unavailable("allow the agent in System Settings > General > Login Items & Extensions, then this again; "+
			"plutil -lint "+quoteWords([]string{l.target()})+" tells if the file is at fault", "launchd refuses the agent: %w", err)
	case launchInProgress, launchAlready:
		return unavailable("this again in a minute: launchctl print "+l.job()+" shows what it waits for", "launchd is still busy with the agent: %w", err)
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || codeOf(err) == -1 {
		return err
	}
	return withHint(err, "launchctl print %s, which tells more", l.job())
}

func (l *launchd) state(ctx context.Context) (serviceState, error) {
	s := serviceState{atLogin: l.file() != ""}
	text, err := runTool(ctx, "launchctl", "print", l.job())
	switch codeOf(err) {
	case launchNoService, launchNoDomain, launchNotInThis, launchNoProcess:
		return s, nil
	}
	if err != nil {
		return s, l.explain(err)
	}
	jobState(text, &s)
	return s, nil
}

// jobState reads what `launchctl print` says of a job. Its form is no promise
// of Apple's, so nothing rests on it but what people are told, and a process
// number that is compared with the socket's.
func jobState(text string, s *serviceState) {
	s.running = true
	for line := range strings.Lines(text) {
		// Lines of inner blocks are indented further.
		line = strings.TrimRight(line, "\n")
		name, value, found := strings.Cut(strings.TrimPrefix(line, "\t"), " = ")
		if !found || strings.HasPrefix(name, "\t") {
			continue
		}
		switch name {
		case "state":
			s.running = value == "running"
		case "pid":
			s.pid, _ = strconv.Atoi(value)
		case "last exit code":
			if code, _, _ := strings.Cut(value, ":"); code != "0" && code != "(never exited)" {
				s.ended = "exit status " + code
			}
		case "last terminating signal":
			s.ended = "signal " + value
		}
	}
}

func (l *launchd) load(ctx context.Context) error {
	if err := l.stop(ctx); err != nil {
		return err
	}
	return l.bootstrap(ctx)
}

// bootstrap gives launchd the property list, which starts the agent.
func (l *launchd) bootstrap(ctx context.Context) error {
	log, err := openLog(l.log) // launchd makes no folders, and never shortens it
	if err != nil {
		return err
	}
	log.Close()
	// What was disabled once stays so. Of what was not, launchd would note for
	// ever that it was enabled.
	if text, err := runTool(ctx, "launchctl", "print-disabled", l.domain()); err == nil && isDisabled(text) {
		if _, err := runTool(ctx, "launchctl", "enable", l.job()); err != nil {
			return l.explain(err)
		}
	}
	// launchd says that it has let go of a job a little before it has.
	err = retry(ctx, 10*time.Second, func() (bool, error) {
		_, err := runTool(ctx, "launchctl", "bootstrap", l.domain(), l.target())
		switch codeOf(err) {
		case launchInputError, launchExists, launchInProgress, launchAlready:
			return false, err
		}
		return true, err
	})
	if err != nil {
		return l.explain(err)
	}
	return nil
}

// isDisabled reads `launchctl print-disabled`: older ones say true.
func isDisabled(text string) bool {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), `"`+launchdLabel+`" => `); ok {
			return rest == "disabled" || rest == "true"
		}
	}
	return false
}

func (l *launchd) start(ctx context.Context) error {
	_, err := runTool(ctx, "launchctl", "print", l.job())
	if codeOf(err) == launchNoService || codeOf(err) == launchNoProcess {
		return l.bootstrap(ctx)
	}
	if err != nil {
		return l.explain(err)
	}
	if _, err := runTool(ctx, "launchctl", "kickstart", l.job()); err != nil {
		return l.explain(err)
	}
	return nil
}

func (l *launchd) stop(ctx context.Context) error {
	_, err := runTool(ctx, "launchctl", "bootout", l.job())
	switch codeOf(err) {
	case launchNoProcess, launchNoService, launchNoDomain, launchNotInThis:
		return nil
	case launchInProgress:
	default:
		if err != nil {
			return l.explain(err)
		}
	}
	// It may return before the job has gone.
	err = retry(ctx, toolLimit, func() (bool, error) {
		_, err := runTool(ctx, "launchctl", "print", l.job())
		if code := codeOf(err); code == launchNoService || code == launchNoProcess {
			return true, nil
		}
		if err == nil {
			err = &toolError{command: "launchctl bootout " + l.job(), code: launchInProgress, said: "the agent still ends"}
		}
		return false, err
	})
	if err != nil {
		return l.explain(err)
	}
	return nil
}

func (l *launchd) unload(ctx context.Context, remove func() error) error {
	if err := l.stop(ctx); err != nil {
		return err
	}
	return remove()
}

func (l *launchd) logs(lines int, follow bool) []string { return tailCommand(l.log, lines, follow) }

// retry calls try until it is done, ctx ends or the time is up; then the
// last error is returned.
func retry(ctx context.Context, limit time.Duration, try func() (done bool, err error)) error {
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		done, err := try()
		if done {
			return err
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
