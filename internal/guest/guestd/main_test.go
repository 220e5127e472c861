//go:build linux

package guestd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

// guestdFlag makes the test binary be guestd, with the arguments after it.
const guestdFlag = "-guestd"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == guestdFlag {
		os.Exit(Run(os.Args[2:], os.Stdout, os.Stderr))
	}
	if len(os.Args) > 1 && os.Args[1] == intruderFlag {
		os.Exit(intrude(os.Args[2]))
	}
	os.Exit(m.Run())
}

// limit is for all that should take no time.
const limit = 20 * time.Second

// guest is a guestd that runs as a child process.
type guest struct {
	testing.TB
	cmd    *exec.Cmd
	socket string
	stdout *output
	stderr *output
	code   chan int // how it exited
}

// output is what a process prints.
type output struct {
	buffer bytes.Buffer
	done   chan struct{}
}

func (o *output) String() string {
	<-o.done
	return o.buffer.String()
}

// boot starts a guestd; change may alter how.
func boot(t testing.TB, change func(*exec.Cmd), command ...string) *guest {
	t.Helper()
	dir, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{TB: t, socket: filepath.Join(dir, "s"), code: make(chan int, 1)}
	g.cmd = exec.Command(self, append([]string{guestdFlag, "--listen", "unix:" + g.socket, "--"}, command...)...)
	g.cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	if change != nil {
		change(g.cmd)
	}
	if i := slices.Index(g.cmd.Args, "--listen"); i > 0 {
		g.socket = strings.TrimPrefix(g.cmd.Args[i+1], "unix:")
	}
	var ends []*os.File
	if g.stdout = new(output); g.cmd.Stdout == nil {
		ends = append(ends, g.stdout.pipe(t, &g.cmd.Stdout))
	}
	if g.stderr = new(output); g.cmd.Stderr == nil {
		ends = append(ends, g.stderr.pipe(t, &g.cmd.Stderr))
	}
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for _, end := range ends {
		end.Close()
	}
	exited := make(chan struct{})
	go func() {
		_ = g.cmd.Wait()
		g.code <- g.cmd.ProcessState.ExitCode()
		close(exited)
	}()
	t.Cleanup(func() {
		_ = g.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-exited:
		case <-time.After(3 * time.Second):
			_ = g.cmd.Process.Kill()
			<-exited
		}
	})
	g.eventually("the socket is there", func() bool {
		_, err := os.Stat(g.socket)
		return err == nil || len(g.code) > 0
	})
	return g
}

func (o *output) pipe(t testing.TB, to *io.Writer) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	o.done = make(chan struct{})
	go func() {
		defer close(o.done)
		defer r.Close()
		_, _ = io.Copy(&o.buffer, r)
	}()
	*to = w
	return w
}

// configured boots a guestd and configures it.
func configured(t testing.TB, command ...string) *guest {
	t.Helper()
	g := boot(t, nil, command...)
	g.configure(&guestv1.Configure{Generation: 1})
	return g
}

// sleeper is a workload that does nothing until it is told to end.
func sleeper() []string { return []string{"sleep", "1000"} }

func (g *guest) eventually(what string, ok func() bool) {
	g.Helper()
	deadline := time.Now().Add(limit)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			g.Fatalf("not in %v: %s", limit, what)
		}
		<-tick.C
	}
}

func (g *guest) dial() *wire.Conn {
	g.Helper()
	conn, err := net.Dial("unix", g.socket)
	if err != nil {
		g.Fatal(err)
	}
	g.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(3 * limit))
	return wire.New(conn, wire.MaxFrame)
}

// open sends a request and returns the answer with the connection.
func (g *guest) open(request *guestv1.Request) (*wire.Conn, *guestv1.Response) {
	g.Helper()
	conn := g.dial()
	request.Protocol = wire.Protocol
	if err := conn.Send(request); err != nil {
		g.Fatal(err)
	}
	var response guestv1.Response
	if err := conn.ReceiveMessage(&response); err != nil {
		g.Fatalf("no answer to %v: %v", callName(request), err)
	}
	return conn, &response
}

func (g *guest) ask(request *guestv1.Request) *guestv1.Response {
	g.Helper()
	conn, response := g.open(request)
	conn.Close()
	return response
}

// tell asks for what must go well.
func (g *guest) tell(request *guestv1.Request) *guestv1.Response {
	g.Helper()
	response := g.ask(request)
	if f := response.GetFailure(); f != nil {
		g.Fatalf("%s: %v", callName(request), f)
	}
	return response
}

// refused asks for what must fail with a code, and returns the message.
func (g *guest) refused(code guestv1.Failure_Code, request *guestv1.Request) string {
	g.Helper()
	f := g.ask(request).GetFailure()
	if f == nil || f.GetCode() != code {
		g.Fatalf("%s: failure %v, want code %v", callName(request), f, code)
	}
	return f.GetMessage()
}

func configureRequest(c *guestv1.Configure) *guestv1.Request {
	return &guestv1.Request{Call: &guestv1.Request_Configure{Configure: c}}
}

func (g *guest) configure(c *guestv1.Configure) int {
	g.Helper()
	return int(g.tell(configureRequest(c)).GetConfigured().GetPid())
}

func (g *guest) hello() *guestv1.Greeting {
	g.Helper()
	return g.tell(&guestv1.Request{Call: &guestv1.Request_Hello{Hello: &guestv1.Hello{}}}).GetGreeting()
}

// exits waits for guestd to exit.
func (g *guest) exits() int {
	g.Helper()
	select {
	case code := <-g.code:
		g.code <- code
		return code
	case <-time.After(limit):
		g.Fatal("guestd does not exit")
		return -1
	}
}

func execRequest(c *guestv1.Exec) *guestv1.Request {
	return &guestv1.Request{Call: &guestv1.Request_Exec{Exec: c}}
}

// session is an exec that the test is attached to.
type session struct {
	*wire.Conn
	g   *guest
	id  string
	pid int
}

func (g *guest) start(c *guestv1.Exec) *session {
	g.Helper()
	return g.session(execRequest(c))
}

func (g *guest) shell(script string) *session {
	g.Helper()
	return g.start(&guestv1.Exec{Command: []string{"sh", "-c", script}})
}

func (g *guest) attach(id string, skip bool) *session {
	g.Helper()
	return g.session(&guestv1.Request{Call: &guestv1.Request_Attach{Attach: &guestv1.Attach{Id: id, SkipBacklog: skip}}})
}

func (g *guest) session(request *guestv1.Request) *session {
	g.Helper()
	conn, response := g.open(request)
	if f := response.GetFailure(); f != nil {
		g.Fatalf("%s: %v", callName(request), f)
	}
	started := response.GetExecStarted()
	return &session{Conn: conn, g: g, id: started.GetId(), pid: int(started.GetPid())}
}

func (s *session) say(input *guestv1.ExecInput) {
	s.g.Helper()
	if err := s.Send(input); err != nil {
		s.g.Fatal(err)
	}
}

func (s *session) write(text string) {
	s.g.Helper()
	if err := s.SendData(wire.KindData, []byte(text)); err != nil {
		s.g.Fatal(err)
	}
}

// next returns what comes next: output, or the exit.
func (s *session) next() (wire.Kind, []byte, *guestv1.ExecExit) {
	s.g.Helper()
	kind, data, err := s.Receive()
	if err != nil {
		s.g.Fatal(err)
	}
	if kind != wire.KindEvent {
		return kind, data, nil
	}
	var exit guestv1.ExecExit
	if err := wire.Decode(data, &exit); err != nil {
		s.g.Fatal(err)
	}
	return kind, nil, &exit
}

// await reads output until it contains a text.
func (s *session) await(text string) string {
	s.g.Helper()
	var all string
	for !strings.Contains(all, text) {
		_, data, exit := s.next()
		if exit != nil {
			s.g.Fatalf("ended with %v after %q, without %q", exit, all, text)
		}
		all += string(data)
	}
	return all
}

// rest reads to the end.
func (s *session) rest() (stdout, stderr string, exit *guestv1.ExecExit) {
	s.g.Helper()
	var out, errs strings.Builder
	for {
		kind, data, exit := s.next()
		switch {
		case exit != nil:
			s.Close()
			return out.String(), errs.String(), exit
		case kind == wire.KindStderr:
			errs.Write(data)
		default:
			out.Write(data)
		}
	}
}

// output runs a command and returns what it prints.
func (g *guest) output(c *guestv1.Exec) string {
	g.Helper()
	stdout, stderr, exit := g.start(c).rest()
	if exit.GetCode() != 0 {
		g.Fatalf("%v: %v, %s", c.GetCommand(), exit, stderr)
	}
	return stdout
}

func (g *guest) execs() []*guestv1.ExecInfo {
	g.Helper()
	return g.tell(&guestv1.Request{Call: &guestv1.Request_ListExecs{ListExecs: &guestv1.ListExecs{}}}).GetExecs().GetExecs()
}

// forgets waits until the execs whose ends were told are forgotten, which is a
// little later.
func (g *guest) forgets() {
	g.Helper()
	g.eventually("the execs are forgotten", func() bool { return len(g.execs()) == 0 })
}

// alive reports whether a process runs; a zombie does not.
func alive(pid int) bool {
	text, err := os.ReadFile(filepath.Join("/proc", itoa(pid), "stat"))
	if err != nil {
		return false
	}
	p, ok := parseStat(pid, string(text))
	return ok && !p.zombie
}

// exists reports whether there is a process, be it a zombie.
func exists(pid int) bool { return !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }

// requireNamespaces returns how to start guestd as process 1.
func requireNamespaces(t testing.TB) func(*exec.Cmd) {
	t.Helper()
	attr := func() *syscall.SysProcAttr {
		return &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 1000, HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 1000, HostID: os.Getgid(), Size: 1}},
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	try := exec.CommandContext(ctx, "true")
	try.SysProcAttr = attr()
	if err := try.Run(); err != nil {
		const cure = "allow user namespaces: sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000"
		if strings.Contains(os.Getenv("AGENT_REQUIRE"), "namespaces") {
			t.Fatalf("no namespaces: %v\ntry: %s", err, cure)
		}
		t.Skipf("no namespaces: %v; try: %s", err, cure)
	}
	return func(cmd *exec.Cmd) { cmd.SysProcAttr = attr() }
}
