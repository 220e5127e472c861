package shim

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestDialOfAPathThatIsTooLong(t *testing.T) {
	t.Parallel()
	const name = "control.sock"
	short, err := os.MkdirTemp("/tmp", "shim")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(short) })
	listener, err := net.Listen("unix", filepath.Join(short, name))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	accepted := make(chan error, 1)
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			err = conn.Close()
		}
		accepted <- err
	}()
	long := filepath.Join(short, strings.Repeat("a", 100), strings.Repeat("b", 100))
	if err := os.MkdirAll(long, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(short, name), filepath.Join(long, name)); err != nil {
		t.Fatal(err)
	}
	if _, err := net.Dial("unix", filepath.Join(long, name)); err == nil {
		t.Error("a path of that length is no problem here; the test shows nothing")
	}
	conn, err := dialLinked(t.Context(), long, name)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if err := <-accepted; err != nil {
		t.Error(err)
	}
	if _, err := dialLinked(t.Context(), long, "absent"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a socket that is not there: %v", err)
	}
	entries, err := filepath.Glob("/tmp/choiros-*/d")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if target, _ := os.Readlink(entry); target == long {
			t.Errorf("%s is left", entry)
		}
	}
}
