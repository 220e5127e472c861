package wire

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// creditPair is two ends over a socket, as between the host and a vsock device.
func creditPair(t testing.TB) (a, b *CreditConn) {
	t.Helper()
	one, other := rawPair(t)
	a, b = WithCredit(one), WithCredit(other)
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func rawPair(t testing.TB) (one, other net.Conn) {
	t.Helper()
	listener, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if one, err = net.Dial("unix", listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if other, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { one.Close(); other.Close() })
	return one, other
}

func TestCreditCarriesBothWaysAtOnce(t *testing.T) {
	t.Parallel()
	a, b := creditPair(t)
	payload := make([]byte, 8<<20)
	random := rand.NewChaCha8([32]byte{})
	random.Read(payload)
	var all sync.WaitGroup
	for _, conn := range []*CreditConn{a, b} {
		all.Go(func() {
			if n, err := conn.Write(payload); n != len(payload) || err != nil {
				t.Error(n, err)
			}
			if err := conn.CloseWrite(); err != nil {
				t.Error(err)
			}
		})
		all.Go(func() {
			got, err := io.ReadAll(conn)
			if !bytes.Equal(got, payload) || err != nil {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	all.Wait()
	if _, err := a.Write([]byte("more")); !errors.Is(err, syscall.EPIPE) {
		t.Error("written after CloseWrite:", err)
	}
}

// A side that reads nothing must not keep what it writes from being read.
func TestCreditDirectionsAreIndependent(t *testing.T) {
	t.Parallel()
	a, b := creditPair(t)
	blocked := make(chan error, 1)
	go func() {
		_, err := a.Write(make([]byte, 4*creditWindow)) // b does not read
		blocked <- err
	}()
	go b.Write(make([]byte, 16*creditWindow))
	if _, err := io.CopyN(io.Discard, a, 16*creditWindow); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, b, 4*creditWindow); err != nil {
		t.Fatal(err)
	}
	if err := <-blocked; err != nil {
		t.Fatal(err)
	}
}

// What a peer sent before it went is read to its end.
func TestCreditOutlivesPeer(t *testing.T) {
	t.Parallel()
	one, other := rawPair(t)
	b := WithCredit(other)
	if _, err := b.Write(make([]byte, creditWindow)); err != nil {
		t.Fatal(err)
	}
	b.Close()
	a := WithCredit(one) // it can send nothing any more
	defer a.Close()
	if n, err := io.Copy(io.Discard, a); n != creditWindow || err != nil {
		t.Error(n, err)
	}
}

func TestCreditDeadlines(t *testing.T) {
	t.Parallel()
	a, b := creditPair(t)
	a.SetDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("read:", err)
	}
	a.SetDeadline(time.Time{})
	if _, err := a.Write(make([]byte, creditWindow)); err != nil {
		t.Fatal(err)
	}
	a.SetDeadline(time.Now().Add(20 * time.Millisecond))
	n, err := a.Write(make([]byte, 1))
	if !errors.Is(err, os.ErrDeadlineExceeded) || n != 0 {
		t.Errorf("write: %d, %v", n, err)
	}
	a.SetDeadline(time.Time{})
	if got, err := io.ReadAll(io.LimitReader(b, creditWindow)); len(got) != creditWindow || err != nil {
		t.Errorf("%d, %v", len(got), err)
	}
	if _, err := a.Write([]byte("it goes on")); err != nil {
		t.Error(err)
	}
}

func TestCreditCloseEndsWhatWaits(t *testing.T) {
	t.Parallel()
	a, b := creditPair(t)
	ended := make(chan error, 2)
	go func() { _, err := a.Read(make([]byte, 1)); ended <- err }()
	go func() { _, err := a.Write(make([]byte, 2*creditWindow)); ended <- err }()
	if _, err := io.ReadFull(b, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	a.Close()
	for range 2 {
		if err := <-ended; !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	}
	if _, err := io.Copy(io.Discard, b); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Error("the peer:", err)
	}
}

// Whatever a guest sends, memory is bounded and nothing waits for ever.
func FuzzCreditReceive(f *testing.F) {
	f.Add([]byte{0, 0, 0, 2, 'h', 'i', 1, 0, 0, 0, 2, 0, 0, 0})
	f.Add([]byte{0, 0xff, 0xff, 0xff, 1})
	f.Add([]byte{1, 0, 0, 1})
	f.Add([]byte{3, 0, 0, 0})
	f.Fuzz(func(t *testing.T, sent []byte) {
		one, other := net.Pipe()
		c := WithCredit(one)
		go io.Copy(io.Discard, other)
		go func() {
			other.Write(sent)
			other.Close()
		}()
		n, err := io.Copy(io.Discard, c)
		if n > int64(len(sent)) {
			t.Errorf("%d bytes of %d, %v", n, len(sent), err)
		}
		c.Close()
	})
}
