package guest

import (
	"context"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

// Size is that of a terminal.
type Size struct{ Columns, Rows uint32 }

// Command is what Exec runs.
type Command struct {
	Args    []string
	Env     map[string]string // on top of the workload's
	Dir     string            // empty: the workload's
	User    string            // user[:group]; empty: the workload's
	TTY     bool
	Size    Size
	Keep    bool // goes on when nobody is attached
	NoInput bool
	// Detached leaves it running: nothing is received of it but by Attach.
	Detached bool
}

// Exec is a command inside that the agent is attached to. One goroutine may
// receive while others send.
type Exec struct {
	ID  string
	PID int32

	guest *Guest
	conn  *wire.Conn
	ctx   context.Context //nolint:containedctx // The call's, which is a connection.
	undo  func() bool
}

// Output is something that a command printed, or how it ended.
type Output struct {
	Stderr bool
	Data   []byte // valid until the next Receive
	Exit   *Exit  // set once, last
}

// Exit is how a command ended.
type Exit struct {
	Code   int32 // 128+n when signal n ended it
	Signal int32
}

// Exec runs a command. If ctx ends, so does the call, and with it the command
// unless Keep is set.
func (g *Guest) Exec(ctx context.Context, c Command) (*Exec, error) {
	call := &guestv1.Exec{
		Command: c.Args, Env: c.Env, WorkingDir: c.Dir, User: c.User,
		Tty: c.TTY, Keep: c.Keep, NoInput: c.NoInput, Detached: c.Detached,
	}
	if c.TTY {
		call.Size = &guestv1.TerminalSize{Columns: c.Size.Columns, Rows: c.Size.Rows}
	}
	return g.attach(ctx, "run a command in", &guestv1.Request{Call: &guestv1.Request_Exec{Exec: call}})
}

// Attach goes on with a command that was left running; who was attached until
// then no longer is.
func (g *Guest) Attach(ctx context.Context, id string, skipBacklog bool) (*Exec, error) {
	return g.attach(ctx, "attach to a command in", &guestv1.Request{Call: &guestv1.Request_Attach{
		Attach: &guestv1.Attach{Id: id, SkipBacklog: skipBacklog},
	}})
}

func (g *Guest) attach(ctx context.Context, op string, request *guestv1.Request) (*Exec, error) {
	conn, response, err := g.open(ctx, op, request)
	if err != nil {
		return nil, err
	}
	started := response.GetExecStarted()
	if started == nil {
		conn.Close()
		return nil, g.odd(op, "it does not say what it started")
	}
	return &Exec{ID: text(started.GetId()), PID: started.GetPid(), guest: g, conn: conn, ctx: ctx, undo: conn.Bind(ctx)}, nil
}

// Receive returns what comes next.
func (x *Exec) Receive() (Output, error) {
	const op = "run a command in"
	kind, payload, err := x.conn.Receive()
	if err != nil {
		return Output{}, x.guest.broken(x.ctx, op, err)
	}
	switch kind {
	case wire.KindData, wire.KindStderr:
		return Output{Stderr: kind == wire.KindStderr, Data: payload}, nil
	case wire.KindMessage:
		return Output{}, x.guest.broken(x.ctx, op, wire.Ending(payload))
	case wire.KindEvent:
	}
	var exit guestv1.ExecExit
	if err := wire.Decode(payload, &exit); err != nil {
		return Output{}, x.guest.broken(x.ctx, op, err)
	}
	return Output{Exit: exitFromWire(&exit)}, nil
}

// Input sends input.
func (x *Exec) Input(data []byte) error {
	if len(data) == 0 {
		return nil // would be the end
	}
	return x.sent(x.conn.SendData(wire.KindData, data))
}

// CloseInput ends the input.
func (x *Exec) CloseInput() error { return x.sent(x.conn.SendData(wire.KindData, nil)) }

// Resize changes the terminal's size.
func (x *Exec) Resize(size Size) error {
	return x.sent(x.conn.Send(&guestv1.ExecInput{Input: &guestv1.ExecInput_Resize{
		Resize: &guestv1.TerminalSize{Columns: size.Columns, Rows: size.Rows},
	}}))
}

// Signal sends a signal to the command's process group.
func (x *Exec) Signal(number int32) error {
	return x.sent(x.conn.Send(&guestv1.ExecInput{Input: &guestv1.ExecInput_Signal{Signal: number}}))
}

// Detach leaves the command running. Close follows.
func (x *Exec) Detach() error {
	return x.sent(x.conn.Send(&guestv1.ExecInput{Input: &guestv1.ExecInput_Detach{Detach: true}}))
}

func (x *Exec) sent(err error) error {
	if err == nil {
		return nil
	}
	return x.guest.broken(x.ctx, "run a command in", err)
}

// Close ends the call, and with it a command that was neither started to be
// kept nor detached from.
func (x *Exec) Close() {
	x.undo()
	x.conn.Close()
}

// ExecInfo is a command that runs, or that ended lately with nobody attached.
type ExecInfo struct {
	ID       string
	Command  []string
	PID      int32
	TTY      bool
	Attached bool
	Started  time.Time
	Exit     *Exit // nil while it runs
}

// maxExecs is how many are looked at.
const maxExecs = 1024

// Execs returns the commands of Exec that there are.
func (g *Guest) Execs(ctx context.Context) ([]ExecInfo, error) {
	response, err := g.ask(ctx, "list the commands in", &guestv1.Request{Call: &guestv1.Request_ListExecs{ListExecs: &guestv1.ListExecs{}}})
	if err != nil {
		return nil, err
	}
	listed := response.GetExecs().GetExecs()
	var execs []ExecInfo
	for _, e := range listed[:min(maxExecs, len(listed))] {
		info := ExecInfo{
			ID: text(e.GetId()), PID: e.GetPid(), TTY: e.GetTty(), Attached: e.GetAttached(),
			Started: e.GetStartTime().AsTime(), Exit: exitFromWire(e.GetExit()),
		}
		for _, arg := range e.GetCommand() {
			info.Command = append(info.Command, text(arg))
		}
		execs = append(execs, info)
	}
	return execs, nil
}

// SignalExec sends a signal to the process group of a command.
func (g *Guest) SignalExec(ctx context.Context, id string, number int32) error {
	_, err := g.ask(ctx, "signal a command in", &guestv1.Request{Call: &guestv1.Request_SignalExec{
		SignalExec: &guestv1.SignalExec{Id: id, Signal: number},
	}})
	return err
}

func exitFromWire(w *guestv1.ExecExit) *Exit {
	if w == nil {
		return nil
	}
	return &Exit{Code: w.GetCode(), Signal: w.GetSignal()}
}
