//go:build linux

package guestd

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

const (
	// maxExecs is how many may run at a time.
	maxExecs = 256
	// maxEnded is how many that have ended are kept, for endedLimit, because
	// nobody was attached to learn of it.
	maxEnded   = 64
	endedLimit = 10 * time.Minute
)

// execs are the commands that the agent had started.
type execs struct {
	children *processes
	workload *workload
	buffers  *sync.Pool

	mu      sync.Mutex
	last    uint64
	running int
	byID    map[string]*execution
	ended   []*execution // that are kept; the oldest first
}

func newExecs(children *processes, w *workload, buffers *sync.Pool) *execs {
	return &execs{children: children, workload: w, byID: map[string]*execution{}, buffers: buffers}
}

// enter makes room for one more.
func (e *execs) enter(x *execution) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.running >= maxExecs {
		return failuref(guestv1.Failure_CODE_EXHAUSTED, "%d commands run, which is the most", maxExecs)
	}
	e.running++
	e.last++
	x.id = strconv.FormatUint(e.last, 10)
	return nil
}

// add makes one known that has been started.
func (e *execs) add(x *execution) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.byID[x.id] = x
}

// fail takes back an enter.
func (e *execs) fail() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.running--
}

// retire notes that one has ended, and keeps it for a while if that is news.
func (e *execs) retire(x *execution, keep bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.running--
	if !keep {
		delete(e.byID, x.id)
		return
	}
	e.ended = append(e.ended, x)
	if len(e.ended) > maxEnded {
		e.forgetLocked(e.ended[0])
	}
	x.forget = time.AfterFunc(endedLimit, func() { e.forget(x) })
}

// forget drops one that has ended and was kept.
func (e *execs) forget(x *execution) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.forgetLocked(x)
}

func (e *execs) forgetLocked(x *execution) {
	delete(e.byID, x.id)
	e.ended = slices.DeleteFunc(e.ended, func(other *execution) bool { return other == x })
	if x.forget != nil {
		x.forget.Stop()
	}
}

func (e *execs) find(id string) (*execution, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if x, ok := e.byID[id]; ok {
		return x, nil
	}
	return nil, failuref(guestv1.Failure_CODE_NOT_FOUND, "no exec %.64q", id)
}

// all returns those that there are, in the order of their starts.
func (e *execs) all() []*execution {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := make([]*execution, 0, len(e.byID))
	for _, x := range e.byID {
		all = append(all, x)
	}
	slices.SortFunc(all, func(a, b *execution) int {
		return cmp.Or(a.started.Compare(b.started), cmp.Compare(a.id, b.id))
	})
	return all
}

func (e *execs) listExecs(_ context.Context, conn *wire.Conn, _ *guestv1.ListExecs) error {
	var infos []*guestv1.ExecInfo
	for _, x := range e.all() {
		x.mu.Lock()
		infos = append(infos, &guestv1.ExecInfo{
			Id: x.id, Command: clip(x.command), Pid: int32(x.pid), Tty: x.tty, //nolint:gosec // The kernel's numbers have 22 bits.
			Attached: x.attached != nil, StartTime: timestamppb.New(x.started), Exit: x.exit,
		})
		x.mu.Unlock()
	}
	return conn.Send(&guestv1.Response{Protocol: wire.Protocol, Result: &guestv1.Response_Execs{Execs: &guestv1.Execs{Execs: infos}}})
}

// maxCommand is how much of a command is listed, in bytes: the agent takes no
// answer of any length, and there may be many commands.
const maxCommand = 2 << 10

func clip(command []string) []string {
	size := 0
	for i, arg := range command {
		if size += len(arg) + 1; size > maxCommand {
			return append(slices.Clip(command[:i]), "…")
		}
	}
	return command
}

func (e *execs) signalExec(_ context.Context, conn *wire.Conn, call *guestv1.SignalExec) error {
	x, err := e.find(call.GetId())
	if err != nil {
		return err
	}
	alive, err := e.signal(x, call.GetSignal())
	switch {
	case err != nil:
		return err
	case !alive:
		return failuref(guestv1.Failure_CODE_STATE, "exec %s has ended", x.id)
	}
	return conn.Send(response(nil))
}

// signal sends a signal to a command's process group, and reports whether the
// command runs.
func (e *execs) signal(x *execution, number int32) (bool, error) {
	if number < 1 || number > maxSignal {
		return false, failuref(guestv1.Failure_CODE_INVALID, "signal %d: there are 1 to %d", number, maxSignal)
	}
	return e.children.signal(x.pid, syscall.Signal(number), true)
}
