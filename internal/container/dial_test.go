package container

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// guestListener listens in a sandbox's guest folder and says hello.
func guestListener(t *testing.T, path string) net.Listener {
	t.Helper()
	// Made where the path is short, as the guest does, and moved.
	short := filepath.Join(shortDir(t), "s")
	listener, err := net.Listen("unix", short)
	if err != nil {
		t.Fatal(err)
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(false)
	t.Cleanup(func() { listener.Close() })
	if err := os.Rename(short, path); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, "hello")
			conn.Close()
		}
	}()
	return listener
}

func dialDriver(t *testing.T) *Driver {
	t.Helper()
	d, err := New(Config{Socket: "/nowhere", Owner: newOwner()})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDialReachesAnyPathLength(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("only Linux can connect to an opened file")
	}
	ref := sandbox.Ref{ID: "a", Dir: mkdir(t, shortDir(t), strings.Repeat("long/", 40))}
	if err := makeDir(ref); err != nil {
		t.Fatal(err)
	}
	guestListener(t, filepath.Join(guestDir(ref), "4294967295.sock"))
	conn, err := dialDriver(t).Dial(t.Context(), ref, 1<<32-1)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if said, err := io.ReadAll(conn); err != nil || string(said) != "hello" {
		t.Errorf("it says %q, %v", said, err)
	}
}

func TestDialFollowsNothingOfTheGuests(t *testing.T) {
	t.Parallel()
	ref := sandbox.Ref{ID: "a", Dir: shortDir(t)}
	if err := makeDir(ref); err != nil {
		t.Fatal(err)
	}
	guest := guestDir(ref)
	secret := filepath.Join(shortDir(t), "secret.sock")
	guestListener(t, secret)
	stale := filepath.Join(guest, "3.sock")
	guestListener(t, stale).Close()
	for name, plant := range map[string]func(path string) error{
		"a link to a socket": func(path string) error { return os.Symlink(secret, path) },
		"a link to nothing":  func(path string) error { return os.Symlink("nothing", path) },
		"a file":             func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"a folder":           func(path string) error { return os.Mkdir(path, 0o700) },
		"a dead socket":      func(path string) error { return os.Link(stale, path) },
		"nothing":            func(string) error { return nil },
	} {
		port := uint32(len(name))
		if err := plant(filepath.Join(guest, strconv.Itoa(len(name))+".sock")); err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		conn, err := dialDriver(t).Dial(t.Context(), ref, port)
		if err == nil {
			conn.Close()
			t.Errorf("%s: dialled", name)
		}
		if !errors.Is(err, sandbox.ErrUnavailable) && name != "a link to a socket" && name != "a link to nothing" {
			t.Errorf("%s: %v, want unavailable", name, err)
		}
		if took := time.Since(begun); took > time.Second {
			t.Errorf("%s: it took %s", name, took)
		}
	}
	// Nor the folder, should Ref.Dir's owner have made it a link.
	other := sandbox.Ref{ID: "b", Dir: shortDir(t)}
	if err := os.Symlink(guest, guestDir(other)); err != nil {
		t.Fatal(err)
	}
	guestListener(t, filepath.Join(guest, "99.sock"))
	if conn, err := dialDriver(t).Dial(t.Context(), other, 99); err == nil {
		conn.Close()
		t.Error("dialled through a folder that is a link")
	}
}
