//go:build linux

package machine_test

import (
	"bytes"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/qemu"
)

// guest is a machine that runs, and the shim's side of it.
type guest struct {
	testing.TB
	vm.Machine
	shim    *wire.Conn
	console *bytes.Buffer // once it has ended

	mu      sync.Mutex
	changed chan struct{} // closed, and another made, when one of these has:
	stdout  bytes.Buffer
	stderr  bytes.Buffer
	stages  []string
	ended   *guestv1.Ended
	heard   error // why nothing more is heard
}

// boot switches the machine on, tells guestd what it is to become, and listens
// to it.
func (s *setup) boot() *guest {
	s.Helper()
	g := s.powerOn()
	return g.greet(s)
}

// powerOn switches the machine on.
func (s *setup) powerOn() *guest {
	s.Helper()
	g := &guest{TB: s.TB, changed: make(chan struct{}), console: &bytes.Buffer{}}
	var err error
	if s.config.Dir, err = os.MkdirTemp(s.dir, "m"); err != nil {
		s.Fatal(err)
	}
	reader, writer, err := os.Pipe()
	if err != nil {
		s.Fatal(err)
	}
	s.config.Console = writer
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, _ = io.Copy(g.console, reader)
		reader.Close()
	}()
	if g.Machine, err = qemu.New(s.Context(), s.config, require(s).options); err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() {
		g.Close()
		writer.Close()
		<-read
		if s.Failed() && g.console.Len() > 0 {
			s.Logf("console: %s", g.console)
		}
	})
	return g
}

// greet answers guestd's call.
func (g *guest) greet(s *setup) *guest {
	s.Helper()
	calls, err := g.Listen(1025)
	if err != nil {
		s.Fatal(err)
	}
	if err := g.Start(s.Context()); err != nil {
		s.Fatal(err)
	}
	type called struct {
		conn io.Closer
		err  error
	}
	accepted := make(chan called, 1)
	go func() {
		conn, err := calls.Accept()
		if err == nil {
			g.shim = wire.New(conn, wire.MaxFromGuest)
		}
		accepted <- called{conn, err}
	}()
	select {
	case c := <-accepted:
		if c.err != nil {
			s.Fatal(c.err)
		}
	case <-g.Done():
		s.Fatalf("the machine ended: %v", g.Err())
	case <-time.After(limit):
		s.Fatal("guestd does not call")
	}
	g.Cleanup(func() { g.shim.Close() })
	var awake guestv1.Awake
	if err := g.shim.ReceiveMessage(&awake); err != nil {
		s.Fatal(err)
	}
	if awake.GetProtocol() != wire.Protocol || awake.GetVersion() == "" {
		s.Fatalf("awake: %v", &awake)
	}
	if err := g.shim.Send(s.plan); err != nil {
		s.Fatal(err)
	}
	go g.hear()
	return g
}

// hear takes what guestd says until it has ended, and then hangs up.
func (g *guest) hear() {
	for {
		kind, payload, err := g.shim.Receive()
		g.mu.Lock()
		switch {
		case err != nil:
			g.heard = err
		case kind == wire.KindData:
			g.stdout.Write(payload)
		case kind == wire.KindStderr:
			g.stderr.Write(payload)
		default:
			var note guestv1.MachineNote
			if g.heard = wire.Decode(payload, &note); g.heard != nil {
				break
			}
			if g.ended = note.GetEnded(); g.ended != nil {
				g.heard = io.EOF
				break
			}
			g.stages = append(g.stages, note.GetStage())
		}
		over := g.heard != nil
		close(g.changed)
		g.changed = make(chan struct{})
		g.mu.Unlock()
		if over {
			g.shim.Close()
			return
		}
	}
}

// until waits for what guestd says.
func (g *guest) until(what string, ok func() bool) {
	g.Helper()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		g.mu.Lock()
		done, over, changed := ok(), g.heard, g.changed
		stdout, stderr := g.stdout.String(), g.stderr.String()
		g.mu.Unlock()
		switch {
		case done:
			return
		case over != nil:
			g.Fatalf("%s: never, for %v; ended %v; printed %q, %q", what, over, g.ended, stdout, stderr)
		}
		select {
		case <-changed:
		case <-timer.C:
			g.Fatalf("%s: not in %v; printed %q, %q", what, limit, stdout, stderr)
		}
	}
}

// prints waits until the workload has printed a text.
func (g *guest) prints(text string) {
	g.Helper()
	g.until("prints "+text, func() bool { return strings.Contains(g.stdout.String(), text) })
}

// ends waits until the machine is off, and returns how guestd said that it
// ended.
func (g *guest) ends() *guestv1.Ended {
	g.Helper()
	g.until("ends", func() bool { return g.ended != nil })
	g.off()
	return g.ended
}

// off waits until the machine is off, by its own doing.
func (g *guest) off() {
	g.Helper()
	select {
	case <-g.Done():
	case <-time.After(limit):
		g.Fatal("the machine does not switch itself off")
	}
	if err := g.Err(); err != nil {
		g.Fatal(err)
	}
}

// endsWith waits for an end with a code and nothing to say about it.
func (g *guest) endsWith(code int32) {
	g.Helper()
	if ended := g.ends(); ended.GetCode() != code || ended.GetMessage() != "" || ended.GetOomKilled() {
		g.Fatalf("ended with %v, want code %d", ended, code)
	}
}

// order sends a signal.
func (g *guest) order(signal int32) {
	g.Helper()
	if err := g.shim.Send(&guestv1.MachineOrder{Signal: signal}); err != nil {
		g.Fatal(err)
	}
}

// open asks guestd for something.
func (g *guest) open(request *guestv1.Request) (*wire.Conn, *guestv1.Response) {
	g.Helper()
	raw, err := g.Dial(g.Context(), wire.Port)
	if err != nil {
		g.Fatal(err)
	}
	g.Cleanup(func() { raw.Close() })
	_ = raw.SetDeadline(time.Now().Add(limit))
	conn := wire.New(raw, wire.MaxFromGuest)
	request.Protocol = wire.Protocol
	if err := conn.Send(request); err != nil {
		g.Fatal(err)
	}
	var response guestv1.Response
	if err := conn.ReceiveMessage(&response); err != nil {
		g.Fatalf("no answer to %v: %v", request, err)
	}
	return conn, &response
}

func (g *guest) hello() *guestv1.Greeting {
	g.Helper()
	conn, response := g.open(&guestv1.Request{Call: &guestv1.Request_Hello{Hello: &guestv1.Hello{}}})
	conn.Close()
	return response.GetGreeting()
}

// configure starts the workload.
func (g *guest) configure(c *guestv1.Configure) *guest {
	g.Helper()
	if c == nil {
		c = &guestv1.Configure{}
	}
	c.Generation = 1
	conn, response := g.open(&guestv1.Request{Call: &guestv1.Request_Configure{Configure: c}})
	conn.Close()
	if f := response.GetFailure(); f != nil {
		g.Fatalf("configure: %v", f)
	}
	return g
}

// exec runs the workload's program with other arguments, and returns what it
// prints on both streams, and its exit code.
func (g *guest) exec(call *guestv1.Exec, args ...string) (string, int32) {
	g.Helper()
	call.Command = append([]string{"/workload"}, args...)
	call.NoInput = true
	conn, response := g.open(&guestv1.Request{Call: &guestv1.Request_Exec{Exec: call}})
	defer conn.Close()
	if f := response.GetFailure(); f != nil {
		g.Fatalf("exec %v: %v", args, f)
	}
	var printed strings.Builder
	for {
		kind, payload, err := conn.Receive()
		if err != nil {
			g.Fatalf("exec %v: %v after %q", args, err, printed.String())
		}
		if kind != wire.KindEvent {
			printed.Write(payload)
			continue
		}
		var exit guestv1.ExecExit
		if err := wire.Decode(payload, &exit); err != nil {
			g.Fatal(err)
		}
		return printed.String(), exit.GetCode()
	}
}

// run is exec of what must go well, as the workload's user.
func (g *guest) run(args ...string) string {
	g.Helper()
	printed, code := g.exec(&guestv1.Exec{}, args...)
	if code != 0 {
		g.Fatalf("%v: exit code %d: %s", args, code, printed)
	}
	return printed
}

// lines are those of a text that have one of these prefixes.
func lines(text string, prefixes ...string) string {
	var found []string
	for line := range strings.Lines(text) {
		for _, prefix := range prefixes {
			if strings.HasPrefix(line, prefix) {
				found = append(found, strings.TrimSpace(line))
			}
		}
	}
	return strings.Join(found, "\n")
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}
