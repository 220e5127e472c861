//go:build unix

package wire

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

// unixPair returns two ends of a connection over a unix socket.
func unixPair(t testing.TB) (*net.UnixConn, *net.UnixConn) {
	t.Helper()
	dir, err := os.MkdirTemp("", "w")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	a, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	b, err := listener.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	for _, conn := range []*net.UnixConn{a, b} {
		t.Cleanup(func() { conn.Close() })
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return a, b
}

func TestWhatIsSentIsReceived(t *testing.T) {
	t.Parallel()
	a, b := unixPair(t)
	from, to := New(a, MaxFrame), New(b, MaxFrame)
	data := bytes.Repeat([]byte("0123456789"), ChunkSize/4)
	request := &guestv1.Request{Protocol: Protocol, Call: &guestv1.Request_Attach{Attach: &guestv1.Attach{Id: "7"}}}
	sent := make(chan error, 1)
	go func() {
		sent <- errors.Join(from.Send(request), from.SendData(KindData, data), from.SendData(KindData, nil), a.Close())
	}()
	var got guestv1.Request
	if err := to.ReceiveMessage(&got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(request, &got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	all, err := io.ReadAll(to.Reader())
	if err != nil || !bytes.Equal(all, data) {
		t.Errorf("%d bytes of %d, %v", len(all), len(data), err)
	}
	if _, _, err := to.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("after the last frame: %v", err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

func TestReceiveTakesNoByteTooMany(t *testing.T) {
	t.Parallel()
	a, b := unixPair(t)
	if err := New(a, MaxFrame).Send(&guestv1.Response{}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Write([]byte("raw")); err != nil {
		t.Fatal(err)
	}
	conn := New(b, MaxFrame)
	if err := conn.ReceiveMessage(&guestv1.Response{}); err != nil {
		t.Fatal(err)
	}
	raw := make([]byte, 3)
	if _, err := io.ReadFull(conn.NetConn(), raw); err != nil || string(raw) != "raw" {
		t.Errorf("%q, %v", raw, err)
	}
}

func TestReceiveRefusesWhatIsNotProtocol(t *testing.T) {
	t.Parallel()
	for name, frame := range map[string][]byte{
		"kind":  {0, 0, 0, 0, 3},
		"size":  {0, 0, 4, 1, 1},
		"most":  {0xff, 0xff, 0xff, 0xff, 0},
		"proto": {0, 0, 0, 1, 0, 0xff},
		"bytes": {0, 0, 0, 1, 1, 'x'},
	} {
		a, b := unixPair(t)
		if _, err := a.Write(frame); err != nil {
			t.Fatal(err)
		}
		if err := New(b, 1024).ReceiveMessage(&guestv1.Request{}); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestFrameThatEndsEarlyIsNoEnd(t *testing.T) {
	t.Parallel()
	for _, frame := range [][]byte{{0}, {0, 0, 0, 2, 1}, {0, 0, 0, 2, 1, 'x'}} {
		a, b := unixPair(t)
		if _, err := a.Write(frame); err != nil {
			t.Fatal(err)
		}
		a.Close()
		if _, _, err := New(b, 1024).Receive(); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%v: %v", frame, err)
		}
	}
}

func TestReaderEndsWithFailureOfTheOther(t *testing.T) {
	t.Parallel()
	a, b := unixPair(t)
	conn := New(a, MaxFrame)
	failure := &guestv1.Failure{Code: guestv1.Failure_CODE_EXHAUSTED, Message: "disk full"}
	if err := errors.Join(conn.SendData(KindData, []byte("some")), conn.Send(&guestv1.Response{Failure: failure})); err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(New(b, MaxFrame).Reader())
	said, ok := errors.AsType[*FailureError](err)
	if string(data) != "some" || !ok || !proto.Equal(said.Failure, failure) {
		t.Errorf("%q, %v", data, err)
	}
}

func TestDescriptorPasses(t *testing.T) {
	t.Parallel()
	a, b := unixPair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := New(a, MaxFrame).SendDescriptors(&guestv1.Response{Protocol: 9}, int(w.Fd())); err != nil {
		t.Fatal(err)
	}
	w.Close()
	var got guestv1.Response
	fds, err := New(b, MaxFrame).ReceiveDescriptors(&got, 1)
	if err != nil || len(fds) != 1 || got.GetProtocol() != 9 {
		t.Fatalf("%v, %v, %v", fds, &got, err)
	}
	file := os.NewFile(uintptr(fds[0]), "passed")
	if _, err := file.WriteString("through"); err != nil {
		t.Fatal(err)
	}
	file.Close()
	if text, err := io.ReadAll(r); err != nil || string(text) != "through" {
		t.Errorf("%q, %v", text, err)
	}
}

// FuzzReceive feeds a Conn bytes of a peer that is not to be trusted.
func FuzzReceive(f *testing.F) {
	const limit = 256
	f.Add([]byte{})
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 1})
	f.Add([]byte{0, 0, 0, 4, 1, 'd', 'a', 't', 'a', 0, 0, 0, 0, 1})
	f.Add([]byte{0, 0, 0, 3, 2, 'e', 'r', 'r'})
	f.Add([]byte{0, 0, 1, 1, 1})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff})
	failure, err := proto.Marshal(&guestv1.Response{Failure: &guestv1.Failure{Message: "no"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(append([]byte{0, 0, 0, byte(len(failure)), 0}, failure...))
	f.Fuzz(func(t *testing.T, input []byte) {
		feed := func() *Conn {
			near, far := net.Pipe()
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = far.Write(input)
				far.Close()
			}()
			t.Cleanup(func() { near.Close(); <-done })
			return New(near, limit)
		}
		conn := feed()
		taken := 0
		for {
			kind, payload, err := conn.Receive()
			if err != nil {
				break
			}
			if len(payload) > limit || kind > KindEvent {
				t.Fatalf("a frame of kind %d with %d bytes", kind, len(payload))
			}
			if want := input[taken+headerSize : taken+headerSize+len(payload)]; !bytes.Equal(payload, want) {
				t.Fatalf("%q, not %q", payload, want)
			}
			taken += headerSize + len(payload)
		}
		data, err := io.ReadAll(feed().Reader())
		if len(data) > len(input) {
			t.Fatalf("%d bytes out of %d", len(data), len(input))
		}
		if err == nil && !bytes.Contains(input, []byte{0, 0, 0, 0, byte(KindData)}) {
			t.Fatal("an end without a frame that says so")
		}
		_ = feed().ReceiveMessage(&guestv1.Request{})
	})
}
