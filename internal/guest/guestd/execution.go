//go:build linux

package guestd

import (
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

// hangUpLimit is between SIGHUP and SIGKILL.
const hangUpLimit = time.Second

// execution is one exec.
type execution struct {
	drain
	execs   *execs
	id      string
	command []string
	tty     bool
	started time.Time

	input  *os.File // nil: none
	output *os.File // the same as input with a terminal
	errors *os.File // nil: none

	status syscall.WaitStatus // once it has exited

	forget *time.Timer // guarded by execs.mu

	mu       sync.Mutex
	pid      int
	keep     bool
	attached *attachment // nil: nobody
	backlog  backlog
	exit     *guestv1.ExecExit // once all output was read
	retired  bool              // who attaches from then on tells it to itself
}

// attachment is a connection that an exec's output goes to.
type attachment struct {
	conn *wire.Conn
	// ready is closed once what came before was sent.
	ready chan struct{}
}

// onExit is called when the command has ended.
func (x *execution) onExit(status syscall.WaitStatus) {
	x.status = status
	x.end(x.output, x.errors)
}

// close closes guestd's ends. Closing again does nothing.
func (x *execution) close() {
	for _, file := range []*os.File{x.input, x.output, x.errors} {
		if file != nil {
			file.Close()
		}
	}
}

// follow carries the output until the command has ended, and then says so.
func (x *execution) follow() {
	var errorsDone sync.WaitGroup
	if x.errors != nil {
		errorsDone.Go(func() { x.pump(wire.KindStderr, x.errors) })
	}
	x.pump(wire.KindData, x.output)
	errorsDone.Wait()
	<-x.exited
	x.close()
	x.finish(exitOf(x.status))
}

// deliver sends output to whoever is attached, however slow, or else keeps it.
func (x *execution) deliver(kind wire.Kind, data []byte) {
	for {
		x.mu.Lock()
		to := x.attached
		if to == nil {
			x.backlog.add(kind, data)
			x.mu.Unlock()
			return
		}
		x.mu.Unlock()
		<-to.ready
		if to.conn.SendData(kind, data) == nil {
			return
		}
		x.leave(to)
	}
}

// leave notes that somebody is not attached any more, and reports whether
// nobody else took over.
func (x *execution) leave(a *attachment) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.attached != a {
		return false
	}
	x.attached = nil
	return true
}

// finish says how the command ended, to whoever is attached or comes to be.
func (x *execution) finish(exit *guestv1.ExecExit) {
	x.mu.Lock()
	x.exit = exit
	x.mu.Unlock()
	var told *attachment
	for {
		x.mu.Lock()
		to := x.attached
		if to == nil || to == told {
			x.retired = true
			x.execs.retire(x, told == nil && x.keep)
			x.mu.Unlock()
			return
		}
		x.mu.Unlock()
		<-to.ready
		if err := to.conn.Send(exit); err != nil {
			x.leave(to)
			continue
		}
		_ = to.conn.NetConn().SetReadDeadline(time.Now().Add(farewellLimit))
		told = to
	}
}

// hangUp ends the command and all that it left in its session: SIGHUP, as when
// a terminal's line goes dead, and after a while SIGKILL.
func (x *execution) hangUp() {
	children := x.execs.children
	for _, number := range []syscall.Signal{unix.SIGHUP, unix.SIGCONT} { // the latter for one that is stopped
		_, _ = children.signal(x.pid, number, true)
	}
	limit := time.NewTimer(hangUpLimit)
	defer limit.Stop()
	select {
	case <-x.exited:
	case <-limit.C:
		x.killSession()
		return
	}
	// What is left may want as much time to end.
	for pause, number := time.Millisecond, unix.SIGHUP; children.signalSession(x.pid, number); pause *= 2 {
		number = 0
		select {
		case <-limit.C:
			x.killSession()
			return
		case <-time.After(pause):
		}
	}
}

// killSession looks again and again, because what forks while it is being
// killed may be missed.
func (x *execution) killSession() {
	for range 100 {
		if !x.execs.children.signalSession(x.pid, unix.SIGKILL) {
			return
		}
		time.Sleep(time.Millisecond)
	}
}
