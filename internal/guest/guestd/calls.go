//go:build linux

package guestd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/files"
	"github.com/choiros/agent/internal/guest/reach"
	"github.com/choiros/agent/internal/guest/usage"
	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/version"
)

// call is how guestd answers one field of Request.call. An error of handle is
// answered for it.
type call struct {
	handle func(context.Context, *wire.Conn, *guestv1.Request) error
	// watched: the agent sends nothing more, and the context ends when it
	// closes the connection. Else reading is handle's own.
	watched bool
	// early: it is answered before there is anything to do something in.
	early bool
}

// brief is a call that takes no time worth watching for, or reads by itself.
func brief[T any](message func(*guestv1.Request) T, handle func(context.Context, *wire.Conn, T) error) call {
	return call{handle: func(ctx context.Context, conn *wire.Conn, request *guestv1.Request) error {
		return handle(ctx, conn, message(request))
	}}
}

// lasting is a call that goes on until the agent closes the connection.
func lasting[T any](message func(*guestv1.Request) T, handle func(context.Context, *wire.Conn, T) error) call {
	c := brief(message, handle)
	c.watched = true
	return c
}

// table is all that guestd can, by the names of Request.call's fields.
func (s *server) table() map[string]call {
	network, disk := reach.New(s.execs.run), files.New()
	hello := brief((*guestv1.Request).GetHello, s.hello)
	hello.early = true
	return map[string]call{
		"hello":          hello,
		"configure":      brief((*guestv1.Request).GetConfigure, s.configure),
		"update_secrets": brief((*guestv1.Request).GetUpdateSecrets, s.updateSecrets),
		"set_time":       brief((*guestv1.Request).GetSetTime, s.setTime),
		"rejoin":         brief((*guestv1.Request).GetRejoin, s.rejoin),
		"exec":           brief((*guestv1.Request).GetExec, s.execs.exec),
		"attach":         brief((*guestv1.Request).GetAttach, s.execs.attach),
		"list_execs":     brief((*guestv1.Request).GetListExecs, s.execs.listExecs),
		"signal_exec":    brief((*guestv1.Request).GetSignalExec, s.execs.signalExec),

		"await_ready":  lasting((*guestv1.Request).GetAwaitReady, s.afterStart(network.AwaitReady)),
		"connect":      brief((*guestv1.Request).GetConnect, network.Connect),
		"lend_sockets": brief((*guestv1.Request).GetLendSockets, network.LendSockets),
		"watch_ports":  lasting((*guestv1.Request).GetWatchPorts, network.WatchPorts),
		"watch_stats":  lasting((*guestv1.Request).GetWatchStats, usage.New().WatchStats),

		"stat_file":   brief((*guestv1.Request).GetStatFile, disk.StatFile),
		"list_files":  lasting((*guestv1.Request).GetListFiles, disk.ListFiles),
		"read_file":   lasting((*guestv1.Request).GetReadFile, disk.ReadFile),
		"write_file":  brief((*guestv1.Request).GetWriteFile, disk.WriteFile),
		"pack":        lasting((*guestv1.Request).GetPack, disk.Pack),
		"unpack":      brief((*guestv1.Request).GetUnpack, disk.Unpack),
		"watch_files": lasting((*guestv1.Request).GetWatchFiles, disk.WatchFiles),
		"remove_file": brief((*guestv1.Request).GetRemoveFile, disk.RemoveFile),
		"make_folder": brief((*guestv1.Request).GetMakeFolder, disk.MakeFolder),
	}
}

// afterStart has a call wait until the workload was started.
func (s *server) afterStart(
	handle func(context.Context, *wire.Conn, *guestv1.AwaitReady) error,
) func(context.Context, *wire.Conn, *guestv1.AwaitReady) error {
	return func(ctx context.Context, conn *wire.Conn, call *guestv1.AwaitReady) error {
		select {
		case <-s.workload.started:
			return handle(ctx, conn, call)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// callName is the name of the field of Request.call that is set.
func callName(request *guestv1.Request) string {
	message := request.ProtoReflect()
	field := message.WhichOneof(message.Descriptor().Oneofs().Get(0))
	if field == nil {
		return ""
	}
	return string(field.Name())
}

func (s *server) hello(_ context.Context, conn *wire.Conn, _ *guestv1.Hello) error {
	phase, generation := s.workload.state()
	return conn.Send(&guestv1.Response{Protocol: wire.Protocol, Result: &guestv1.Response_Greeting{Greeting: &guestv1.Greeting{
		Version: version.String(), Phase: phase, Generation: generation, Calls: slices.Sorted(maps.Keys(s.calls)),
	}}})
}

func (s *server) configure(ctx context.Context, conn *wire.Conn, call *guestv1.Configure) error {
	pid, started, err := s.workload.configure(ctx, call)
	if started {
		defer close(s.workload.answered)
	}
	if fatal, ok := errors.AsType[*endError](err); ok {
		// guestd ends, but not before the agent knows why.
		err = conn.Send(response(fatal.err))
		s.workload.end(ending{fatal.code, fatal.err})
		return err
	}
	if err != nil {
		return err
	}
	return conn.Send(&guestv1.Response{Protocol: wire.Protocol, Result: &guestv1.Response_Configured{
		Configured: &guestv1.Configured{Pid: int32(pid)}, //nolint:gosec // The kernel's numbers have 22 bits.
	}})
}

func (s *server) updateSecrets(_ context.Context, conn *wire.Conn, call *guestv1.UpdateSecrets) error {
	changed, err := s.workload.update(call)
	if err != nil {
		return err
	}
	return conn.Send(&guestv1.Response{Protocol: wire.Protocol, Result: &guestv1.Response_SecretsUpdated{
		SecretsUpdated: &guestv1.SecretsUpdated{Changed: changed},
	}})
}

func (s *server) setTime(_ context.Context, conn *wire.Conn, call *guestv1.SetTime) error {
	if !s.workload.machine {
		return failuref(guestv1.Failure_CODE_DENIED, "the sandbox has its host's clock")
	}
	if err := setClock(call.GetTime()); err != nil {
		return err
	}
	return conn.Send(response(nil))
}

func (s *server) rejoin(_ context.Context, conn *wire.Conn, call *guestv1.Rejoin) error {
	if err := s.workload.rejoin(call); err != nil {
		return err
	}
	return conn.Send(response(nil))
}

func setClock(t *timestamppb.Timestamp) error {
	if err := t.CheckValid(); err != nil {
		return failuref(guestv1.Failure_CODE_INVALID, "time: %v", err)
	}
	timespec := unix.NsecToTimespec(t.AsTime().UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &timespec); err != nil {
		return fmt.Errorf("set the clock to %s: %w", t.AsTime().Format(time.RFC3339), err)
	}
	return nil
}

// response is the answer to a call that gives nothing, or that failed.
func response(err error) *guestv1.Response {
	r := &guestv1.Response{Protocol: wire.Protocol}
	if err != nil {
		r.Failure = failure(err)
	}
	return r
}

// failuref is an error with a code.
func failuref(code guestv1.Failure_Code, format string, args ...any) error {
	return &wire.FailureError{Failure: &guestv1.Failure{Code: code, Message: fmt.Sprintf(format, args...)}}
}

// maxMessage is the longest that a failure's message may be, in bytes.
const maxMessage = 4 << 10

// failure is an error as the protocol has it.
func failure(err error) *guestv1.Failure {
	f := &guestv1.Failure{Code: codeOf(err), Message: err.Error()}
	if len(f.GetMessage()) > maxMessage {
		f.Message = f.GetMessage()[:maxMessage]
	}
	f.Message = strings.ToValidUTF8(f.GetMessage(), "?")
	return f
}

func codeOf(err error) guestv1.Failure_Code {
	if said, ok := errors.AsType[*wire.FailureError](err); ok {
		return said.Failure.GetCode()
	}
	number, _ := errors.AsType[syscall.Errno](err)
	switch number {
	case unix.ENOSPC, unix.EDQUOT, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EAGAIN:
		return guestv1.Failure_CODE_EXHAUSTED
	case unix.ECONNREFUSED:
		return guestv1.Failure_CODE_REFUSED
	case unix.ENOTDIR:
		return guestv1.Failure_CODE_NOT_FOUND
	case unix.EROFS:
		return guestv1.Failure_CODE_DENIED
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return guestv1.Failure_CODE_NOT_FOUND
	case errors.Is(err, fs.ErrExist):
		return guestv1.Failure_CODE_EXISTS
	case errors.Is(err, fs.ErrPermission):
		return guestv1.Failure_CODE_DENIED
	case errors.Is(err, wire.ErrProtocol), errors.Is(err, fs.ErrInvalid):
		return guestv1.Failure_CODE_INVALID
	}
	return guestv1.Failure_CODE_UNSPECIFIED
}
