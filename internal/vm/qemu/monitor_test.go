//go:build linux

package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}}, "capabilities": ["oob"]}}` + "\n"

// fakeQEMU greets and then answers each command with what answer returns.
func fakeQEMU(t *testing.T, onEvent func(qmp.Event), answer func(name string, id int) string) *monitor {
	t.Helper()
	ours, theirs := net.Pipe()
	if onEvent == nil {
		onEvent = func(qmp.Event) {}
	}
	m := newMonitor(ours, onEvent)
	t.Cleanup(func() {
		theirs.Close()
		m.close()
	})
	go func() {
		io.WriteString(theirs, greeting)
		for in := bufio.NewScanner(theirs); in.Scan(); {
			var command struct {
				Execute string `json:"execute"`
				ID      int    `json:"id"`
			}
			if err := json.Unmarshal(in.Bytes(), &command); err != nil {
				t.Error(err)
			}
			said := fmt.Sprintf(`{"return": {}, "id": %d}`, command.ID) + "\n"
			if command.Execute != "qmp_capabilities" {
				said = answer(command.Execute, command.ID)
			}
			if _, err := io.WriteString(theirs, said); err != nil {
				return
			}
		}
	}()
	return m
}

func TestMonitorAnswers(t *testing.T) {
	t.Parallel()
	var seen []string
	m := fakeQEMU(t, func(e qmp.Event) { seen = append(seen, e.Event) }, func(name string, id int) string {
		if name == "bad" {
			return fmt.Sprintf(`{"error": {"class": "GenericError", "desc": "no such thing"}, "id": %d}`+"\n", id)
		}
		return fmt.Sprintf(`{"event": "STOP", "data": {}}`+"\n"+`{"return": {"running": true}, "id": %d}`+"\n", id)
	})
	if err := m.connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	var got struct{ Running bool }
	if err := m.run(t.Context(), "query-status", nil, &got); err != nil || !got.Running {
		t.Error(got, err)
	}
	err := m.run(t.Context(), "bad", nil, nil)
	if refusal, ok := errors.AsType[*commandError](err); !ok || refusal.Class != "GenericError" || err.Error() != "qmp bad: no such thing" {
		t.Error(err)
	}
	if len(seen) != 1 || seen[0] != "STOP" {
		t.Error("events:", seen)
	}
}

// A late answer is not taken for that of the next command.
func TestMonitorForgetsWhatCameTooLate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := fakeQEMU(t, nil, func(name string, id int) string {
			if name == "slow" {
				time.Sleep(commandTimeout + time.Second)
			}
			return fmt.Sprintf(`{"return": %q, "id": %d}`+"\n", name, id)
		})
		if err := m.connect(t.Context()); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := m.run(t.Context(), "slow", nil, nil); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != commandTimeout {
			t.Error(err, time.Since(start))
		}
		var got string
		if err := m.run(t.Context(), "quick", nil, &got); err != nil || got != "quick" {
			t.Error(got, err)
		}
	})
}

func TestMonitorThatIsSilentOrEndsIsAnError(t *testing.T) {
	t.Parallel()
	ours, theirs := net.Pipe()
	m := newMonitor(ours, func(qmp.Event) {})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.connect(ctx); !errors.Is(err, context.Canceled) {
		t.Error("no greeting:", err)
	}
	theirs.Close()
	if err := m.connect(t.Context()); !errors.Is(err, errMonitorClosed) {
		t.Error("closed:", err)
	}
	if err := m.run(t.Context(), "stop", nil, nil); err == nil {
		t.Error("a command to nobody succeeded")
	}
	m.close()
}

func FuzzMonitorReceive(f *testing.F) {
	f.Add(greeting + greeting + `{"return": {}, "id": 1}` + "\n")
	f.Add(`{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}` + "\n")
	f.Add(`{"error": {"class": 1}}` + "\n")
	f.Add(strings.Repeat("x", 100))
	f.Fuzz(func(_ *testing.T, said string) {
		ours, theirs := net.Pipe()
		m := newMonitor(ours, func(qmp.Event) {})
		go io.Copy(io.Discard, theirs)
		io.WriteString(theirs, said)
		theirs.Close()
		m.close()
	})
}

func TestTailKeepsTheEnd(t *testing.T) {
	t.Parallel()
	var said tail
	for i := range 2000 {
		fmt.Fprintf(&said, "line %d\x1b\n", i)
	}
	if got := said.String(); len(got) > maxSaid+1000 || !strings.HasSuffix(got, "line 1998; line 1999") || strings.ContainsAny(got, "\x1b\n") {
		t.Errorf("%d bytes: …%q", len(got), got[max(0, len(got)-60):])
	}
}
