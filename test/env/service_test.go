//go:build hosttest

// Package env tests what only a whole host has: a service manager that keeps
// the agent's listening sockets. host-test runs it there, see payload/service.
package env

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	unit      = "choiros-agent.service"
	guestPort = "8000"
	limitMiB  = 128
)

// TestRestartsRefuseNobody has clients connect to a forwarded port all the
// time while the agent is restarted and killed.
func TestRestartsRefuseNobody(t *testing.T) {
	run(t, "agentctl", "agent", "install")
	run(t, "agentctl", "image", "load", "images/workload.oci.tar")
	run(t, "agentctl", "sandbox", "start", "echo", "--image", "localhost/choiros/workload:latest", "--no-workspace",
		"--memory", fmt.Sprint(limitMiB, "m"), "--port", guestPort, "--ready-tcp", guestPort, "--", "listen", "127.0.0.1:"+guestPort)
	address := forwarded(t)
	wantKept(t, 1)

	c := newClients(t, address)
	kill := func() { run(t, "systemctl", "--user", "kill", "--kill-whom=main", "--signal=KILL", unit) }
	for _, d := range []struct {
		how string
		do  func()
	}{
		{"restarted", func() { run(t, "systemctl", "--user", "restart", unit) }},
		{"killed", kill},
		{"killed again", kill},
	} {
		c.disturb(d.how, d.do)
		if got := forwarded(t); got != address {
			t.Errorf("after the agent was %s the port is at %s; it was at %s", d.how, got, address)
		}
		wantKept(t, 1)
	}
	c.stop()

	usage(t)

	// Stopped is not restarted: then nobody keeps anything.
	run(t, "systemctl", "--user", "stop", unit)
	wantKept(t, 0)
	wantRefused(t, "the agent was stopped", address)
	run(t, "systemctl", "--user", "start", unit)
	if err := ask(address); err != nil {
		t.Errorf("after the agent was stopped and started: %v", err)
	}
	wantKept(t, 1)

	run(t, "agentctl", "port", "remove", "echo", guestPort)
	wantRefused(t, "the forward was removed", address)
	wantKept(t, 0)
	run(t, "agentctl", "port", "add", "echo", guestPort)
	address = forwarded(t)
	if err := ask(address); err != nil {
		t.Errorf("after the forward was added: %v", err)
	}
	wantKept(t, 1)
	run(t, "agentctl", "sandbox", "delete", "echo", "--grace", "1s")
	wantRefused(t, "the sandbox was deleted", address)
	wantKept(t, 0)
}

// usage checks what the sandbox is said to use against its cgroup, as the
// kernel tells it outside.
func usage(t *testing.T) {
	t.Helper()
	var round struct {
		Samples []struct {
			Memory uint64 `json:"memory_bytes,string"`
			Limit  uint64 `json:"memory_limit_bytes,string"`
		} `json:"samples"`
	}
	said := run(t, "agentctl", "top", "echo", "--once", "-o", "json")
	if err := json.Unmarshal([]byte(said), &round); err != nil || len(round.Samples) != 1 {
		t.Fatalf("top says %s: %v", said, err)
	}
	pid := run(t, "podman", "inspect", "--format", "{{.State.Pid}}", run(t, "podman", "ps", "--quiet"))
	membership, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	cgroup := "/sys/fs/cgroup" + strings.TrimPrefix(strings.TrimSpace(string(membership)), "0::")
	current, err := os.ReadFile(cgroup + "/memory.current")
	if err != nil {
		t.Fatal(err)
	}
	outside, err := strconv.ParseUint(strings.TrimSpace(string(current)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	s := round.Samples[0]
	t.Logf("memory: %d of %d bytes; memory.current is %d", s.Memory, s.Limit, outside)
	if s.Limit != limitMiB<<20 {
		t.Errorf("the limit is said to be %d bytes, and is %d MiB", s.Limit, limitMiB)
	}
	// What it says leaves the inactive page cache out.
	if s.Memory < 1<<20 || float64(s.Memory) > 1.25*float64(outside) || math.Abs(float64(s.Memory)-float64(outside)) > 32<<20 {
		t.Errorf("it is said to use %d bytes; its memory.current is %d", s.Memory, outside)
	}
	t.Log("\n" + run(t, "agentctl", "top", "--once"))
}

// attempt is one connection of a client.
type attempt struct {
	begun, ended time.Time
	err          error
}

// disturbance is one end of the agent.
type disturbance struct{ begun, gone time.Time }

// clients connect every 15 ms, and each waits until it is answered.
type clients struct {
	t        *testing.T
	address  string
	enough   chan struct{}
	over     chan struct{}
	attempts chan attempt

	past []disturbance
	seen []attempt
}

func newClients(t *testing.T, address string) *clients {
	c := &clients{t: t, address: address, enough: make(chan struct{}), over: make(chan struct{}), attempts: make(chan attempt, 1<<14)}
	go func() {
		defer close(c.over)
		// As many as wait at once: fewer than the agent lets wait for one sandbox.
		waiting := make(chan struct{}, 128)
		tick := time.NewTicker(15 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-c.enough:
				for range cap(waiting) {
					waiting <- struct{}{}
				}
				return
			}
			waiting <- struct{}{}
			go func() {
				defer func() { <-waiting }()
				a := attempt{begun: time.Now()}
				a.err = ask(address)
				a.ended = time.Now()
				c.attempts <- a
			}()
		}
	}()
	c.answered(time.Now())
	return c
}

// ask connects, sends a line and wants it back.
func ask(address string) error {
	conn, err := net.DialTimeout("tcp", address, time.Minute)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	line := []byte("is anybody there?\n")
	if _, err := conn.Write(line); err != nil {
		return err
	}
	got := make([]byte, len(line))
	for n := 0; n < len(got); {
		more, err := conn.Read(got[n:])
		if err != nil {
			return err
		}
		n += more
	}
	if !bytes.Equal(got, line) {
		return fmt.Errorf("%q came back", got)
	}
	return nil
}

// answered waits until one that began after since was answered, and returns
// when it was.
func (c *clients) answered(since time.Time) time.Time {
	c.t.Helper()
	patience := time.After(2 * time.Minute)
	for {
		select {
		case a := <-c.attempts:
			c.seen = append(c.seen, a)
			if a.err == nil && a.begun.After(since) {
				return a.ended
			}
		case <-patience:
			c.t.Fatal("nobody was answered for two minutes")
		}
	}
}

// disturb ends the agent's process and waits until the next one answers.
func (c *clients) disturb(how string, do func()) {
	c.t.Helper()
	before := show(c.t, "MainPID")
	pid, err := strconv.Atoi(before)
	if err != nil {
		c.t.Fatal(err)
	}
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		c.t.Fatal(err)
	}
	defer unix.Close(process)
	d := disturbance{begun: time.Now()}
	gone := make(chan error, 1)
	go func() {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(process), Events: unix.POLLIN}}, 60_000)
		for errors.Is(err, unix.EINTR) {
			_, err = unix.Poll([]unix.PollFd{{Fd: int32(process), Events: unix.POLLIN}}, 60_000)
		}
		d.gone = time.Now()
		gone <- err
	}()
	do()
	if err := <-gone; err != nil {
		c.t.Fatal(err)
	}
	c.past = append(c.past, d)
	back := c.answered(d.gone)
	if after := show(c.t, "MainPID"); after == before {
		c.t.Errorf("the agent is still process %s", after)
	}
	c.t.Logf("%s: a client waited %d ms", how, back.Sub(d.gone).Milliseconds())
}

// stop ends the clients and judges what became of them.
func (c *clients) stop() {
	c.t.Helper()
	close(c.enough)
	<-c.over
	close(c.attempts)
	for a := range c.attempts {
		c.seen = append(c.seen, a)
	}
	cut, absent, longest := 0, 0, time.Duration(0)
	for _, a := range c.seen {
		longest = max(longest, a.ended.Sub(a.begun))
		switch {
		case a.err == nil:
			if c.beganInAbsence(a) {
				absent++
			}
		case c.mayBeCut(a):
			cut++ // had been accepted by the agent that ended
		default:
			c.t.Errorf("a client that began at %s got after %s: %v", a.begun.Format("05.000"), a.ended.Sub(a.begun), a.err)
		}
	}
	c.t.Logf("%d clients: %d began just after an agent had ended, %d were connected when one ended, the longest wait was %s",
		len(c.seen), absent, cut, longest.Round(time.Millisecond))
	if absent == 0 {
		c.t.Error("no client came while there was no agent")
	}
}

// beganInAbsence says that an attempt began within the tenth of a second after
// an agent's end, before which the service manager starts no other.
func (c *clients) beganInAbsence(a attempt) bool {
	for _, d := range c.past {
		if a.begun.After(d.gone) && a.begun.Before(d.gone.Add(100*time.Millisecond)) {
			return true
		}
	}
	return false
}

// mayBeCut says that an attempt that ended badly was not refused, but lost its
// connection to an agent that ended meanwhile.
func (c *clients) mayBeCut(a attempt) bool {
	if op, ok := errors.AsType[*net.OpError](a.err); ok && op.Op == "dial" || errors.Is(a.err, syscall.ECONNREFUSED) {
		return false
	}
	for _, d := range c.past {
		if a.begun.Before(d.gone) && a.ended.After(d.begun) {
			return true
		}
	}
	return false
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	command := exec.CommandContext(t.Context(), name, args...)
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	if err := command.Run(); err != nil {
		t.Fatalf("%s: %v\n%s%s", command, err, &stdout, &stderr)
	}
	return strings.TrimSpace(stdout.String())
}

// show is a property of the agent's unit.
func show(t *testing.T, property string) string {
	t.Helper()
	return run(t, "systemctl", "--user", "show", "--property", property, "--value", unit)
}

// wantKept checks how many descriptors the service manager keeps.
func wantKept(t *testing.T, want int) {
	t.Helper()
	if got := show(t, "NFileDescriptorStore"); got != strconv.Itoa(want) {
		t.Errorf("the service manager keeps %s descriptors, want %d", got, want)
	}
}

func wantRefused(t *testing.T, after, address string) {
	t.Helper()
	if err := ask(address); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a client came after %s and got %v; want a refusal", after, err)
	}
}

// forwarded is where the sandbox's port is reachable.
func forwarded(t *testing.T) string {
	t.Helper()
	return run(t, "agentctl", "port", "list", "echo", "--quiet")
}
