package container

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
)

// box is a sandbox of a test's.
type box struct {
	t   *testing.T
	d   *Driver
	ref sandbox.Ref
}

var boxes atomic.Int64

// newBox returns a sandbox that does not exist yet, and is deleted at the end.
func newBox(t *testing.T, d *Driver) *box {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "ctr")
	if err != nil {
		t.Fatal(err)
	}
	b := &box{t, d, sandbox.Ref{ID: fmt.Sprintf("b%d", boxes.Add(1)), Dir: dir}}
	t.Cleanup(func() {
		if err := d.Delete(context.Background(), b.ref); err != nil {
			t.Errorf("Delete: %v", err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("what the sandbox wrote cannot be removed: %v", err)
		}
		checkLeaks(t, d.cfg.Owner, b.ref)
	})
	return b
}

func (b *box) must(what string, err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatalf("%s: %v", what, err)
	}
}

// start creates and starts a sandbox and its workload, which may have ended by
// the time.
func (b *box) start(spec sandbox.Spec) {
	b.t.Helper()
	b.must("Create", b.d.Create(b.t.Context(), b.ref, spec))
	b.startAgain(guest.Configuration{})
}

// startAgain starts a sandbox that was created.
func (b *box) startAgain(c guest.Configuration) {
	b.t.Helper()
	b.must("Start", b.d.Start(b.t.Context(), b.ref))
	if err := b.configure(c); err != nil {
		if o, inspected := b.d.Inspect(b.t.Context(), b.ref); inspected != nil || o.State == sandbox.StateRunning {
			b.must("Configure", err)
		}
	}
}

// guest is the sandbox's guestd.
func (b *box) guest() *guest.Guest {
	return guest.New(b.ref.ID, func(ctx context.Context) (net.Conn, error) { return b.d.Dial(ctx, b.ref, guest.Port) })
}

// configure waits until guestd listens, or the sandbox has ended, and has it
// start the workload.
func (b *box) configure(c guest.Configuration) (err error) {
	b.t.Helper()
	eventually(b.t, "guestd listens", func() bool {
		if err = b.guest().Configure(b.t.Context(), c); !errors.Is(err, sandbox.ErrUnavailable) {
			return true
		}
		o, inspected := b.d.Inspect(b.t.Context(), b.ref)
		return inspected != nil || o.State != sandbox.StateRunning
	})
	return err
}

// exec runs a command inside and returns its status and what it printed.
func (b *box) exec(command ...string) (code int, output string, err error) {
	exec, err := b.guest().Exec(b.t.Context(), guest.Command{Args: command, NoInput: true})
	if err != nil {
		return 0, "", err
	}
	defer exec.Close()
	var text strings.Builder
	for {
		out, err := exec.Receive()
		if err != nil {
			return 0, text.String(), err
		}
		if out.Exit != nil {
			return int(out.Exit.Code), text.String(), nil
		}
		text.Write(out.Data)
	}
}

// run runs a sandbox to its end and returns what it printed and its status.
func (b *box) run(spec sandbox.Spec) (output string, code int) {
	b.t.Helper()
	b.start(spec)
	o, err := b.d.Wait(b.t.Context(), b.ref)
	b.must("Wait", err)
	return b.output(), o.ExitCode
}

// output returns all that it has printed, once it has ended.
func (b *box) output() string { return b.printed(true) }

// printed returns what it has printed: all until now, or until its end.
func (b *box) printed(untilEnd bool) string {
	b.t.Helper()
	var text strings.Builder
	b.must("Logs", b.d.Logs(b.t.Context(), b.ref, sandbox.LogOptions{Tail: -1, Stdout: true, Stderr: true, Follow: untilEnd},
		func(e sandbox.LogEntry) error {
			text.Write(e.Data)
			return nil
		}))
	return text.String()
}

// program is a spec that runs the test workload.
func program(img string, args ...string) sandbox.Spec {
	return sandbox.Spec{Driver: "podman", Image: img, Command: args}
}

// values reads KEY=VALUE lines.
func values(text string) map[string]string {
	found := map[string]string{}
	for line := range strings.Lines(text) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			found[key] = value
		}
	}
	return found
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !condition(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}
