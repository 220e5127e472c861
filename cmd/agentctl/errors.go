package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/choiros/agent/internal/sandbox"
)

// errConnectionRefused is a socket that nobody listens on.
const errConnectionRefused = syscall.ECONNREFUSED

// Exit statuses that no row of sandbox.Failures has.
const (
	exitOK      = 0
	exitFailed  = 1
	exitUsage   = 2
	exitTimeout = 9
	exitSignal  = 128 // plus the signal's number

	// What a shell's exit statuses are for these.
	exitNotExecutable = 126
	exitNoCommand     = 127

	errorPrefix  = "agentctl: "
	hintPrefix   = "try: "
	maxErrorLine = 4 << 10
)

// gaveUp is the cause of a context that a time limit of ours ended.
type gaveUp struct{ after time.Duration }

func (g gaveUp) Error() string { return "no answer within " + g.after.String() }

// hinted is an error with the one step that may mend it.
type hinted struct {
	err  error
	hint string
}

func (h *hinted) Error() string { return h.err.Error() }
func (h *hinted) Unwrap() error { return h.err }

// withHint adds a hint to an error, if there is one to add.
func withHint(err error, format string, args ...any) error {
	if err == nil || format == "" {
		return err
	}
	return &hinted{err, fmt.Sprintf(format, args...)}
}

// reported is an error that the person was told of already.
type reported struct {
	err  error
	exit int
}

func (r *reported) Error() string { return r.err.Error() }
func (r *reported) Unwrap() error { return r.err }

// exitingWith is an error with an exit status other than the table's.
type exitingWith struct {
	err  error
	exit int
}

func (e *exitingWith) Error() string { return e.err.Error() }
func (e *exitingWith) Unwrap() error { return e.err }

// report tells of an error, if there is one, and returns the exit status.
func (a *app) report(ctx context.Context, err error) int {
	if err == nil {
		return exitOK
	}
	if told := (*reported)(nil); errors.As(err, &told) {
		return told.exit
	}
	exit := exitStatus(err)
	var sig interrupted
	bySignal := errors.As(context.Cause(ctx), &sig)
	if bySignal {
		exit = exitSignal + int(sig.signal)
	}
	_, hasHint := errors.AsType[*hinted](err)
	if bySignal && !hasHint {
		return exit // the person knows what they did
	}
	a.printError(err)
	return exit
}

// printError writes an error's line, and a line with its hint if it has one.
func (a *app) printError(err error) {
	fmt.Fprintln(a.stderr, a.err.red(errorPrefix)+oneLine(message(err)))
	if hint := hintOf(err); hint != "" {
		fmt.Fprintln(a.stderr, a.err.bold(hintPrefix)+oneLine(hint))
	}
}

// notef tells a person something in passing.
func (a *app) notef(format string, args ...any) {
	if !a.quiet {
		fmt.Fprintln(a.stderr, errorPrefix+oneLine(fmt.Sprintf(format, args...)))
	}
}

// message is an error's text without gRPC's wrapping.
func message(err error) string {
	if own := errorOfOurs(err); own != nil {
		return own.Error()
	}
	s := statusOf(err)
	if s == nil {
		return err.Error()
	}
	if s.Code() == codes.Unimplemented && errorInfo(err) == nil {
		return "the agent does not know this request: " + s.Message()
	}
	if s.Message() == "" {
		return strings.ToLower(s.Code().String())
	}
	return s.Message()
}

// errorOfOurs finds the outermost error of this program's that says more than
// the status inside it.
func errorOfOurs(err error) error {
	if e, ok := errors.AsType[*connectError](err); ok {
		return e
	}
	if e, ok := errors.AsType[*leftError](err); ok {
		return e
	}
	return nil
}

// statusOf returns the status inside an error as it came over the wire, or
// nil. status.FromError puts the text of what wraps it in its message.
func statusOf(err error) *status.Status {
	if e, ok := errors.AsType[interface {
		error
		GRPCStatus() *status.Status
	}](err); ok {
		return e.GRPCStatus()
	}
	return nil
}

// errorInfo returns the google.rpc.ErrorInfo of an error of the agent's.
func errorInfo(err error) *errdetails.ErrorInfo {
	for _, detail := range statusOf(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return info
		}
	}
	return nil
}

// retryDelay is how long the agent asks to wait before another try.
func retryDelay(err error) time.Duration {
	for _, detail := range statusOf(err).Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok {
			return info.GetRetryDelay().AsDuration()
		}
	}
	return 0
}

// reasonOf is the reason in the error table that an error has, or empty.
func reasonOf(err error) string { return errorInfo(err).GetReason() }

// exitStatus is the exit status of the error table's row for err.
func exitStatus(err error) int {
	if _, ok := errors.AsType[*usageError](err); ok {
		return exitUsage
	}
	if own, ok := errors.AsType[*exitingWith](err); ok {
		return own.exit
	}
	if limit := (gaveUp{}); errors.As(err, &limit) {
		return exitTimeout
	}
	if reason := reasonOf(err); reason != "" {
		for _, row := range sandbox.Failures() {
			if row.Reason == reason {
				return row.Exit
			}
		}
	}
	s := statusOf(err)
	if s == nil || errorOfOurs(err) != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			return exitTimeout
		}
		return sandbox.FailureOf(err).Exit
	}
	// A status without a reason is not of our agent's making: a proxy's, or
	// gRPC's own. The table's first row of that code is nearest.
	for _, row := range sandbox.Failures() {
		if codes.Code(row.Code) == s.Code() {
			return row.Exit
		}
	}
	return exitFailed
}

// hintOf is the one step that may mend an error, or empty.
func hintOf(err error) string {
	if e, ok := errors.AsType[*hinted](err); ok {
		return e.hint
	}
	if e, ok := errors.AsType[*usageError](err); ok {
		return e.command + " --help"
	}
	if e, ok := errors.AsType[*connectError](err); ok {
		return connectHint(e)
	}
	info := errorInfo(err)
	if cure := info.GetMetadata()["cure"]; cure != "" {
		return cure
	}
	return reasonHint(info, err)
}

func reasonHint(info *errdetails.ErrorInfo, err error) string {
	name := info.GetMetadata()["sandbox"]
	where := fieldPlace(info.GetMetadata()["field"])
	switch info.GetReason() {
	case "NOT_FOUND":
		if where != "" {
			return "change " + where
		}
		return "agentctl sandbox list"
	case "ALREADY_EXISTS":
		if name != "" {
			return "agentctl sandbox start " + name
		}
	case "INVALID":
		if where != "" {
			return "change " + where
		}
	case "UNSUPPORTED":
		if where != "" {
			return "leave out " + where
		}
		return "agentctl host info"
	case "HOST_DRAINING":
		return "agentctl host undrain"
	case "RESOURCE_EXHAUSTED":
		if delay := retryDelay(err); delay > 0 {
			return fmt.Sprintf("again in %s, or stop a sandbox: agentctl sandbox list", duration(delay))
		}
		return "agentctl host stats"
	case "GUEST_UNAVAILABLE":
		if name != "" {
			return "agentctl sandbox restart " + name
		}
	case "CONNECTION_REFUSED":
		if name != "" {
			return "agentctl port list " + name
		}
	case "DRIVER_UNAVAILABLE", "AGENT_STOPPING":
		return "agentctl doctor"
	case "NOT_READY", "WORKLOAD_ENDED":
		if name != "" {
			return "agentctl sandbox logs " + name
		}
	case "WRONG_STATE", "SUPERSEDED", "TIMEOUT":
		if name != "" {
			return "agentctl sandbox show " + name
		}
	case "REQUEST_ID_REUSED":
		return "use another --request-id"
	}
	if limit := (gaveUp{}); errors.As(err, &limit) {
		return "agentctl doctor"
	}
	return ""
}

// connectHint says how to reach an agent that cannot be reached.
func connectHint(e *connectError) string {
	if e.address.network != "unix" {
		return "agentctl doctor --agent " + e.address.String()
	}
	if errors.Is(e.err, os.ErrPermission) {
		return permissionHint(e.address.location)
	}
	return startAgentCommand(runtime.GOOS, os.Getuid(), exists)
}

// startAgentCommand is what starts the agent on a host: root's service if that
// is whose it is and one is installed, otherwise agentctl.
func startAgentCommand(goos string, uid int, exists func(string) bool) string {
	if goos == "linux" && uid == 0 {
		for _, dir := range systemdDirs() {
			if exists(dir + "/" + systemdUnit) {
				return "systemctl start choiros-agent"
			}
		}
	}
	return "agentctl agent start, or agentctl agent install, which starts it at every login"
}

// permissionHint says how to be let in to a socket.
func permissionHint(path string) string {
	info, err := os.Stat(path)
	if err != nil {
		return "agentctl doctor"
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "agentctl doctor"
	}
	owner := "uid " + strconv.Itoa(int(stat.Uid))
	if u, err := user.LookupId(strconv.Itoa(int(stat.Uid))); err == nil {
		owner = u.Username
	}
	me, err := user.Current()
	group, groupErr := user.LookupGroupId(strconv.Itoa(int(stat.Gid)))
	if err != nil || groupErr != nil || stat.Gid == 0 || group.Name == owner {
		return "run agentctl as " + owner + ", whose agent it is"
	}
	return fmt.Sprintf("sudo usermod -aG %s %s, and log in again", group.Name, me.Username)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// places ties a field of the API to where a person gave it.
var places = []struct{ field, flag, key string }{
	{"name", "NAME", "name"},
	{"labels", "--label", "labels"},
	{"spec.driver_options", "--option", "options"},
	{"spec.driver", "--driver", "driver"},
	{"spec.image", "--image", "image"},
	{"spec.machine_class", "--class", "class"},
	{"spec.machine", "--machine", "machine"},
	{"spec.entrypoint", "--entrypoint", "entrypoint"},
	{"spec.command", "the command after --", "command"},
	{"spec.user", "--user", "user"},
	{"spec.working_dir", "--workdir", "workdir"},
	{"spec.env", "--env", "env"},
	{"spec.resources.cpu_millis", "--cpus", "cpus"},
	{"spec.resources.memory_mib", "--memory", "memory"},
	{"spec.resources.pids", "--pids", "pids"},
	{"spec.mounts", "--workspace, --data or --disk", "workspace, data and disks"},
	{"spec.egress", "--egress", "egress"},
	{"spec.ports", "--port", "ports"},
	{"spec.secrets", "--secret", "secrets"},
	{"secret_values", "--secret-value", ""},
	{"spec.secret_rotation", "--on-secret-change", "secret_rotation"},
	{"spec.keyless", "--keyless", "keyless"},
	{"spec.auto_forward.deny_ports", "", "auto_forward.deny_ports"},
	{"spec.auto_forward", "--auto-forward", "auto_forward"},
	{"spec.readiness.timeout", "--ready-timeout", "ready.timeout"},
	{"spec.readiness.exec", "--ready-exec", "ready.exec"},
	{"spec.readiness.http", "--ready-http", "ready.http"},
	{"spec.readiness.tcp", "--ready-tcp", "ready.tcp"},
	{"spec.readiness", "--ready-exec, --ready-http or --ready-tcp", "ready"},
	{"spec.idle", "--idle", "idle"},
	{"spec.restart", "--restart", "restart"},
	{"request_id", "--request-id", ""},
	{"grace", "--grace", ""},
	{"tail", "--tail", ""},
	{"since", "--since", ""},
	{"label_selector", "--selector", ""},
}

// fieldPlace says where a person gave a field of the API, or is empty.
func fieldPlace(field string) string {
	field = strings.TrimPrefix(field, "sandbox.")
	for _, p := range places {
		rest, found := strings.CutPrefix(field, p.field)
		if !found || rest != "" && !strings.ContainsAny(rest[:1], ".[") {
			continue
		}
		switch "" {
		case p.key:
			return p.flag
		case p.flag:
			return p.key + " in sandbox.yaml"
		}
		return fmt.Sprintf("%s (%s in sandbox.yaml)", p.flag, p.key)
	}
	return ""
}

// oneLine makes text fit to print on one line of a terminal.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r < 0x20 || r == 0x7f || r >= 0x80 && r < 0xa0:
			return -1
		}
		return r
	}, strings.TrimSpace(s))
	if len(s) > maxErrorLine {
		s = strings.ToValidUTF8(s[:maxErrorLine], "") + "…"
	}
	return s
}
