package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/choiros/agent/internal/sandbox"
)

// systemd keeps the agent in the user's own service manager, or, if root asks,
// as what root's has under that name: see systemctl(1).
type systemd struct {
	uid    int
	config string // the folder of the user's configuration
	getenv func(string) string
}

func (s *systemd) text(u unit) string { return u.service() }

func (s *systemd) target() string { return filepath.Join(s.config, "systemd/user", systemdUnit) }

// file looks where systemd does: systemd.unit(5).
func (s *systemd) file() string {
	dirs := systemdDirs()
	if s.uid != 0 {
		dirs = []string{filepath.Dir(s.target()), "/etc/systemd/user", "/run/systemd/user", "/usr/local/lib/systemd/user", "/usr/lib/systemd/user"}
	}
	for _, dir := range dirs {
		if path := filepath.Join(dir, systemdUnit); exists(path) {
			return path
		}
	}
	return ""
}

// systemdDirs are where units of the system's are.
func systemdDirs() []string {
	return []string{"/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}
}

// scope is the flag for the user's service manager; none for the system's.
func (s *systemd) scope() []string {
	if s.uid == 0 {
		return nil
	}
	return []string{"--user"}
}

func (s *systemd) systemctl(ctx context.Context, args ...string) (string, error) {
	text, err := runTool(ctx, "systemctl", append(s.scope(), args...)...)
	if err == nil {
		return text, nil
	}
	if s.uid != 0 {
		if problem := s.check(ctx); problem != nil {
			return "", problem
		}
	}
	if codeOf(err) != -1 {
		return text, &hinted{err, "systemctl " + strings.Join(append(s.scope(), "status", systemdUnit), " ") + ", which tells more"}
	}
	return text, err
}

func (s *systemd) check(ctx context.Context) error {
	if s.uid == 0 {
		return withHint(fmt.Errorf("the agent is a service of the user whose sandboxes it keeps, and not of root: %w", sandbox.ErrUnsupported),
			"this as that user, without sudo; docs/agent.md has what a unit of the system's needs")
	}
	const without = "agentctl agent start, which needs no service manager"
	if _, err := exec.LookPath("systemctl"); err != nil {
		return unavailable(without, "this host has no systemd")
	}
	if s.getenv("XDG_RUNTIME_DIR") == "" && s.getenv("DBUS_SESSION_BUS_ADDRESS") == "" {
		return unavailable(fmt.Sprintf("log in as this user (not with su or sudo), or: export XDG_RUNTIME_DIR=/run/user/%d", s.uid),
			"your service manager cannot be found: neither XDG_RUNTIME_DIR nor DBUS_SESSION_BUS_ADDRESS is set")
	}
	text, err := runTool(ctx, "systemctl", "--user", "show", "--property=UnitPath", "--value")
	if err != nil {
		return unavailable("sudo loginctl enable-linger "+userName(s.uid)+", which starts it; or "+without, "your service manager does not answer: %w", err)
	}
	if dir := filepath.Dir(s.target()); !slices.Contains(strings.Fields(text), dir) {
		return unavailable("unset XDG_CONFIG_HOME, or set it for the service manager too (environment.d(5)) and log in again",
			"your service manager does not read %s", dir)
	}
	return nil
}

func (s *systemd) state(ctx context.Context) (serviceState, error) {
	text, err := s.systemctl(ctx, "show", "--property=LoadState,ActiveState,MainPID,UnitFileState,Result,ExecMainStatus", systemdUnit)
	if err != nil {
		return serviceState{}, err
	}
	return unitState(text), nil
}

// unitState reads the properties of a unit.
func unitState(text string) serviceState {
	properties := map[string]string{}
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		properties[name] = value
	}
	state := serviceState{
		running: slices.Contains([]string{"active", "reloading", "deactivating"}, properties["ActiveState"]),
		atLogin: strings.HasPrefix(properties["UnitFileState"], "enabled"),
	}
	state.pid, _ = strconv.Atoi(properties["MainPID"])
	if properties["LoadState"] == "masked" {
		state.ended = "masked"
	} else if result := properties["Result"]; result != "" && result != "success" {
		state.ended = result
		if status := properties["ExecMainStatus"]; status != "" && status != "0" {
			state.ended += ", status " + status
		}
	}
	return state
}

func (s *systemd) load(ctx context.Context) error {
	for _, args := range [][]string{{"daemon-reload"}, {"enable", systemdUnit}, {"restart", systemdUnit}} {
		if _, err := s.systemctl(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

func (s *systemd) start(ctx context.Context) error {
	_, err := s.systemctl(ctx, "start", systemdUnit)
	return err
}

func (s *systemd) stop(ctx context.Context) error {
	_, err := s.systemctl(ctx, "stop", systemdUnit)
	return err
}

func (s *systemd) unload(ctx context.Context, remove func() error) error {
	if _, err := s.systemctl(ctx, "disable", "--now", systemdUnit); err != nil {
		return err
	}
	if err := remove(); err != nil {
		return err
	}
	_, err := s.systemctl(ctx, "daemon-reload")
	// Whether it had failed is of no interest any more; if not, this fails.
	_, _ = s.systemctl(ctx, "reset-failed", systemdUnit)
	return err
}

func (s *systemd) logs(lines int, follow bool) []string {
	unit := "--user-unit"
	if s.uid == 0 {
		unit = "--unit"
	}
	command := []string{"journalctl", unit, systemdUnit, "--output=cat", "--quiet", "--no-pager", "--lines=" + strconv.Itoa(lines)}
	if follow {
		command = append(command, "--follow")
	}
	return command
}

// lingers reports whether the user's services outlive the last login, as far
// as it can be told: loginctl(1).
func lingers(uid int) bool { return exists("/var/lib/systemd/linger/" + userName(uid)) }
