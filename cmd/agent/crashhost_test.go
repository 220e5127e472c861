package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/container"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
	"github.com/choiros/agent/test/image"
)

// backend is a driver that crashes are tried on.
type backend struct {
	name       string
	rounds     int // of random operations
	killWithin int // milliseconds between two kills, at most
	spec       func() *agentv1.SandboxSpec
	// greeter is one whose workload greets whoever connects to a port inside.
	greeter func(guestPort uint32, text string) *agentv1.SandboxSpec
	// command is one that runs the workload's program inside, and variable one
	// that prints a variable's value.
	command  func(args ...string) []string
	variable func(name string) []string
	// driver opens the driver as the agent does.
	driver func(h *crashHost, owner string) sandbox.Driver
	// orphans reports what lives on the host beyond these sandboxes.
	orphans func(h *crashHost, names []string) error
}

// crashHost is a host whose agent is killed and started again.
type crashHost struct {
	t       testing.TB
	backend backend
	dir     string
	state   string
	socket  string
	ports   portRange
	flags   []string // of the agent, besides the usual ones

	requests atomic.Int64
	crashes  atomic.Int64
	answers  atomic.Int64  // that were given to try
	done     chan struct{} // closed when the test ends: nothing is restarted
	dead     chan struct{} // closed when the agent ended by itself
	keeper   sync.WaitGroup
	absence  sync.Mutex // while it is held no agent is started

	mu       sync.Mutex
	cmd      *exec.Cmd
	conn     *grpc.ClientConn
	expected map[string]*expectation
}

func newCrashHost(t testing.TB, b backend) *crashHost {
	t.Helper()
	// Not t.TempDir: its name is too long for a socket's.
	dir, err := os.MkdirTemp("", "crash")
	if err != nil {
		t.Fatal(err)
	}
	h := &crashHost{
		t: t, backend: b, dir: dir, state: filepath.Join(dir, "state"), socket: filepath.Join(dir, "s"),
		ports: takePorts(t),
		done:  make(chan struct{}), dead: make(chan struct{}), expected: map[string]*expectation{},
	}
	conn, err := grpc.NewClient("unix://"+h.socket, h.dialOptions()...)
	if err != nil {
		t.Fatal(err)
	}
	h.conn = conn
	if err := os.WriteFile(filepath.Join(dir, "secrets.env"), []byte("SECRET="+secretValue+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.end)
	return h
}

func (*crashHost) dialOptions(more ...grpc.DialOption) []grpc.DialOption {
	return append([]grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}, more...)
}

// start starts the agent and keeps it: when it dies, the next one is started,
// without the extra environment.
func (h *crashHost) start(env ...string) {
	h.t.Helper()
	h.launch(env)
	h.keeper.Go(func() {
		for {
			h.mu.Lock()
			cmd := h.cmd
			h.mu.Unlock()
			err := cmd.Wait()
			select {
			case <-h.done:
				return
			default:
			}
			if err == nil || err.Error() != "signal: killed" {
				h.t.Errorf("the agent ended by itself: %v", err)
				close(h.dead)
				return
			}
			h.crashes.Add(1)
			h.absence.Lock()
			h.launch(nil)
			h.absence.Unlock()
		}
	})
	h.awaitAgent()
}

func (h *crashHost) launch(env []string) {
	args := append([]string{
		"serve", "--config", os.DevNull,
		"--state-dir", h.state, "--socket", h.socket, "--default-driver", h.backend.name, "--min-free-memory-mib", "1",
		"--guestd", filepath.Join(image.GuestdDir(), "guestd"),
		"--ports-first", strconv.Itoa(h.ports.first), "--ports-last", strconv.Itoa(h.ports.last),
	}, h.flags...)
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(append(os.Environ(), agentEnv+"="+h.dir, "GORACE=atexit_sleep_ms=0"), env...)
	log, err := os.OpenFile(filepath.Join(h.dir, "log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		h.t.Error(err)
		return
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := cmd.Start(); err != nil {
		h.t.Error(err)
		return
	}
	h.cmd = cmd
}

// kill is kill -9.
func (h *crashHost) kill() {
	h.mu.Lock()
	defer h.mu.Unlock()
	_ = h.cmd.Process.Kill()
}

// killUntil kills the agent again and again, after a pause each time, until
// ended is closed. Every other agent lives until it has done something for
// somebody, however slow the machine is: or nothing would ever get done.
func (h *crashHost) killUntil(ended <-chan struct{}, pause func() time.Duration) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for kills := 0; ; kills++ {
		h.awaitAgent()
		for before := h.answers.Load(); kills%2 == 1 && h.answers.Load() == before; {
			select {
			case <-tick.C:
			case <-ended:
				return
			}
		}
		select {
		case <-time.After(pause()):
			h.kill()
		case <-ended:
			return
		}
	}
}

func (h *crashHost) client() agentv1.SandboxServiceClient {
	return agentv1.NewSandboxServiceClient(h.conn)
}

// awaitAgent returns once an agent answers.
func (h *crashHost) awaitAgent() {
	h.t.Helper()
	h.eventually("the agent answers", func() error {
		h.conn.ResetConnectBackoff()
		_, err := agentv1.NewHostServiceClient(h.conn).GetStats(h.t.Context(), &agentv1.GetStatsRequest{})
		return err
	})
}

// eventually waits until holds returns nil.
func (h *crashHost) eventually(what string, holds func() error) {
	h.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		err := holds()
		if err == nil {
			return
		}
		select {
		case <-h.dead:
			return // reported
		case <-h.t.Context().Done():
			return
		default:
		}
		if time.Now().After(deadline) {
			h.t.Errorf("never: %s: %v", what, err)
			return
		}
	}
}

// driver opens the driver anew, as another process would.
func (h *crashHost) driver() sandbox.Driver {
	owner, err := os.ReadFile(filepath.Join(h.state, "owner"))
	if err != nil {
		h.t.Fatal(err)
	}
	return h.backend.driver(h, strings.TrimSpace(string(owner)))
}

// end stops the agent and checks that nothing is left once its sandboxes are
// deleted.
func (h *crashHost) end() {
	close(h.done)
	h.kill()
	h.keeper.Wait()
	_ = h.conn.Close()
	if h.t.Failed() {
		log, _ := os.ReadFile(filepath.Join(h.dir, "log"))
		h.t.Logf("the agent said:\n%s", log)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	drv := h.driver()
	names, err := drv.List(ctx)
	for _, name := range names {
		err = errors.Join(err, drv.Delete(ctx, sandbox.Ref{ID: name, Dir: filepath.Join(h.state, "sandboxes", name)}))
	}
	for left := h.backend.orphans(h, nil); left != nil; left = h.backend.orphans(h, nil) {
		select {
		case <-time.After(10 * time.Millisecond):
			continue
		case <-ctx.Done():
			err = errors.Join(err, left)
		}
		break
	}
	if err = errors.Join(err, os.RemoveAll(h.dir)); err != nil {
		h.t.Errorf("clean up: %v", err)
	}
}

// onBackends runs a test on child processes and on real podman.
func onBackends(t *testing.T, test func(*testing.T, backend)) {
	t.Run("process", func(t *testing.T) { t.Parallel(); test(t, processBackend()) })
	t.Run("podman", func(t *testing.T) { t.Parallel(); test(t, podmanBackend(t)) })
}

func processBackend() backend {
	return backend{
		name: process.Name, rounds: 6, killWithin: 150,
		spec: func() *agentv1.SandboxSpec {
			return &agentv1.SandboxSpec{
				Driver: process.Name, Source: &agentv1.SandboxSpec_Image{Image: process.Image}, Command: []string{"sleep"},
				Readiness: &agentv1.Readiness{Probe: &agentv1.Readiness_Exec{Exec: &agentv1.ExecProbe{
					Command: process.Command("exit", "0"),
				}}},
			}
		},
		greeter: func(port uint32, text string) *agentv1.SandboxSpec {
			spec := &agentv1.SandboxSpec{
				Driver: process.Name, Source: &agentv1.SandboxSpec_Image{Image: self()},
				Command: []string{greeterFlag, fmt.Sprintf("127.0.0.1:%d", port), text},
				// Every port of the host is inside of it.
				AutoForward: &agentv1.AutoForward{Mode: agentv1.AutoForward_MODE_OFF},
			}
			return listening(spec, port)
		},
		command:  process.Command,
		variable: func(name string) []string { return []string{"sh", "-c", "echo $" + name} },
		driver: func(h *crashHost, owner string) sandbox.Driver {
			return process.New(process.Config{Root: filepath.Join(h.dir, "processes"), Owner: owner})
		},
		orphans: processOrphans,
	}
}

// processOrphans finds living processes of sandboxes that there are not.
func processOrphans(h *crashHost, names []string) error {
	environs, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return err
	}
	mark := "AGENT_PROCESS_ROOT=" + filepath.Join(h.dir, "processes")
	for _, path := range environs {
		environ, _ := os.ReadFile(path) // gone, or another user's
		if !slices.Contains(strings.Split(string(environ), "\x00"), mark) {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
		text := strings.ReplaceAll(string(cmdline), "\x00", " ")
		owned := slices.ContainsFunc(names, func(name string) bool { return strings.Contains(text, name) })
		if len(names) == 0 && text != "" || len(names) > 0 && strings.Contains(text, "shim") && !owned {
			return fmt.Errorf("an orphan process: %s", text)
		}
	}
	return nil
}

// podmanBackend is the user's own Podman, with the test image loaded. Without
// one the test is skipped, or fails if AGENT_REQUIRE has podman in it.
func podmanBackend(t testing.TB) backend {
	t.Helper()
	loader := openPodman(t, "00000000")
	_, err := loader.Probe(t.Context())
	drivertest.Require(t, "podman", err)
	archive, err := os.Open(filepath.Join(image.Dir(t), image.RootOCI))
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	if _, err := loader.LoadImage(t.Context(), archive); err != nil {
		t.Fatal(err)
	}
	return backend{
		name: "podman", rounds: 2, killWithin: 1500,
		spec: func() *agentv1.SandboxSpec {
			return &agentv1.SandboxSpec{
				Driver: "podman", Source: &agentv1.SandboxSpec_Image{Image: image.RootName}, Command: []string{"sleep"},
				Readiness: &agentv1.Readiness{Probe: &agentv1.Readiness_Exec{Exec: &agentv1.ExecProbe{
					Command: []string{"/workload", "exit", "0"},
				}}},
			}
		},
		greeter: func(port uint32, text string) *agentv1.SandboxSpec {
			return listening(&agentv1.SandboxSpec{
				Driver: "podman", Source: &agentv1.SandboxSpec_Image{Image: image.RootName},
				Command: []string{"greet", fmt.Sprintf("127.0.0.1:%d", port), text},
			}, port)
		},
		command:  func(args ...string) []string { return append([]string{"/workload"}, args...) },
		variable: func(name string) []string { return []string{"/workload", "env", name} },
		driver:   func(h *crashHost, owner string) sandbox.Driver { return openPodman(h.t, owner) },
		orphans:  podmanOrphans,
	}
}

func openPodman(t testing.TB, owner string) *container.Driver {
	t.Helper()
	drv, err := container.New(container.Config{
		RuntimeDir: os.Getenv("XDG_RUNTIME_DIR"), Owner: owner, GuestdDir: image.Guestd(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	return drv
}

// podmanOrphans finds monitors of containers that there are not.
func podmanOrphans(h *crashHost, names []string) error {
	owner, err := os.ReadFile(filepath.Join(h.state, "owner"))
	if err != nil {
		return err
	}
	prefix := "choiros-" + strings.TrimSpace(string(owner)) + "-"
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range lines {
		line, _ := os.ReadFile(path)
		for argument := range strings.SplitSeq(string(line), "\x00") {
			name, ours := strings.CutPrefix(argument, prefix)
			if ours && !slices.Contains(names, name) {
				return fmt.Errorf("an orphan process: %s", strings.ReplaceAll(string(line[:min(len(line), 200)]), "\x00", " "))
			}
		}
	}
	return err
}
