package vz

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/choiros/agent/internal/vm"
)

// TestDialHandsOnTheSocket: what the driver passes to another process is a
// descriptor, and no bytes are copied here.
func TestDialHandsOnTheSocket(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	m := boot(t, s)
	inside := s.machine.listen(1024)
	conn, err := m.Dial(t.Context(), 1024)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, ok := conn.(syscall.Conn); !ok {
		t.Error("it is no syscall.Conn")
	}
	if _, ok := conn.(*net.UnixConn); ok {
		t.Error("somebody would pass descriptors over it")
	}
	guest := <-inside
	defer guest.Close()
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(guest); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	go func() {
		_, _ = guest.Write([]byte("and back"))
		guest.Close()
	}()
	if got, err := io.ReadAll(conn); err != nil || string(got) != "and back" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestDialThatReachesNobody(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	m := fresh(t, s)
	check := func(when string) {
		t.Helper()
		if conn, err := m.Dial(t.Context(), 7); !errors.Is(err, vm.ErrNoListener) {
			t.Errorf("%s: %v, %v", when, conn, err)
		}
	}
	check("before it is started")
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	check("where nothing listens")
	s.machine.connectErr = &nsError{Domain: vzDomain, Code: vzInvalidState}
	check("in the wrong state")
	s.machine.connectErr = &nsError{Domain: vzDomain, Code: 1, LocalizedDescription: "Internal error."}
	if _, err := m.Dial(t.Context(), 7); err == nil || errors.Is(err, vm.ErrNoListener) {
		t.Errorf("an error of another kind: %v", err)
	}
	if err := m.Kill(); err != nil {
		t.Fatal(err)
	}
	check("once it has ended")
}

// TestSilentGuestCostsABoundedNumberOfDials is of a framework that answers when
// the guest does.
func TestSilentGuestCostsABoundedNumberOfDials(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	hold := make(chan struct{})
	s.prepare = func(m *standInMachine) { m.holdConnect = hold }
	m := boot(t, s)
	inside := s.machine.listen(1024)
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for range maxDials {
		// One that is over before it began may not be made at all.
		for before := len(m.dials); len(m.dials) == before; {
			if _, err := m.Dial(gone, 1024); !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
		}
	}
	_, err := m.Dial(gone, 1024)
	wantText(t, err, "64 connections wait for the guest")
	close(hold)
	// The guest has woken, and nobody is there any more: all are closed.
	for range maxDials {
		guest := <-inside
		if n, err := guest.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("%d, %v", n, err)
		}
		guest.Close()
	}
	eventually(t, "there is room again", func() bool { return len(m.dials) == 0 })
}

func TestDialEndsWithTheMachine(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	hold := make(chan struct{})
	defer close(hold)
	s.prepare = func(m *standInMachine) { m.holdConnect = hold }
	m := boot(t, s)
	dialled := make(chan error, 1)
	go func() {
		_, err := m.Dial(t.Context(), 1024)
		dialled <- err
	}()
	eventually(t, "it dials", func() bool { return s.machine.record() == "start connect" })
	if err := m.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-dialled; !errors.Is(err, vm.ErrNoListener) {
		t.Error(err)
	}
}

func TestGuestCallsTheHost(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	m := fresh(t, s)
	l, err := m.Listen(1025)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Listen(1025); err == nil {
		t.Error("two listen at one port")
	}
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Listen(1026); !errors.Is(err, errStarted) {
		t.Errorf("listen once it runs: %v", err)
	}
	guest := s.machine.call(1025, 700)
	defer guest.Close()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if port := m.SourcePort(conn); port != 700 {
		t.Errorf("it comes from port %d", port)
	}
	if port := m.SourcePort(guest); port < 1024 {
		t.Errorf("what nobody has called from is port %d", port)
	}
	if _, err := guest.Write([]byte("awake")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, []byte("awake")) {
		t.Errorf("%q, %v", got, err)
	}
	accepted := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		accepted <- err
	}()
	if err := m.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-accepted; !errors.Is(err, net.ErrClosed) {
		t.Errorf("the machine has ended: %v", err)
	}
}

// TestGuestThatCallsAndCallsIsHungUpOn: what nobody accepts is closed.
func TestGuestThatCallsAndCallsIsHungUpOn(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	m := fresh(t, s)
	if _, err := m.Listen(1025); err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	var kept []net.Conn
	for range backlog {
		kept = append(kept, s.machine.call(1025, 700))
	}
	eventually(t, "as many as may wait do", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return len(m.listeners[0].conns) == backlog
	})
	surplus := s.machine.call(1025, 700)
	if _, err := surplus.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("one more: %v", err)
	}
	surplus.Close()
	if err := m.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, conn := range kept {
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("one that waited: %v", err)
		}
		conn.Close()
	}
}

func TestConnectionWithoutASocketIsRefused(t *testing.T) {
	t.Parallel()
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	for _, conn := range []net.Conn{
		a,
		struct{ net.Conn }{a},
		&connection{rawConn: a},
		&connection{},
		&struct {
			net.Conn
			rawConn io.Writer
		}{Conn: a},
		(*connection)(nil),
	} {
		if got, err := newSocket(conn); err == nil {
			t.Errorf("%T makes %v", conn, got)
		}
	}
}
