//go:build linux

package guestd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

// workload is what the sandbox is for, and what there is before it runs.
type workload struct {
	children   *processes
	command    []string // unless Configure says another
	dir        string   // where it runs; empty if that cannot be told
	secretsDir string
	// machine: guestd is in a virtual machine, with a clock of its own.
	machine bool
	// owner: the host's name inside is the sandbox's.
	owner bool
	// What is known once a machine was made, and nil otherwise: who runs it,
	// where it prints, and what is to be told the name.
	account *account
	streams *streams
	name    func(hostname string)
	// system: without a command, what the system runs is the workload.
	system bool
	// started is closed once the workload runs.
	started chan struct{}
	// answered is closed once the agent was told that the workload was started.
	answered chan struct{}
	// ended is sent to once.
	ended chan ending

	// update is held while secrets are replaced, so that they are in the end
	// those of one caller.
	updating sync.Mutex

	mu         sync.Mutex
	starting   *start // the Configure that is being obeyed, or was
	phase      guestv1.Greeting_Phase
	generation uint64
	pid        int
	env        []string // of the workload, and of execs; never changed in place
}

// start is one Configure on its way.
type start struct {
	generation uint64
	done       chan struct{}
	err        error // once done
}

// ending is why guestd is to end.
type ending struct {
	code int
	err  error
}

// endError is why there will be no workload.
type endError struct {
	code int
	err  error
}

func (e *endError) Error() string { return e.err.Error() }

func (e *endError) Unwrap() error { return e.err }

func newWorkload(o options, first bool, children *processes, buffers *sync.Pool) *workload {
	machine := strings.HasPrefix(o.listen, "vsock:")
	dir, err := os.Getwd()
	if err != nil {
		dir = ""
	}
	w := &workload{
		children: children, command: o.command, dir: dir, secretsDir: o.secretsDir,
		machine: machine, owner: machine || first,
		started: make(chan struct{}), answered: make(chan struct{}), ended: make(chan ending, 1),
		phase: guestv1.Greeting_PHASE_WAITING,
	}
	if o.machine {
		w.system = !first
		w.streams = newStreams(buffers)
	}
	if !o.machine || !first { // the kernel's is of no use to anybody
		w.env = merge(nil, os.Environ())
	}
	return w
}

func (w *workload) state() (guestv1.Greeting_Phase, uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.phase, w.generation
}

// environment returns that of the workload. It is not to be changed.
func (w *workload) environment() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.env
}

// configure starts the workload if it does not run, and returns its pid and
// whether this is the call that started it, after whose answer the caller
// closes answered. Those who ask while it is being started share its fate. An
// *endError is one after which end is to be called.
func (w *workload) configure(ctx context.Context, call *guestv1.Configure) (pid int, started bool, err error) {
	w.mu.Lock()
	other := w.starting
	if other == nil {
		w.starting = &start{generation: call.GetGeneration(), done: make(chan struct{})}
	}
	mine := w.starting
	w.mu.Unlock()
	if other == nil {
		mine.err = w.begin(call)
		fatal, _ := errors.AsType[*endError](mine.err)
		if mine.err != nil && fatal == nil {
			w.mu.Lock()
			w.starting = nil // it may be tried again
			w.mu.Unlock()
		}
		close(mine.done)
	}
	select {
	case <-mine.done:
	case <-ctx.Done():
		return 0, false, ctx.Err()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case mine.generation != call.GetGeneration():
		return 0, false, failuref(guestv1.Failure_CODE_STATE, "configured for generation %d already", mine.generation)
	case mine.err != nil:
		return 0, false, mine.err
	}
	return w.pid, other == nil, nil
}

// begin does what a Configure says.
func (w *workload) begin(call *guestv1.Configure) error {
	overrides, err := environmentOf(call.GetEnv())
	if err != nil {
		return err
	}
	secrets, err := w.takeSecrets(call.GetSecrets())
	if err != nil {
		return err
	}
	w.adopt(call)
	env := w.environment()
	if name := call.GetHostname(); w.name != nil && name != "" && variable(env, "HOSTNAME") == "" {
		env = merge(env, []string{"HOSTNAME=" + name})
	}
	env = merge(merge(env, overrides), secrets)
	command := call.GetCommand()
	if len(command) == 0 {
		command = w.command
	}
	if err := w.launch(command, env, call.GetGeneration()); err != nil {
		code := exitDenied
		if codeOf(err) == guestv1.Failure_CODE_NOT_FOUND {
			code = exitNotFound
		}
		return &endError{code, fmt.Errorf("start the workload: %w", err)}
	}
	return nil
}

// rejoin takes a workload that was restored with its machine's memory into the
// boot that this is.
func (w *workload) rejoin(call *guestv1.Rejoin) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case !w.machine || w.phase != guestv1.Greeting_PHASE_RUNNING:
		return failuref(guestv1.Failure_CODE_STATE, "there is no machine with a workload that runs")
	case call.GetGeneration() < w.generation:
		return failuref(guestv1.Failure_CODE_STATE, "generation %d: this is %d already", call.GetGeneration(), w.generation)
	}
	if call.GetTime() != nil {
		if err := setClock(call.GetTime()); err != nil {
			return err
		}
	}
	stir(call.GetEntropy())
	w.generation, w.starting.generation = call.GetGeneration(), call.GetGeneration()
	return nil
}

// stir puts entropy into the kernel's pool and has all that is random from now
// on depend on it, as far as guestd may.
func stir(entropy []byte) {
	if len(entropy) == 0 {
		return
	}
	pool, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return
	}
	defer pool.Close()
	_, _ = pool.Write(entropy[:min(len(entropy), maxEntropy)])
	_ = unix.IoctlSetInt(int(pool.Fd()), unix.RNDRESEEDCRNG, 0) // see random(4)
}

// adopt makes the sandbox the one that the agent means. None of it keeps the
// workload from starting: what may not be set in here has been set outside.
func (w *workload) adopt(call *guestv1.Configure) {
	stir(call.GetEntropy())
	if name := call.GetHostname(); name != "" && w.owner {
		_ = unix.Sethostname([]byte(name))
		if w.name != nil {
			w.name(name)
		}
	}
	if call.GetTime() != nil && w.machine {
		_ = setClock(call.GetTime())
	}
}

const maxEntropy = 256

func (w *workload) launch(command, env []string, generation uint64) error {
	if len(command) == 0 && w.system {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.run(0, env, generation)
		return nil
	}
	if len(command) == 0 {
		return failuref(guestv1.Failure_CODE_INVALID, "neither Configure nor guestd's command line says a command")
	}
	path, err := lookup(command[0], w.dir, env)
	if err != nil {
		return err
	}
	attr := &syscall.ProcAttr{Env: env, Files: []uintptr{0, 1, 2}}
	if w.streams == nil {
		attr.Sys = sessionOfWorkload()
	} else {
		theirs, err := w.streams.open(w.account)
		defer closeAll(theirs)
		if err != nil {
			return err
		}
		attr.Files = []uintptr{uintptr(theirs[0]), uintptr(theirs[1]), uintptr(theirs[2])} //nolint:gosec // Descriptors that are open.
		attr.Sys = &syscall.SysProcAttr{Setsid: true, Credential: w.account.credential()}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	pid, err := w.children.start(path, command, attr, w.exited)
	if err != nil {
		return fmt.Errorf("%s: %w", command[0], startError(err))
	}
	w.run(pid, env, generation)
	return nil
}

// run notes, with mu held, that the workload runs.
func (w *workload) run(pid int, env []string, generation uint64) {
	w.pid, w.env, w.generation, w.phase = pid, env, generation, guestv1.Greeting_PHASE_RUNNING
	close(w.started)
}

// sessionOfWorkload gives the workload a session of its own, which it would
// have as process 1, so that what it sends its group does not come to guestd.
// With a terminal it stays in guestd's session, which the terminal belongs to,
// in front.
func sessionOfWorkload() *syscall.SysProcAttr {
	if _, err := unix.IoctlGetTermios(0, unix.TCGETS); err == nil {
		if group, err := unix.IoctlGetInt(0, unix.TIOCGPGRP); err == nil && group != 0 {
			return &syscall.SysProcAttr{Foreground: true, Ctty: 0}
		}
	}
	return &syscall.SysProcAttr{Setsid: true}
}

// exited is called when the workload has ended.
func (w *workload) exited(status syscall.WaitStatus) {
	if w.streams != nil {
		w.streams.exit()
	}
	w.end(ending{code: int(exitOf(status).GetCode())})
}

// end ends guestd, in a way that was not decided before.
func (w *workload) end(e ending) {
	w.mu.Lock()
	w.phase = guestv1.Greeting_PHASE_ENDING
	w.mu.Unlock()
	select {
	case w.ended <- e:
	default:
	}
}

// answerLimit is how long an agent may take to read an answer that is all that
// keeps guestd from exiting.
const answerLimit = time.Second

// awaitAnswer returns once the agent was told of the start: a workload may end
// sooner than that.
func (w *workload) awaitAnswer() {
	select {
	case <-w.answered:
	case <-time.After(answerLimit):
	}
}

// exitOf is how a process ended, with the code that a shell would say.
func exitOf(status syscall.WaitStatus) *guestv1.ExecExit {
	if status.Signaled() {
		number := int32(status.Signal()) //nolint:gosec // At most 64.
		return &guestv1.ExecExit{Code: exitSignalBase + number, Signal: number}
	}
	return &guestv1.ExecExit{Code: int32(status.ExitStatus())} //nolint:gosec // At most 255.
}

// signal sends the workload a signal, and reports whether there is one. It
// alone gets it, not its group, as process 1 alone gets what a container is
// sent: whether its children are to hear is for the workload to say.
func (w *workload) signal(number syscall.Signal) bool {
	w.mu.Lock()
	pid := w.pid
	w.mu.Unlock()
	if pid == 0 {
		return false
	}
	_, _ = w.children.signal(pid, number, false)
	return true
}

// update replaces secrets once the workload runs, and returns the names of
// those whose values are new.
func (w *workload) update(call *guestv1.UpdateSecrets) ([]string, error) {
	number := call.GetSignal()
	if number < 0 || number > maxSignal {
		return nil, failuref(guestv1.Failure_CODE_INVALID, "signal %d: there are 1 to %d", number, maxSignal)
	}
	w.updating.Lock()
	defer w.updating.Unlock()
	if phase, _ := w.state(); phase != guestv1.Greeting_PHASE_RUNNING {
		return nil, failuref(guestv1.Failure_CODE_STATE, "the workload does not run")
	}
	changed := w.changed(call.GetSecrets())
	secrets, err := w.takeSecrets(call.GetSecrets())
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	w.env = merge(w.env, secrets)
	w.mu.Unlock()
	if number != 0 && (len(changed) > 0 || call.GetAlwaysSignal()) {
		w.signal(syscall.Signal(number))
	}
	return changed, nil
}
