//go:build linux

package qemu

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxSaid is how much is kept of what a child says.
	maxSaid = 4 << 10
	// farewell is how long a child has to end after one that it served did.
	farewell = 2 * time.Second
)

// child is a process of a machine's.
type child struct {
	name  string // for people
	cmd   *exec.Cmd
	said  tail
	ended chan struct{} // closed once it was waited for
	err   error         // after that: how it ended, as exec.Cmd.Wait has it
}

// children are the processes of one machine. The kernel kills them when the
// thread that started them ends (PR_SET_PDEATHSIG of prctl(2) is about the
// thread, not the process). So one goroutine, locked to a thread, starts them
// all and stays until the last was waited for. Unlike a pipe or a pidfd whose
// end they would have to watch, that asks nothing of them.
type children struct {
	dir    string
	starts chan func()
	over   chan struct{} // closed once all were waited for
	done   chan struct{} // closed once nobody takes starts
	fall   chan *child   // each child, as it ends, if somebody wants to know

	mu   sync.Mutex
	dead bool // no more are started
	all  []*child
}

// newChildren prepares for children that work in dir.
func newChildren(dir string) *children {
	// What somebody left to be inherited by all of this process's children is
	// not for these. An old kernel cannot, and it matters to no promise but this.
	_ = unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC)
	c := &children{dir: dir, starts: make(chan func()), over: make(chan struct{}), done: make(chan struct{}), fall: make(chan *child)}
	go func() {
		defer close(c.done)
		runtime.LockOSThread()
		// Not unlocked: the thread ends with the goroutine.
		for {
			select {
			case start := <-c.starts:
				start()
			case <-c.over:
				return
			}
		}
	}()
	return c
}

// start runs a program. extra become its descriptors 3 and up, and input and
// output its standard input and output, nil being /dev/null.
func (c *children) start(name, path string, args []string, input, output *os.File, extra ...*os.File) (*child, error) {
	k := &child{name: name, ended: make(chan struct{})}
	// A context would end it with its caller: it ends with the machine.
	k.cmd = &exec.Cmd{
		Path: path, Args: append([]string{path}, args...), Dir: c.dir,
		// One arena instead of one for each thread saves QEMU 1.5 MiB.
		Env:        []string{"LANG=C.UTF-8", "PATH=/usr/bin:/bin", "TMPDIR=.", "MALLOC_ARENA_MAX=1"},
		ExtraFiles: extra, Stderr: &k.said,
		// A session of its own: what a terminal sends its group is not for it.
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setsid: true},
		// Of a descendant that still has its standard error.
		WaitDelay: time.Second,
	}
	if input != nil {
		k.cmd.Stdin = input
	}
	if output != nil {
		k.cmd.Stdout = output
	}
	result := make(chan error, 1)
	select {
	case c.starts <- func() { result <- c.begin(k) }:
	case <-c.done: // the machine has ended meanwhile
		result <- os.ErrProcessDone
	}
	if err := <-result; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		k.err = k.cmd.Wait()
		close(k.ended)
		select {
		case c.fall <- k:
		case <-c.done: // the machine is over, and its end was judged
		}
	}()
	return k, nil
}

func (c *children) begin(k *child) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead {
		return os.ErrProcessDone
	}
	err := k.cmd.Start()
	if err == nil {
		c.all = append(c.all, k)
	}
	return err
}

// signal kills all of them, and waits for nothing.
func (c *children) signal() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dead = true
	for _, k := range c.all {
		// It fails only where the process was waited for. One that is stopped
		// is no exception.
		_ = k.cmd.Process.Kill()
	}
}

// kill ends all of them, waits for that, and lets the thread go.
func (c *children) kill() {
	c.signal()
	c.mu.Lock()
	all := slices.Clone(c.all)
	c.mu.Unlock()
	for _, k := range all {
		<-k.ended
	}
	close(c.over)
	<-c.done
}

// failure says how it ended, and what it last said. It is called after that.
func (k *child) failure() error {
	how := "it ended"
	if k.err != nil && !errors.Is(k.err, exec.ErrWaitDelay) {
		how = k.err.Error()
	}
	if said := k.said.String(); said != "" {
		return fmt.Errorf("%s: %s: %s", k.name, how, said)
	}
	return fmt.Errorf("%s: %s", k.name, how)
}

// tail is a writer that keeps the end of what is written.
type tail struct {
	mu   sync.Mutex
	kept []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.kept = append(t.kept, p[max(0, len(p)-maxSaid):]...)
	if len(t.kept) > 2*maxSaid {
		t.kept = append(t.kept[:0], t.kept[len(t.kept)-maxSaid:]...)
	}
	return len(p), nil
}

// String is one line, without control characters: it becomes part of an error.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := strings.ToValidUTF8(string(t.kept[max(0, len(t.kept)-maxSaid):]), "")
	text = strings.ReplaceAll(strings.TrimSpace(text), "\n", "; ")
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, text)
}
