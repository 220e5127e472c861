package main

import (
	"bufio"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCommandsThatEnd(t *testing.T) {
	t.Parallel()
	present := filepath.Join(t.TempDir(), "present")
	if err := os.WriteFile(present, []byte("hello\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	absent := filepath.Join(t.TempDir(), "folder", "absent")

	for _, tc := range []struct {
		name           string
		args           []string
		status         int
		stdout, stderr string // stderr is a part of it
	}{
		{"no subcommand", nil, 2, "", "usage: workload SUBCOMMAND"},
		{"unknown subcommand", []string{"nap"}, 2, "", `unknown subcommand "nap"`},
		{"too few arguments", []string{"exit"}, 2, "", "usage: workload exit STATUS [AFTER]"},
		{"too many arguments", []string{"sleep", "1"}, 2, "", "usage: workload sleep"},
		{"bad number", []string{"exit", "-1"}, 2, "", `"-1"`},
		{"bad duration", []string{"print-loop", "soon"}, 2, "", `"soon"`},
		{"exit with a status", []string{"exit", "7", "1ms"}, 7, "", ""},
		{"exit with success", []string{"exit", "0"}, 0, "", ""},
		{"spew alternates", []string{"spew", "4"}, 0, "line 1\nline 3\n", "line 2\nline 4\n"},
		{"test-file of a file", []string{"test-file", present}, 0, "", ""},
		{"test-file of none", []string{"test-file", absent}, 1, "", "no such file"},
		{"touch where there is no folder", []string{"touch", absent}, 1, "", "no such file"},
		{"cat", []string{"cat", present}, 0, "hello\n", ""},
		{"args", []string{"args", "a b", ""}, 0, "\"a b\"\n\"\"\n", ""},
		{"connect to nobody", []string{"connect", "127.0.0.1:1"}, 1, "", "refused"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			var stdout, stderr strings.Builder
			status := runContext(t.Context(), tc.args, &stdout, &stderr)
			if status != tc.status {
				t.Errorf("status %d, want %d; stderr: %s", status, tc.status, stderr.String())
			}
			if diff := cmp.Diff(tc.stdout, stdout.String()); diff != "" {
				t.Errorf("stdout (-want +got):\n%s", diff)
			}
			if tc.stderr == "" && stderr.Len() > 0 || !strings.Contains(stderr.String(), tc.stderr) {
				t.Errorf("stderr %q, want %q in it", stderr.String(), tc.stderr)
			}
		})
	}
}

func TestEnvPrintsNamedVariablesSorted(t *testing.T) {
	t.Setenv("WORKLOAD_B", "2 3")
	t.Setenv("WORKLOAD_A", "1")
	var stdout strings.Builder
	if status := runContext(t.Context(), []string{"env", "WORKLOAD_B", "WORKLOAD_A"}, &stdout, io.Discard); status != 0 {
		t.Fatalf("status %d", status)
	}
	if diff := cmp.Diff("WORKLOAD_A=1\nWORKLOAD_B=2 3\n", stdout.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// launch runs a subcommand that runs on. It returns once it has printed a line,
// and stop ends it as SIGTERM would and returns its status.
func launch(t *testing.T, args ...string) (line string, stop func() int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	status := make(chan int, 1)
	go func() {
		status <- runContext(ctx, args, w, w)
		w.Close()
	}()
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		t.Fatalf("%v printed nothing", args)
	}
	go func() { _, _ = io.Copy(io.Discard, r) }()
	return strings.TrimSuffix(line, "\n"), func() int {
		cancel()
		return <-status
	}
}

func TestCommandsThatRunOnEndWithSuccessOnTerm(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ args, line string }{
		{"sleep", "ready"},
		{"print-loop 1h", "line 1"},
		{"write " + filepath.Join(t.TempDir(), "f") + " text", "ready"},
		{"ready-after 1h " + filepath.Join(t.TempDir(), "f"), "ready"},
		{"memory 2", "touched 2 MiB"},
		{"spin", "ready"},
	} {
		t.Run(tc.args, func(t *testing.T) {
			t.Parallel()
			line, stop := launch(t, strings.Fields(tc.args)...)
			if line != tc.line {
				t.Errorf("first line %q, want %q", line, tc.line)
			}
			if status := stop(); status != 0 {
				t.Errorf("status %d, want 0", status)
			}
		})
	}
}

func TestWriteAppends(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "log")
	for _, text := range []string{"first", "second"} {
		_, stop := launch(t, "write", path, text)
		stop()
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("first\nsecond\n", string(b)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestReadyAfterForgetsAnEarlierLife(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "ready")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, stop := launch(t, "ready-after", "1h", path)
	defer stop()
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the earlier life's file is still there: %v", err)
	}
}

func TestGuestEchoEchoesAndReplacesAStaleSocket(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "echo") // t.TempDir's path may be too long for a socket's
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "1024.sock")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	line, stop := launch(t, "guest-echo", dir, "1024")
	if want := "listening on " + path; line != want {
		t.Fatalf("first line %q, want %q", line, want)
	}
	var d net.Dialer
	c, err := d.DialContext(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "ping"); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil || string(b) != "ping" {
		t.Errorf("got %q, %v; want ping back", b, err)
	}
	if status := stop(); status != 0 {
		t.Errorf("status %d, want 0", status)
	}
}

func TestGreetSaysItsTextAndEchoes(t *testing.T) {
	t.Parallel()
	line, stop := launch(t, "greet", "127.0.0.1:0", "I am web")
	defer stop()
	var d net.Dialer
	c, err := d.DialContext(t.Context(), "tcp", strings.TrimPrefix(line, "listening on "))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "ping"); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "I am web\nping" {
		t.Errorf("got %q, %v", b, err)
	}
}
