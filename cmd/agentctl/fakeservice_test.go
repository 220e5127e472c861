package main

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/choiros/agent/internal/location"
)

// fakeHost is a host of which the scripts' service managers and agents keep
// what they have in one folder, FAKE_HOST: each is a process of its own.
//
//	calls     each command that launchctl, systemctl or journalctl was given
//	failures  lines COMMAND|STATUS|TEXT: the next command that begins so fails
//	broken    if it is there, agents end at once and say what is in it
//	agents/   a file for each agent that runs, named after its process
//	job       the process of the service that is loaded
type fakeHost string

func (h fakeHost) path(name string) string { return filepath.Join(string(h), name) }

// die ends a fake with a status.
func die(status int, text string) {
	fmt.Fprintln(os.Stderr, text)
	os.Exit(status)
}

func check(err error) {
	if err != nil {
		die(70, err.Error())
	}
}

// called notes a command, and fails it if that was ordered.
func (h fakeHost) called(program string) {
	line := strings.Join(append([]string{program}, os.Args[1:]...), " ")
	file, err := os.OpenFile(h.path("calls"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	check(err)
	_, err = fmt.Fprintln(file, line)
	check(err)
	file.Close()
	text, _ := os.ReadFile(h.path("failures"))
	orders := strings.Split(strings.TrimSpace(string(text)), "\n")
	for i, order := range orders {
		parts := strings.SplitN(order, "|", 3)
		if len(parts) < 3 || !strings.HasPrefix(line+" ", parts[0]+" ") {
			continue
		}
		check(os.WriteFile(h.path("failures"), []byte(strings.Join(slices.Delete(orders, i, i+1), "\n")), 0o644))
		status, err := strconv.Atoi(parts[1])
		check(err)
		die(status, parts[2])
	}
}

// launch starts a service's process, and notes that it is loaded.
func (h fakeHost) launch(words, env []string, log string) {
	output, err := os.OpenFile(log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	check(err)
	cmd := &exec.Cmd{
		Path: words[0], Args: words, Dir: "/", Stdout: output, Stderr: output, SysProcAttr: &syscall.SysProcAttr{Setsid: true},
		Env: append([]string{
			"HOME=" + os.Getenv("HOME"), "PATH=" + os.Getenv("PATH"),
			"FAKE_HOST=" + string(h), "FAKE_GOOS=" + os.Getenv("FAKE_GOOS"),
		}, env...),
	}
	check(cmd.Start())
	check(os.WriteFile(h.path("job"), []byte(fmt.Sprint(cmd.Process.Pid)), 0o644))
}

// job is the process of the service; 0 if none is loaded.
func (h fakeHost) job() int {
	text, _ := os.ReadFile(h.path("job"))
	pid, _ := strconv.Atoi(string(text))
	return pid
}

// runs reports whether a process does.
func runs(pid int) bool {
	process, err := os.FindProcess(pid)
	return pid > 0 && err == nil && !hasEnded(process)
}

// end ends the service's process and forgets it.
func (h fakeHost) end() {
	pid := h.job()
	if runs(pid) {
		_ = syscall.Kill(pid, syscall.SIGTERM)
	}
	for deadline := time.Now().Add(20 * time.Second); runs(pid); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			die(70, "the service does not end")
		}
	}
	check(os.Remove(h.path("job")))
}

// endAll kills the agents that a script left.
func (h fakeHost) endAll() {
	files, _ := os.ReadDir(h.path("agents"))
	for _, file := range files {
		if pid, err := strconv.Atoi(file.Name()); err == nil {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// fakeLaunchctl does what agentctl asks of launchctl.
func fakeLaunchctl() {
	h := fakeHost(os.Getenv("FAKE_HOST"))
	h.called("launchctl")
	const domain, job = "gui/501", "gui/501/choiros.agent"
	notFound := func() { die(113, `Could not find service "choiros.agent" in domain for user gui: 501`) }
	switch args := os.Args[1:]; strings.Join(args[:min(2, len(args))], " ") {
	case "print " + domain:
		fmt.Println("gui/501 = {\n\ttype = login\n}")
	case "print " + job:
		switch pid := h.job(); {
		case pid == 0:
			notFound()
		case runs(pid):
			fmt.Printf("%s = {\n\tstate = running\n\tpid = %d\n\tlast exit code = (never exited)\n}\n", job, pid)
		default:
			fmt.Printf("%s = {\n\tstate = spawn scheduled\n\tlast exit code = 1\n}\n", job)
		}
	case "print-disabled " + domain:
		text, _ := os.ReadFile(h.path("disabled"))
		fmt.Printf("\tdisabled services = {\n%s\t}\n", text)
	case "enable " + job:
		check(os.WriteFile(h.path("disabled"), []byte("\t\t\"choiros.agent\" => enabled\n"), 0o644))
	case "bootstrap " + domain:
		if h.job() != 0 {
			die(5, "Bootstrap failed: 5: Input/output error")
		}
		text, err := os.ReadFile(args[2])
		check(err)
		value, err := parsePlist(string(text))
		check(err)
		dict := value.(map[string]any)
		var words, env []string
		for _, word := range dict["ProgramArguments"].([]any) {
			words = append(words, word.(string))
		}
		if variables, ok := dict["EnvironmentVariables"].(map[string]any); ok {
			for name, value := range variables {
				env = append(env, name+"="+value.(string))
			}
		}
		h.launch(words, env, dict["StandardErrorPath"].(string))
	case "kickstart " + job:
		if h.job() == 0 {
			notFound()
		}
	case "bootout " + job:
		if h.job() == 0 {
			die(3, "Boot-out failed: 3: No such process")
		}
		h.end()
	default:
		die(64, "unrecognized subcommand: "+strings.Join(args, " "))
	}
}

// fakeSystemctl does what agentctl asks of systemctl --user.
func fakeSystemctl() {
	h := fakeHost(os.Getenv("FAKE_HOST"))
	h.called("systemctl")
	args := os.Args[1:]
	if len(args) < 2 || args[0] != "--user" {
		die(1, "not the user's service manager")
	}
	dir := os.Getenv("HOME") + "/.config/systemd/user"
	file, link := filepath.Join(dir, systemdUnit), filepath.Join(dir, "default.target.wants", systemdUnit)
	switch line := strings.Join(args[1:], " "); {
	case line == "show --property=UnitPath --value":
		fmt.Println("/etc/systemd/user", dir)
	case strings.HasPrefix(line, "show ") && strings.HasSuffix(line, " "+systemdUnit):
		state, pid := "inactive", h.job()
		if runs(pid) {
			state = "active"
		} else {
			pid = 0
		}
		enabled := "disabled"
		if exists(link) {
			enabled = "enabled"
		}
		fmt.Printf("LoadState=loaded\nActiveState=%s\nMainPID=%d\nUnitFileState=%s\nResult=success\nExecMainStatus=0\n", state, pid, enabled)
	case line == "daemon-reload", line == "reset-failed "+systemdUnit:
	case line == "enable "+systemdUnit:
		check(os.MkdirAll(filepath.Dir(link), 0o755))
		_ = os.Remove(link)
		check(os.Symlink(file, link))
	case line == "disable --now "+systemdUnit, line == "stop "+systemdUnit:
		if h.job() != 0 {
			h.end()
		}
		if strings.HasPrefix(line, "disable") {
			_ = os.Remove(link)
			_ = os.Remove(filepath.Dir(link))
		}
	case line == "start "+systemdUnit && runs(h.job()):
	case line == "start "+systemdUnit, line == "restart "+systemdUnit:
		if h.job() != 0 {
			h.end()
		}
		h.startUnit(file)
	default:
		die(1, "Unknown command verb "+line)
	}
}

// startUnit starts what a unit says.
func (h fakeHost) startUnit(file string) {
	text, err := os.ReadFile(file)
	check(err)
	var words, env []string
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		parsed, err := parseWords(strings.ReplaceAll(value, "%%", "%"))
		switch key {
		case "ExecStart":
			check(err)
			words = parsed
		case "Environment":
			check(err)
			env = append(env, parsed...)
		}
	}
	if exists(h.path("broken")) {
		die(1, "Job for choiros-agent.service failed because the control process exited with error code.")
	}
	h.launch(words, append(env, "XDG_RUNTIME_DIR="+os.Getenv("XDG_RUNTIME_DIR")), h.path("journal"))
}

// fakeJournalctl prints what services printed.
func fakeJournalctl() {
	h := fakeHost(os.Getenv("FAKE_HOST"))
	h.called("journalctl")
	text, _ := os.ReadFile(h.path("journal"))
	fmt.Print(string(text))
}

// fakeAgentProgram is an agent that keeps the fake's sandboxes.
func fakeAgentProgram() {
	h := fakeHost(os.Getenv("FAKE_HOST"))
	socket := location.On(os.Getenv("FAKE_GOOS"), os.Getenv, 1000).Socket
	args := os.Args[1:]
	checks := len(args) > 0 && args[0] == "check-config"
	if checks {
		args = args[1:]
	}
	for i := 0; i+1 < len(args); i += 2 {
		switch args[i] {
		case "--socket":
			socket = args[i+1]
		case "--config":
			text, err := os.ReadFile(args[i+1])
			if err != nil || strings.Contains(string(text), "nonsense") {
				die(2, "agent: "+args[i+1]+": unknown key nonsense\nagent: socket: is missing")
			}
		}
	}
	if checks {
		return
	}
	if text, err := os.ReadFile(h.path("broken")); err == nil {
		die(1, string(text))
	}
	fmt.Fprintf(os.Stderr, "agent starts args=%q state_home=%s\n", args, os.Getenv("XDG_STATE_HOME"))
	check(os.MkdirAll(filepath.Dir(socket), 0o700))
	lock, err := os.OpenFile(socket+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	check(err)
	defer lock.Close()
	if syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		die(1, "somebody listens already")
	}
	check(os.MkdirAll(h.path("agents"), 0o755))
	mine := filepath.Join(h.path("agents"), fmt.Sprint(os.Getpid()))
	check(os.WriteFile(mine, nil, 0o644))
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	agent := newFakeAgent("unix", socket)
	check(agent.start())
	<-stop
	agent.close()
	check(os.Remove(mine))
}

// onMachine is agentctl as it is on a machine of another kind.
func onMachine(on machine) func() {
	return func() { os.Exit(runOn(on, os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Getenv)) }
}

// programs are what scripts can run.
func programs() map[string]func() {
	return map[string]func(){
		"agentctl":   main,
		"macctl":     onMachine(machine{"darwin", 501}),
		"mac-root":   onMachine(machine{"darwin", 0}),
		"linuxctl":   onMachine(machine{"linux", 1000}),
		"linux-root": onMachine(machine{"linux", 0}),
		"launchctl":  fakeLaunchctl, "systemctl": fakeSystemctl, "journalctl": fakeJournalctl, "agent": fakeAgentProgram,
	}
}

// setupFakeHost gives a script a host with nothing on it.
func setupFakeHost(env *testscript.Env) error {
	h := fakeHost(filepath.Join(env.WorkDir, "host"))
	env.Setenv("FAKE_HOST", string(h))
	env.Setenv("FAKE_GOOS", "linux")
	env.Defer(h.endAll)
	return os.MkdirAll(string(h), 0o755)
}
