package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/choiros/agent/internal/location"
	"github.com/choiros/agent/internal/sandbox"
)

// agentUnit is the agent as it is to run here.
func (a *app) agentUnit(program, config string) (unit, error) {
	var err error
	u := unit{log: location.On(a.on.goos, a.getenv, a.on.uid).Log}
	if u.program, err = findAgent(program); err != nil {
		return u, err
	}
	if config != "" {
		if config, err = filepath.Abs(config); err != nil {
			return u, err
		}
		u.args = append(u.args, "--config", config)
	}
	if addr, asked, err := a.askedAddress(); err != nil {
		return u, err
	} else if asked {
		u.args = append(u.args, "--socket", addr.location)
	}
	for _, name := range passedOn(a.on.goos) {
		value := a.getenv(name)
		if name != "PATH" && !filepath.IsAbs(value) { // as internal/location has it
			continue
		}
		u.env = append(u.env, [2]string{name, value})
	}
	for _, word := range u.words() {
		if !utf8.ValidString(word) || strings.ContainsFunc(word, unicode.IsControl) {
			return u, withHint(sandbox.Invalidf(fmt.Sprintf("%q", word), "has what cannot be written into a unit"), "another path")
		}
	}
	return u, nil
}

// passedOn is what a service is to know of the environment that agentctl runs
// in, so that both look in the same places. launchd's own PATH is bare.
func passedOn(goos string) []string {
	if goos == "darwin" {
		return []string{"PATH", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"}
	}
	return []string{"XDG_CONFIG_HOME", "XDG_STATE_HOME"} // systemd has XDG_RUNTIME_DIR
}

// words is all that goes into a unit.
func (u unit) words() []string {
	words := append([]string{u.program, u.log}, u.args...)
	for _, v := range u.env {
		words = append(words, v[1])
	}
	return words
}

// install makes the agent a service, or makes the service anew.
func (a *app) install(ctx context.Context, program, config string) error {
	c, err := a.localClient()
	if err != nil {
		return err
	}
	s := a.service()
	if err := s.check(ctx); err != nil {
		return err
	}
	u, err := a.agentUnit(program, config)
	if err != nil {
		return err
	}
	if a.on.goos == "linux" && strings.ContainsAny(u.program, `'"\`) {
		return withHint(sandbox.Invalidf(u.program, "systemd starts no program whose path has quotes or backslashes"), "--agent-binary with another path")
	}
	replaced, err := ours(s.target())
	if err != nil {
		return err
	}
	if err := tryConfig(ctx, u); err != nil {
		return err
	}
	if err := a.nobodyElse(ctx, s, c.address); err != nil {
		return err
	}
	shown := a.newProgress("agent")
	shown.say("starting it", false)
	err = a.loadUnit(ctx, s, u, c.address.location)
	shown.stop()
	if err != nil {
		return err
	}
	if a.on.goos == "linux" && !lingers(a.on.uid) {
		a.notef("it ends with your last logout, and so do sandboxes; sudo loginctl enable-linger %s keeps them", userName(a.on.uid))
	}
	line := "installed " + s.target()
	if replaced {
		line = "installed anew " + s.target()
	}
	return a.confirmAgent(ctx, c, line+"; the agent answers at "+c.address.String())
}

// loadUnit writes the unit and waits for the agent that it starts.
func (a *app) loadUnit(ctx context.Context, s service, u unit, socket string) error {
	if err := writeUnit(s.target(), s.text(u)); err != nil {
		return err
	}
	before := logEnd(u.log)
	err := s.load(ctx)
	if err == nil {
		err = comeUp(ctx, socket, 0, nil)
	}
	if err == nil || ctx.Err() != nil {
		return err
	}
	a.showLastLog(ctx, s, u.log, before)
	return withHint(fmt.Errorf("%s is installed, and the agent does not run: %w", s.target(), err),
		"%s", orElse(hintOf(err), "agentctl agent logs, then agentctl agent install again, or agentctl agent uninstall"))
}

// nobodyElse refuses to install a service while an agent runs that is not it:
// the two would be in each other's way.
func (a *app) nobodyElse(ctx context.Context, s service, addr address) error {
	pid, err := listener(ctx, addr.location)
	if err != nil {
		if nobodyListens(err) {
			return nil
		}
		return &connectError{addr, err}
	}
	if s.file() != "" {
		state, err := s.state(ctx)
		if err != nil || state.running && (pid == 0 || state.pid == 0 || state.pid == pid) {
			return err
		}
	}
	return withHint(fmt.Errorf("an agent runs already that no service keeps (process %d): %w", pid, sandbox.ErrState),
		"agentctl agent stop, then this again; sandboxes run on")
}

// showLastLog prints the end of the agent's log, as far as it can be had.
func (a *app) showLastLog(ctx context.Context, s service, path string, after int64) {
	const most = 5
	var lines []string
	if command := s.logs(most, false); s.file() == "" || command[0] == "tail" {
		lines = lastLines(path, after, most)
	} else if text, err := runTool(ctx, command[0], command[1:]...); err == nil {
		lines = strings.Split(strings.TrimSpace(text), "\n")
	}
	if len(lines) == 0 || lines[0] == "" {
		return
	}
	fmt.Fprintln(a.stderr, "The last that the agent logged:")
	for _, line := range lines {
		fmt.Fprintln(a.stderr, a.err.dim("  | ")+oneLine(line))
	}
}

// uninstall removes all that install made, and the log.
func (a *app) uninstall(ctx context.Context) error {
	c, err := a.localClient()
	if err != nil {
		return err
	}
	s := a.service()
	there, err := ours(s.target())
	if err != nil {
		return err
	}
	if other := s.file(); !there && other != "" {
		return withHint(fmt.Errorf("%s: %w: agentctl did not make it", other, sandbox.ErrState), "remove it as it was installed")
	}
	var removed []string
	remove := func(path string) error {
		err := os.Remove(path)
		if err == nil {
			removed = append(removed, path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return err
	}
	if there {
		// Where nobody is logged in launchd has nothing to forget.
		if err := s.check(ctx); err != nil && (a.on.goos != "darwin" || a.on.uid == 0) {
			return err
		}
		if err := s.unload(ctx, func() error { return remove(s.target()) }); err != nil {
			return err
		}
		removeEmpty(s.target(), a.getenv("HOME"))
	}
	places := location.On(a.on.goos, a.getenv, a.on.uid)
	if pid, running := runsStill(ctx, c.address.location, places.Socket); running {
		a.notef("an agent runs that no service keeps (process %d), and stays; agentctl agent stop ends it", pid)
	} else if err := a.removeRest(places, remove); err != nil {
		return err
	}
	return a.confirmRemoved(places, s, removed)
}

// runsStill reports whether anybody listens on one of several sockets, or it
// cannot be told.
func runsStill(ctx context.Context, sockets ...string) (pid int, running bool) {
	for _, socket := range sockets {
		if pid, err := listener(ctx, socket); !nobodyListens(err) {
			return pid, true
		}
	}
	return 0, false
}

// removeRest removes what the agent left where agentctl put it: its log, and
// the lock beside the socket.
func (a *app) removeRest(places location.Places, remove func(string) error) error {
	for _, path := range []string{places.Log, places.Log + ".1", places.Socket + ".lock"} {
		if err := remove(path); err != nil {
			return err
		}
		removeEmpty(path, filepath.Dir(filepath.Dir(path)))
	}
	return nil
}

// removeEmpty removes the folders of a file that are empty now, up to one that
// stays.
func removeEmpty(path, stays string) {
	for dir := filepath.Dir(path); strings.HasPrefix(dir, stays+"/"); dir = filepath.Dir(dir) {
		if os.Remove(dir) != nil {
			return // there is something in it
		}
	}
}

func (a *app) confirmRemoved(places location.Places, s service, removed []string) error {
	var kept []string
	for _, path := range []string{places.State, places.Config, s.target() + ".d"} {
		if path != "" && exists(path) {
			kept = append(kept, path)
		}
	}
	if a.forPrograms() {
		return a.print(struct {
			Removed []string `json:"removed"`
			Kept    []string `json:"kept"`
		}{append([]string{}, removed...), append([]string{}, kept...)})
	}
	if a.quiet {
		return nil
	}
	for _, path := range removed {
		fmt.Fprintln(a.stdout, "removed "+oneLine(path))
	}
	if len(removed) == 0 {
		fmt.Fprintln(a.stdout, "nothing was installed")
	}
	for _, path := range kept {
		fmt.Fprintln(a.stdout, "kept    "+oneLine(path))
	}
	if len(removed) > 0 {
		fmt.Fprintln(a.stdout, "sandboxes that run go on; an agent with that data finds them again")
	}
	return nil
}

// startAgent starts the agent by its service, or in the background if there is
// none, and waits until it answers. It returns what was done, for people.
func (a *app) startAgent(ctx context.Context, socket string) (string, error) {
	s := a.service()
	if s.file() != "" {
		before := logEnd(location.On(a.on.goos, a.getenv, a.on.uid).Log)
		if err := s.start(ctx); err != nil {
			return "", err
		}
		if err := comeUp(ctx, socket, 0, nil); err != nil {
			a.showLastLog(ctx, s, location.On(a.on.goos, a.getenv, a.on.uid).Log, before)
			return "", withHint(err, "agentctl agent status, and agentctl agent logs")
		}
		return "started the agent, as " + s.file() + " says", nil
	}
	u, err := a.agentUnit("", "")
	if err != nil {
		return "", err
	}
	before := logEnd(u.log)
	pid, ended, err := startDetached(u)
	if err != nil {
		return "", err
	}
	if err := comeUp(ctx, socket, pid, ended); err != nil {
		if ctx.Err() == nil {
			a.showLastLog(ctx, s, u.log, before)
		}
		return "", withHint(err, "agentctl agent logs")
	}
	return fmt.Sprintf("started the agent in the background (process %d, log %s)", pid, u.log), nil
}

// stopAgent stops the agent that listens on the socket, by its service if that
// runs it or none listens. It reports whether one ran.
func (a *app) stopAgent(ctx context.Context, socket string) (bool, error) {
	s := a.service()
	pid, err := listener(ctx, socket)
	if err != nil && !nobodyListens(err) {
		return false, &connectError{address{"unix", socket}, err}
	}
	listens := err == nil
	if s.file() != "" {
		state, err := s.state(ctx)
		if err != nil {
			return false, err
		}
		if state.running && (pid == 0 || state.pid == 0 || state.pid == pid) {
			return true, s.stop(ctx)
		}
	}
	switch {
	case !listens:
		return false, nil
	case pid == 0:
		return false, fmt.Errorf("the agent at %s: its process cannot be told: %w", socket, sandbox.ErrUnsupported)
	}
	return true, endProcess(ctx, socket, pid)
}

// needAgent sees to it that an agent answers before something is asked of it
// that takes one: on this host one is started if that was asked for, or a
// person agrees.
func (a *app) needAgent(ctx context.Context, cmd *cobra.Command, c *client, asked bool) error {
	if c.address.network != "unix" {
		if asked {
			return usagef(cmd, "--start-agent: starts an agent of this host, and %s is another's", c.address)
		}
		return nil
	}
	_, err := listener(ctx, c.address.location)
	if !nobodyListens(err) {
		return nil // whatever else is wrong, the request says it
	}
	if !asked {
		agreed, askErr := a.agreesToStart(ctx)
		if askErr != nil {
			return askErr
		}
		if !agreed {
			return withHint(&connectError{c.address, err}, "%s --start-agent, or agentctl agent install, which starts it at every login", cmd.CommandPath())
		}
	}
	line, err := a.startAgent(ctx, c.address.location)
	if err != nil {
		return err
	}
	a.notef("%s", line)
	return nil
}

// agreesToStart asks whether to start the agent, if there is somebody to ask.
func (a *app) agreesToStart(ctx context.Context) (bool, error) {
	keyboard := terminalOf(a.stdin)
	if keyboard == nil || terminalOf(a.stderr) == nil || a.quiet {
		return false, nil
	}
	fmt.Fprint(a.stderr, "No agent runs on this host. Start it? [Y/n] ")
	answered := make(chan string, 1) // a read of a terminal cannot be cut short
	go func() {
		// A terminal gives a line at a time; what was typed after it stays there.
		line, _ := bufio.NewReaderSize(io.LimitReader(keyboard, 256), 256).ReadString('\n')
		answered <- line
	}()
	select {
	case line := <-answered:
		switch strings.ToLower(strings.TrimSpace(line)) {
		case "y", "yes":
			return true, nil
		case "":
			return strings.HasSuffix(line, "\n"), nil // not at the end of the input
		}
		return false, nil
	case <-ctx.Done():
		fmt.Fprintln(a.stderr)
		return false, context.Cause(ctx)
	}
}
