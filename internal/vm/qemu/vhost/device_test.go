//go:build linux

package vhost

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestDial(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	if _, err := g.device.Dial(t.Context(), 7); !errors.Is(err, ErrNotStarted) {
		t.Error("before the guest has set the device up:", err)
	}
	g.setUp()
	conn, k := g.dialled()

	// The guest takes a thousand bytes, and then as many again.
	h := of(k, opCreditUpdate)
	h.room = 1000
	g.send(h, "")
	sent := strings.Repeat("0123456789", 150)
	g.heard()
	if _, err := io.WriteString(conn, sent); err != nil {
		t.Fatal(err)
	}
	var got string
	for len(got) < 1000 {
		h, payload := g.receive()
		if h.op != opData {
			t.Fatalf("%+v", h)
		}
		got += payload
	}
	if got != sent[:1000] {
		t.Errorf("%d bytes arrived", len(got))
	}
	if h, _, ok := g.receiveFor(20 * time.Millisecond); ok {
		t.Errorf("without credit the guest was sent %+v", h)
	}
	h.taken = 1000
	g.send(h, "")
	for len(got) < len(sent) {
		_, payload := g.receive()
		got += payload
	}
	if got != sent {
		t.Errorf("%d bytes arrived, and are others", len(got))
	}

	// Half of it ends, then all of it.
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if h := g.wants(opShutdown, k); h.flags != shutSend {
		t.Errorf("the host writes no more: flags %d", h.flags)
	}
	g.send(of(k, opData), "and back")
	back := make([]byte, 8)
	if _, err := io.ReadFull(conn, back); err != nil || string(back) != "and back" {
		t.Errorf("%q, %v", back, err)
	}
	conn.Close()
	if h := g.wants(opShutdown, k); h.flags != shutBoth {
		t.Errorf("the host has closed it: flags %d", h.flags)
	}
	g.send(of(k, opReset), "")
	g.none()
}

func TestDialIsRefusedOrGivenUp(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.setUp()
	failed := make(chan error, 1)
	dial := func(ctx context.Context) key {
		go func() {
			_, err := g.device.Dial(ctx, 9)
			failed <- err
		}()
		h, _ := g.receive()
		return key{guest: 9, host: h.sourcePort}
	}
	g.send(of(dial(t.Context()), opReset), "")
	if err := <-failed; !errors.Is(err, ErrRefused) {
		t.Error("refused:", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	k := dial(ctx)
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Error("given up:", err)
	}
	g.wants(opReset, k)
	g.send(of(k, opResponse), "") // which was on its way
	g.wants(opReset, k)
	dial(t.Context())
	if err := g.unplug(); err != nil {
		t.Error(err)
	}
	if err := <-failed; !errors.Is(err, errReset) {
		t.Error("unplugged:", err)
	}
	g.none()
}

func TestGuestDials(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.setUp()
	k := key{guest: 5000, host: 1025}
	g.send(of(k, opRequest), "")
	g.wants(opReset, k) // nobody listens
	listener, err := g.device.Listen(1025)
	g.must(err)
	if _, err := g.device.Listen(1025); !errors.Is(err, errInUse) {
		t.Error("a second one listens:", err)
	}
	g.send(of(k, opRequest), "")
	g.wants(opResponse, k)
	conn, err := listener.Accept()
	g.must(err)
	defer conn.Close()
	g.must(conn.SetDeadline(time.Now().Add(patience)))
	g.send(of(k, opData), "hello")
	h := of(k, opShutdown)
	h.flags = shutSend
	g.send(h, "")
	if said, err := io.ReadAll(conn); string(said) != "hello" || err != nil {
		t.Errorf("%q, %v", said, err)
	}
	if _, err := io.WriteString(conn, "still here"); err != nil {
		t.Error(err)
	}
	if h, payload := g.receive(); h.op != opData || payload != "still here" {
		t.Errorf("%+v, %q", h, payload)
	}
	h.flags = shutReceive
	g.send(h, "")
	g.wants(opReset, k) // both ways it is over
	if _, err := io.WriteString(conn, "too late"); !errors.Is(err, syscall.EPIPE) {
		t.Error("the guest has closed it:", err)
	}
	g.none()

	// Those that are not accepted end with the listener.
	for range maxQueued + 1 {
		k.guest++
		g.send(of(k, opRequest), "")
		if h, _ := g.receive(); h.op == opReset {
			break
		}
	}
	if k.guest != 5000+maxQueued+1 {
		t.Errorf("%d connections wait to be accepted", k.guest-5000)
	}
	listener.Close()
	if _, err := listener.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Error("a closed listener:", err)
	}
	ended := 0
	for ended < maxQueued {
		h, _ := g.receive()
		if h.op != opShutdown || h.flags != shutBoth {
			t.Fatalf("%+v", h)
		}
		g.send(of(key{guest: h.targetPort, host: h.sourcePort}, opReset), "")
		ended++
	}
	g.none()
}

// TestCredit has the guest send more than anybody reads.
func TestCredit(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.setUp()
	conn, k := g.dialled()
	payload := strings.Repeat("x", 60<<10)
	const rounds = 40
	sum := make(chan int64, 1)
	read := make(chan struct{})
	go func(read <-chan struct{}) {
		<-read
		n, _ := io.Copy(io.Discard, conn)
		sum <- n
	}(read)
	var sent, taken uint32
	for i := 0; i < rounds; {
		if uint32(len(payload)) <= room-(sent-taken) {
			g.send(of(k, opData), payload)
			sent += uint32(len(payload))
			i++
			continue
		}
		if read != nil {
			// What the socket between takes counts as read.
			h, _, ok := g.receiveFor(100 * time.Millisecond)
			if ok {
				taken = h.taken
				continue
			}
			close(read)
			read = nil
		}
		h, _ := g.receive()
		if h.op != opCreditUpdate || h.room != room {
			t.Fatalf("%+v", h)
		}
		taken = h.taken
	}
	g.send(of(k, opCreditRequest), "")
	for {
		if h := g.wants(opCreditUpdate, k); h.taken == sent {
			break
		}
		g.send(of(k, opCreditRequest), "") // the host reads on meanwhile
	}
	h := of(k, opShutdown)
	h.flags = shutBoth
	g.send(h, "")
	for {
		if h, _ := g.receive(); h.op == opReset {
			break
		}
	}
	if n := <-sum; n != int64(sent) {
		t.Errorf("%d of %d bytes arrived", n, sent)
	}

	// One that takes more than it was given loses the connection, and what it
	// had sent before arrives.
	conn, k = g.dialled()
	for range 20 {
		g.send(of(k, opData), payload)
	}
	for {
		if h, _ := g.receive(); h.op == opReset {
			break
		}
	}
	n, err := io.Copy(io.Discard, conn)
	if n < room || n%int64(len(payload)) != 0 || err != nil {
		t.Errorf("%d bytes arrived, %v", n, err)
	}
	g.none()
}

// TestPauseLosesNothing pauses a machine again and again while bytes flow both
// ways, at whatever moment that meets.
func TestPauseLosesNothing(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.setUp()
	conn, k := g.dialled()
	const pauses, total = 300, 4 << 20
	arrived := make(chan []byte, 1)
	go func() {
		if _, err := io.Copy(conn, io.LimitReader(counter(0), total)); err != nil {
			t.Error(err)
		}
	}()
	go func() {
		all := make([]byte, total)
		if _, err := io.ReadFull(conn, all); err != nil {
			t.Error(err)
		}
		arrived <- all
	}()
	want, err := io.ReadAll(io.LimitReader(counter(0), total))
	g.must(err)
	var got []byte
	sent, credit := 0, 0
	for round := 0; len(got) < total || sent < total; round++ {
		for range 4 {
			h := of(k, opData)
			h.taken = uint32(len(got))
			if n := min(total-sent, 5000, room-(sent-credit)); n > 0 {
				g.send(h, string(want[sent:sent+n]))
				sent += n
			}
			for {
				h, payload, ok := g.receiveFor(0)
				if !ok {
					break
				}
				got = append(got, payload...)
				credit = int(h.taken)
			}
		}
		if round < pauses {
			g.pause()
			if round%3 == 0 {
				g.shareMemory() // as it is, at another address of ours
			}
			g.resume()
		}
	}
	if !bytes.Equal(got, want) {
		t.Error("the guest was sent something else")
	}
	if !bytes.Equal(<-arrived, want) {
		t.Error("the host was sent something else")
	}
}

// TestKickThatWasLost has a packet wait in a ring that is started, of which no
// kick tells any more.
func TestKickThatWasLost(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.setUp()
	g.heard()
	g.pause()
	k := key{guest: 1, host: 2}
	g.send(of(k, opData), "")
	if _, err := g.rings[fromGuest].kick.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	g.resume()
	g.wants(opReset, k)
}

// counter is a stream of bytes that count up.
func counter(from byte) io.Reader { return &counting{from} }

type counting struct{ next byte }

func (c *counting) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = c.next
		c.next += 7
	}
	return len(p), nil
}

// TestPlugAgain has a machine's memory saved: the device goes, and comes back.
func TestPlugAgain(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.setUp()
	listener, err := g.device.Listen(1025)
	g.must(err)
	conn, _ := g.dialled()
	if err := g.unplug(); err != nil {
		t.Error(err)
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Error("of a device that is gone:", err)
	}
	if _, err := g.device.Dial(t.Context(), 7); !errors.Is(err, ErrNotStarted) {
		t.Error(err)
	}
	g.plug()
	for i := range g.rings {
		r := &g.rings[i]
		r.next, r.seen, r.base = 0, 0, 0
		clear(g.memory[r.avail : r.avail+4])
		clear(g.memory[r.used : r.used+4])
	}
	g.setUp()
	k := key{guest: 5000, host: 1025}
	g.send(of(k, opRequest), "")
	g.wants(opResponse, k)
	if _, err := listener.Accept(); err != nil {
		t.Error(err)
	}
	g.device.Close()
	if err := g.ends(); err != nil {
		t.Error(err)
	}
	if _, err := listener.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

func TestHostReadsNoMore(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.setUp()
	conn, k := g.dialled()
	g.must(conn.CloseRead())
	g.send(of(k, opData), "nobody reads this")
	if h := g.wants(opShutdown, k); h.flags != shutReceive {
		t.Errorf("flags %d", h.flags)
	}
	if _, err := io.WriteString(conn, "but listen"); err != nil {
		t.Error(err)
	}
	if h, payload := g.receive(); h.op != opData || payload != "but listen" || h.taken != 17 {
		t.Errorf("%+v, %q", h, payload)
	}
}
