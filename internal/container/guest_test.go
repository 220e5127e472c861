package container

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containers/podman/v5/pkg/bindings"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/test/image"
)

// TestGuestdServesEveryKindOfContainer has guestd start a workload, take both
// kinds of secrets and run commands, whoever it runs as and whatever it lacks.
// The images have nothing but the workload's program.
func TestGuestdServesEveryKindOfContainer(t *testing.T) {
	t.Parallel()
	d := backend(t)
	for name, test := range map[string]struct {
		image, user, options string
		uid                  string
	}{
		"root":           {image: image.RootName, uid: "0"},
		"user":           {image: image.UserName, uid: "1000"},
		"spec's user":    {image: image.RootName, user: "1234:5678", uid: "1234"},
		"made root":      {image: image.UserName, user: "0", uid: "0"},
		"read-only":      {image: image.UserName, options: `{"read_only_rootfs":true}`, uid: "1000"},
		"no network":     {image: image.RootName, options: `{"network":"none"}`, uid: "0"},
		"userns root":    {image: image.UserName, options: `{"userns":"root"}`, uid: "1000"},
		"all at a time":  {image: image.RootName, user: "77", options: `{"userns":"root","network":"none","read_only_rootfs":true}`, uid: "77"},
		"one capability": {image: image.RootName, options: `{"cap_add":["CHOWN"]}`, uid: "0"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t, d)
			spec := program(test.image, "sleep")
			spec.User, spec.DriverOptions = test.user, json.RawMessage(test.options)
			b.must("Create", d.Create(t.Context(), b.ref, spec))
			b.startAgain(guest.Configuration{Secrets: []guest.Secret{
				{Name: "CANARY", Value: []byte("in the environment")},
				{Name: "canary", Value: []byte("in a file"), File: true},
			}})
			for _, command := range []struct{ args, want string }{
				{"/workload env CANARY", "in the environment"},
				{"/workload cat /run/secrets/canary", "in a file"},
				{"/workload id", "uid=" + test.uid + "\n"},
				{"/workload mounts", "/run/secrets tmpfs"},
			} {
				code, output, err := b.exec(strings.Fields(command.args)...)
				if err != nil || code != 0 || !strings.Contains(output, command.want) {
					t.Errorf("%s: %d, %v, %q; want %q", command.args, code, err, output, command.want)
				}
			}
			if info, err := b.guest().Stat(t.Context(), "/run/secrets/canary"); errors.Is(err, sandbox.ErrUnsupported) {
				t.Log(err)
			} else if err != nil || info.Mode != 0o400 {
				t.Errorf("the file has mode %04o, %v", info.Mode, err)
			}
		})
	}
}

func TestSecretFilesAreGoneAfterARestart(t *testing.T) {
	t.Parallel()
	d := backend(t)
	b := newBox(t, d)
	b.must("Create", d.Create(t.Context(), b.ref, program(image.UserName, "sleep")))
	b.startAgain(guest.Configuration{Secrets: []guest.Secret{{Name: "canary", Value: []byte("x"), File: true}}})
	const file = "/run/secrets/canary"
	if code, _, err := b.exec("/workload", "test-file", file); err != nil || code != 0 {
		t.Fatalf("%d, %v", code, err)
	}
	b.must("Stop", d.Stop(t.Context(), b.ref, 0))
	b.startAgain(guest.Configuration{Generation: 2})
	if code, _, err := b.exec("/workload", "test-file", file); err != nil || code != 1 {
		t.Errorf("after a restart: %d, %v; want that it is gone", code, err)
	}
}

// TestSecretsAreNowhereOnTheHost looks for secrets where Podman keeps things.
func TestSecretsAreNowhereOnTheHost(t *testing.T) {
	t.Parallel()
	d := backend(t)
	b := newBox(t, d)
	canary := "canary-" + newOwner() + newOwner()
	b.must("Create", d.Create(t.Context(), b.ref, program(image.RootName, "sleep")))
	b.startAgain(guest.Configuration{Secrets: []guest.Secret{
		{Name: "CANARY", Value: []byte(canary)},
		{Name: "canary", Value: []byte(canary), File: true},
	}})
	var shown []byte
	b.must("inspect", d.call(t.Context(), time.Minute, func(ctx context.Context) error {
		conn, err := bindings.GetClient(ctx)
		if err != nil {
			return err
		}
		answer, err := conn.DoRequest(ctx, nil, http.MethodGet, "/containers/%s/json", nil, nil, d.name(b.ref.ID))
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		shown, err = io.ReadAll(answer.Body)
		return err
	}))
	if !bytes.Contains(shown, []byte(d.name(b.ref.ID))) || bytes.Contains(shown, []byte(canary)) {
		t.Errorf("podman inspect says %s", shown)
	}
	data, _, err := d.inspect(t.Context(), b.ref.ID)
	b.must("inspect", err)
	// Its storage and its runtime's folder, of whose name its id is a part.
	looked := 0
	for _, root := range []string{filepath.Join(os.Getenv("HOME"), ".local/share/containers"), os.Getenv("XDG_RUNTIME_DIR"), b.ref.Dir} {
		_ = filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.Type().IsRegular() || !strings.Contains(path, data.ID) && !strings.HasPrefix(path, b.ref.Dir) {
				return nil //nolint:nilerr // What cannot be read holds no secret of this user's.
			}
			looked++
			if text, err := os.ReadFile(path); err == nil && bytes.Contains(text, []byte(canary)) {
				t.Errorf("%s has it", path)
			}
			return nil
		})
	}
	if looked == 0 {
		t.Error("nothing of the container was found to be looked at")
	}
	if len(processesWith(canary)) > 0 || strings.Contains(b.printed(false), canary) {
		t.Error("a command line or the log has it")
	}
	// The test can fail: inside, it is there.
	if _, output, err := b.exec("/workload", "env", "CANARY"); err != nil || !strings.Contains(output, canary) {
		t.Errorf("inside, it is %q, %v", output, err)
	}
}

func TestConnectReachesTheSandboxesLoopback(t *testing.T) {
	t.Parallel()
	d := backend(t)
	for name, options := range map[string]string{"internet": `{}`, "none": `{"network":"none"}`} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t, d)
			spec := program(image.UserName, "listen", "127.0.0.1:8765")
			spec.DriverOptions = json.RawMessage(options)
			b.start(spec)
			var conn net.Conn
			eventually(t, "it is reached", func() bool {
				var err error
				conn, err = b.guest().Connect(t.Context(), 8765, false)
				if err != nil && !errors.Is(err, sandbox.ErrRefused) {
					t.Fatal(err)
				}
				return err == nil
			})
			defer conn.Close()
			tcp, ok := conn.(*net.TCPConn)
			if !ok {
				t.Fatalf("it is a %T, want the connection itself", conn)
			}
			_, err := io.WriteString(tcp, "there and back")
			if err := errors.Join(err, tcp.CloseWrite()); err != nil {
				t.Fatal(err)
			}
			if text, err := io.ReadAll(tcp); err != nil || string(text) != "there and back" {
				t.Errorf("it says %q, %v", text, err)
			}
			if _, err := b.guest().Connect(t.Context(), 8766, false); !errors.Is(err, sandbox.ErrRefused) {
				t.Errorf("where nothing listens: %v, want refused", err)
			}
		})
	}
}

// TestChannelIsTheSandboxesAlone looks for the channel of one sandbox from
// another, and from inside of its own.
func TestChannelIsTheSandboxesAlone(t *testing.T) {
	t.Parallel()
	d := backend(t)
	first, second := newBox(t, d), newBox(t, d)
	first.start(program(image.RootName, "sleep"))
	second.start(program(image.RootName, "sleep"))
	if code, output, err := first.exec("/workload", "test-file", guestDir(second.ref)); err != nil || code != 1 {
		t.Errorf("the folder of another's channel is there: %d, %v, %s", code, err, output)
	}
	// Both have the same path inside, and each finds its own there.
	if err := os.WriteFile(filepath.Join(guestDir(second.ref), "mark"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for b, want := range map[*box]int{first: 1, second: 0} {
		if code, output, err := b.exec("/workload", "test-file", guestTarget+"/mark"); err != nil || code != want {
			t.Errorf("%s finds the mark of %s: %d, %v, %s; want %d", b.ref.ID, second.ref.ID, code, err, output, want)
		}
	}
}

// TestDialRefusesAnImpostor has a workload put a socket of its own in the place
// of guestd's.
func TestDialRefusesAnImpostor(t *testing.T) {
	t.Parallel()
	d := backend(t)
	b := newBox(t, d)
	b.start(program(image.RootName, "guest-echo", guestTarget, "1024"))
	eventually(t, "the workload listens", func() bool { return strings.Contains(b.printed(false), "listening") })
	conn, err := d.Dial(t.Context(), b.ref, guest.Port)
	if err == nil {
		conn.Close()
	}
	if !errors.Is(err, sandbox.ErrGuest) || !strings.Contains(err.Error(), "not guestd") {
		t.Errorf("Dial: %v, want that it is not guestd", err)
	}
	// It harms itself alone, and is no less stoppable.
	b.must("Stop", d.Stop(t.Context(), b.ref, time.Minute))
	if o, err := d.Inspect(t.Context(), b.ref); err != nil || o.ExitCode != 0 {
		t.Errorf("it is %+v, %v", o, err)
	}
}

func TestAnotherDriverReachesGuestd(t *testing.T) {
	t.Parallel()
	d := backend(t)
	b := newBox(t, d)
	b.start(program(image.RootName, "sleep"))
	again := &box{t: t, d: open(t, d.cfg.Owner), ref: b.ref}
	if info, err := again.guest().Hello(t.Context()); err != nil || info.Phase != guest.PhaseRunning {
		t.Errorf("%+v, %v", info, err)
	}
}

// TestGuestdIsConfined looks at guestd itself, from outside.
func TestGuestdIsConfined(t *testing.T) {
	t.Parallel()
	d := backend(t)
	b := newBox(t, d)
	b.start(program(image.RootName, "sleep"))
	data, _, err := d.inspect(t.Context(), b.ref.ID)
	b.must("inspect", err)
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(data.State.Pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		got[key] = strings.TrimSpace(value)
	}
	for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
		if got[set] != "0000000000000000" {
			t.Errorf("%s is %s", set, got[set])
		}
	}
	if got["Name"] != "guestd" || got["NoNewPrivs"] != "1" || got["Seccomp"] != "2" {
		t.Errorf("it is %s, NoNewPrivs %s, Seccomp %s", got["Name"], got["NoNewPrivs"], got["Seccomp"])
	}
	// Its memory, where secrets pass through, is nobody's to read.
	if code, output, err := b.exec("/workload", "cat", "/proc/1/environ"); err != nil || code == 0 {
		t.Errorf("guestd's memory is read inside: %d, %v, %q", code, err, output)
	}
}

func TestExitCodeIsTheWorkloads(t *testing.T) {
	t.Parallel()
	d := backend(t)
	if output, code := newBox(t, d).run(program(image.UserName, "exit", "3")); code != 3 {
		t.Errorf("it ended with %d: %s", code, output)
	}
	// And guestd's own, if it is killed.
	b := newBox(t, d)
	b.start(program(image.UserName, "ignore-term"))
	data, _, err := d.inspect(t.Context(), b.ref.ID)
	b.must("inspect", err)
	b.must("kill", syscall.Kill(data.State.Pid, syscall.SIGKILL))
	if o, err := d.Wait(t.Context(), b.ref); err != nil || o.ExitCode != 137 {
		t.Errorf("guestd was killed: %+v, %v", o, err)
	}
}

func TestExecAsAnotherUserNeedsTheCapabilities(t *testing.T) {
	t.Parallel()
	d := backend(t)
	b := newBox(t, d)
	b.start(program(image.RootName, "sleep"))
	as := guest.Command{Args: []string{"/workload", "id"}, User: "1000:1001", NoInput: true}
	if _, err := b.guest().Exec(t.Context(), as); !errors.Is(err, sandbox.ErrDenied) || !strings.Contains(err.Error(), "SETUID") {
		t.Errorf("without: %v", err)
	}
	b = newBox(t, d)
	spec := program(image.RootName, "sleep")
	spec.DriverOptions = json.RawMessage(`{"cap_add":["SETUID","SETGID"]}`)
	b.start(spec)
	exec, err := b.guest().Exec(t.Context(), as)
	b.must("Exec", err)
	defer exec.Close()
	var text strings.Builder
	for {
		out, err := exec.Receive()
		b.must("Receive", err)
		text.Write(out.Data)
		if out.Exit != nil {
			break
		}
	}
	if got := values(text.String()); got["uid"] != "1000" || got["gid"] != "1001" || got["CapEff"] != "0000000000000000" {
		t.Errorf("it runs as %v", got)
	}
}
