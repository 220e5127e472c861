package process_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

const owner = "ours"

func TestMain(m *testing.M) {
	process.Main()
	drivertest.VerbMain(func(root string) (sandbox.Driver, error) {
		return process.New(process.Config{Root: root, Owner: owner}), nil
	})
	os.Exit(m.Run())
}

// rootVariable is the folder that root returns in a process of another test.
const rootVariable = "DRIVERTEST_ROOT"

// root returns a folder for sandboxes, and sees to it that when the test has
// ended no process of theirs lives.
func root(t *testing.T) string {
	t.Helper()
	if dir, found := os.LookupEnv(rootVariable); found {
		return dir // of whoever started this process, who looks after it
	}
	dir, err := os.MkdirTemp("", "pr") // short, for sockets in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		pids, err := process.Processes(dir)
		if err != nil && !errors.Is(err, errors.ErrUnsupported) {
			t.Error(err)
		}
		for _, pid := range pids {
			t.Errorf("a process is left: %d", pid)
			if p, err := os.FindProcess(pid); err == nil {
				_ = p.Kill()
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func harness(t *testing.T, root, image string) drivertest.Harness {
	t.Helper()
	open := opener(t, root)
	return drivertest.Harness{
		Open:   func(*testing.T) sandbox.Driver { return open(owner) },
		OpenAs: func(_ *testing.T, owner string) sandbox.Driver { return open(owner) },
		Spec: func(_ *testing.T, w drivertest.Workload) sandbox.Spec {
			spec := process.Spec(w.Args...)
			spec.Image, spec.Mounts, spec.Env = image, w.Mounts, w.Env
			return spec
		},
		GuestDir: process.GuestDir,
		Kill:     drivertest.VerbProcess(root),
		Leaks: func(t *testing.T, ref sandbox.Ref) {
			t.Helper()
			if entries, err := os.ReadDir(ref.Dir); err == nil && len(entries) > 0 {
				t.Errorf("left in the folder of %s: %v", ref.ID, entries)
			}
		},
	}
}

func TestDriver(t *testing.T) {
	dir := root(t)
	h := harness(t, dir, process.Image)
	if os.Getenv(wrongVariable) != "" {
		h.Patience = 3 * time.Second // which is not to be had for nothing
	}
	drivertest.Run(t, h)
	leftovers(t, dir)
}

// leftovers looks for files of sandboxes that were all deleted.
func leftovers(t *testing.T, root string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, entry os.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			t.Errorf("left: %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestDriverWithTestWorkload runs the suite with the project's program
// test/workload, as every other driver does: what this driver has instead of
// it is to behave alike.
func TestDriverWithTestWorkload(t *testing.T) {
	program := os.Getenv("AGENT_TEST_WORKLOAD")
	if program == "" {
		program = filepath.Join(t.TempDir(), "workload")
		build := exec.CommandContext(t.Context(), "go", "build", "-o", program, "../../../../test/workload")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("go build test/workload: %v; or set AGENT_TEST_WORKLOAD to the program\n%s", err, out)
		}
	}
	dir := root(t)
	drivertest.Run(t, harness(t, dir, program))
}

// guestOf is the guestd of a sandbox.
func guestOf(d *process.Driver, ref sandbox.Ref) *guest.Guest {
	return guest.New(ref.ID, func(ctx context.Context) (net.Conn, error) { return d.Dial(ctx, ref, guest.Port) })
}

func configure(ctx context.Context, d *process.Driver, ref sandbox.Ref) error {
	return guestOf(d, ref).Configure(ctx, guest.Configuration{Generation: 1})
}

// start starts a sandbox and its workload. It returns what guestd says of the
// latter.
func start(t *testing.T, d *process.Driver, ref sandbox.Ref) error {
	t.Helper()
	if err := d.Start(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	for {
		// Until it listens there is nobody to connect to.
		err := configure(t.Context(), d, ref)
		if !errors.Is(err, sandbox.ErrUnavailable) {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

// box is a sandbox of a test of this file.
func box(t *testing.T, cfg process.Config, spec sandbox.Spec) (*process.Driver, sandbox.Ref) {
	t.Helper()
	d := process.New(cfg)
	ref := sandbox.Ref{ID: "box", Dir: t.TempDir()}
	if err := d.Create(t.Context(), ref, spec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Delete(context.WithoutCancel(t.Context()), ref); err != nil {
			t.Error(err)
		}
	})
	return d, ref
}

func TestNothingOutlivesTheFirstProcess(t *testing.T) {
	t.Parallel()
	// Children, and those of sessions of their own whose parents are gone.
	const crowd = "sleep 1000 & setsid sleep 1000 & (setsid setsid sleep 1000 & setsid sh -c 'sleep 1000 & sleep 1000' &) & "
	for name, test := range map[string]struct {
		script string
		stop   bool
		code   int
	}{
		"ends by itself": {crowd + "exit 3", false, 3},
		"is killed":      {crowd + "touch $READY; wait", true, 137},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, ready := root(t), filepath.Join(t.TempDir(), "ready")
			spec := sandbox.Spec{Image: "/bin/sh", Command: []string{"-c", test.script}, Env: map[string]string{"READY": ready}}
			d, ref := box(t, process.Config{Root: dir, Owner: owner}, spec)
			if err := start(t, d, ref); err != nil {
				t.Fatal(err)
			}
			for test.stop {
				if _, err := os.Stat(ready); err == nil {
					if err := d.Stop(t.Context(), ref, 0); err != nil {
						t.Fatal(err)
					}
					break
				}
			}
			o, err := d.Wait(t.Context(), ref)
			if err != nil || o.ExitCode != test.code {
				t.Errorf("Wait says %+v, %v; want exit code %d", o, err, test.code)
			}
			// The shim itself is about to end.
			for range 1000 {
				if pids, err := process.Processes(dir); err != nil || len(pids) == 0 {
					return
				}
				time.Sleep(time.Millisecond)
			}
			t.Error("processes are left")
		})
	}
}

func TestChannelOfALongPath(t *testing.T) {
	t.Parallel()
	d := process.New(process.Config{Root: root(t), Owner: owner})
	ref := sandbox.Ref{ID: "box", Dir: filepath.Join(t.TempDir(), strings.Repeat("long/", 60))}
	if err := d.Create(t.Context(), ref, process.Spec("sleep")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Delete(context.WithoutCancel(t.Context()), ref); err != nil {
			t.Error(err)
		}
	})
	if err := start(t, d, ref); err != nil {
		t.Error(err)
	}
}

func TestCommandsRunInside(t *testing.T) {
	t.Parallel()
	d, ref := box(t, process.Config{Root: root(t), Owner: owner}, process.Spec("sleep"))
	if err := start(t, d, ref); err != nil {
		t.Fatal(err)
	}
	for code := range int32(3) {
		exec, err := guestOf(d, ref).Exec(t.Context(), guest.Command{Args: process.Command("exit", strconv.Itoa(int(code)))})
		if err != nil {
			t.Fatal(err)
		}
		for {
			output, err := exec.Receive()
			if err != nil {
				t.Fatal(err)
			}
			if output.Exit != nil {
				if output.Exit.Code != code {
					t.Errorf("it ended with %+v, want %d", output.Exit, code)
				}
				break
			}
		}
		exec.Close()
	}
}

func TestExitCodeOfSignals(t *testing.T) {
	t.Parallel()
	for signal, code := range map[string]int{"TERM": 143, "KILL": 137, "SEGV": 139, "HUP": 129} {
		t.Run(signal, func(t *testing.T) {
			t.Parallel()
			spec := sandbox.Spec{Image: "/bin/sh", Command: []string{"-c", "kill -" + signal + " $$"}}
			d, ref := box(t, process.Config{Root: root(t), Owner: owner}, spec)
			if err := start(t, d, ref); err != nil {
				t.Log(err) // it may have ended before it answered
			}
			if o, err := d.Wait(t.Context(), ref); err != nil || o.ExitCode != code {
				t.Errorf("Wait says %+v, %v; want exit code %d", o, err, code)
			}
		})
	}
}

func TestProgramThatIsGone(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(program, []byte("#!/no/such/interpreter\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	d, ref := box(t, process.Config{Root: root(t), Owner: owner}, sandbox.Spec{Image: program})
	if err := start(t, d, ref); err == nil || !strings.Contains(err.Error(), program) {
		t.Fatalf("Configure: %v; want an error that names %s", err, program)
	}
	if o, err := d.Wait(t.Context(), ref); err != nil || o.ExitCode != 127 {
		t.Errorf("Wait says %+v, %v; want exited with 127", o, err)
	}
}

func TestStartDelay(t *testing.T) {
	t.Parallel()
	spec := process.Spec("sleep")
	spec.DriverOptions = []byte(`{"start_delay": "200ms"}`)
	d, ref := box(t, process.Config{Root: root(t), Owner: owner}, spec)
	begun := time.Now()
	if err := d.Start(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took < 200*time.Millisecond {
		t.Errorf("Start took %s, want at least 200 ms", took)
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	d := process.New(process.Config{Root: t.TempDir(), Owner: owner, Limits: sandbox.Limits{Memory: true}})
	for field, change := range map[string]func(*sandbox.Spec){
		"":                                func(s *sandbox.Spec) { s.Resources.MemoryMiB = 64 },
		"spec.machine":                    func(s *sandbox.Spec) { s.Image, s.Machine = "", "m" },
		"spec.user":                       func(s *sandbox.Spec) { s.User = "nobody" },
		"spec.image":                      func(s *sandbox.Spec) { s.Image = "alpine" },
		"spec.resources.cpu_millis":       func(s *sandbox.Spec) { s.Resources.CPUMillis = 100 },
		"spec.resources.pids":             func(s *sandbox.Spec) { s.Resources.Pids = 100 },
		"spec.driver_options":             func(s *sandbox.Spec) { s.DriverOptions = []byte(`{} {}`) },
		"spec.driver_options.start_delay": func(s *sandbox.Spec) { s.DriverOptions = []byte(`{"start_delay":"soon"}`) },
	} {
		spec := process.Spec("sleep")
		change(&spec)
		err := d.Validate(t.Context(), spec)
		if got := fmt.Sprint(err); err == nil && field != "" || err != nil && (field == "" || !strings.HasPrefix(got, field+": ")) {
			t.Errorf("Validate says %v; want an error at %q", err, field)
		}
	}
}

// BenchmarkStart is what others pay for a sandbox of this driver.
func BenchmarkStart(b *testing.B) {
	dir := b.TempDir()
	d := process.New(process.Config{Root: dir, Owner: owner})
	var refs []sandbox.Ref
	for i := range b.N {
		ref := sandbox.Ref{ID: fmt.Sprintf("b%d", i), Dir: filepath.Join(dir, "refs", fmt.Sprint(i))}
		if err := d.Create(b.Context(), ref, process.Spec("sleep")); err != nil {
			b.Fatal(err)
		}
		refs = append(refs, ref)
	}
	b.ResetTimer()
	for _, ref := range refs {
		if err := d.Start(b.Context(), ref); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	for ref := range slices.Values(refs) {
		if err := d.Delete(b.Context(), ref); err != nil {
			b.Fatal(err)
		}
	}
}
