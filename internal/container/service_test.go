package container

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/test/image"
)

// service is a Podman of the test's own, with a storage of its own, that can be
// killed without harm to the user's.
type service struct {
	t      *testing.T
	dir    string
	socket string
	cmd    *exec.Cmd
}

// newService starts one with the root image loaded.
func newService(t *testing.T) *service {
	t.Helper()
	requirePodman(t, open(t, newOwner()))
	if _, err := exec.LookPath("podman"); err != nil {
		t.Skip("the podman command is not installed; it starts a service that this test can kill")
	}
	s := &service{t: t, dir: shortDir(t)}
	s.socket = filepath.Join(s.dir, "s")
	t.Cleanup(s.purge)
	s.start()
	d := s.open()
	archive, err := os.ReadFile(filepath.Join(image.Dir(t), image.RootOCI))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.LoadImage(t.Context(), bytes.NewReader(archive)); err != nil {
		t.Fatal(err)
	}
	return s
}

// podman is a command on this service's storage.
func (s *service) podman(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "podman", append([]string{
		"--root", filepath.Join(s.dir, "root"), "--runroot", filepath.Join(s.dir, "run"), "--tmpdir", filepath.Join(s.dir, "tmp"),
	}, args...)...)
}

func (s *service) start() {
	s.t.Helper()
	_ = os.Remove(s.socket)
	s.cmd = s.podman(context.Background(), "system", "service", "--time", "0", "unix://"+s.socket)
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, "the service answers", func() bool {
		d, err := New(Config{Socket: s.socket, Owner: newOwner()})
		if err != nil {
			s.t.Fatal(err)
		}
		_, err = d.List(context.Background())
		return err == nil
	})
}

// kill ends the service as a crash does. Containers go on.
func (s *service) kill() {
	if s.cmd == nil {
		return
	}
	_ = syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL)
	_ = s.cmd.Wait()
	s.cmd = nil
}

func (s *service) open() *Driver { return s.openAs(s.socket, newOwner()) }

func (s *service) openAs(socket, owner string) *Driver {
	s.t.Helper()
	d, err := New(Config{Socket: socket, Owner: owner, GuestdDir: image.GuestdDir()})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { d.Close() })
	return d
}

// purge removes all that the service had.
func (s *service) purge() {
	s.kill()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_ = s.podman(ctx, "rm", "--all", "--force", "--time", "0").Run()
	// Files of containers belong to subordinate ids, and overlay is mounted in
	// Podman's own mount namespace.
	out, err := exec.CommandContext(ctx, "podman", "unshare", "sh", "-c",
		`umount "$0/root/overlay" 2>/dev/null; rm -rf "$0"`, s.dir).CombinedOutput()
	if err != nil {
		s.t.Errorf("clean up: %v: %s", err, out)
	}
}

// halfMade kills the service in the midst of Create until there is a container
// of which Podman has the storage only.
func halfMade(t *testing.T, s *service, owner string, ref sandbox.Ref) {
	t.Helper()
	spec := program(image.RootName, "exit", "3")
	for i := range 200 {
		d := s.openAs(s.socket, owner)
		if _, err := d.facts(t.Context()); err != nil {
			t.Fatal(err)
		}
		created := make(chan error, 1)
		go func() { created <- d.Create(t.Context(), ref, spec) }()
		time.Sleep(time.Duration(4+i%20) * time.Millisecond)
		s.kill()
		<-created
		s.start()
		o, err := s.openAs(s.socket, owner).Inspect(t.Context(), ref)
		switch {
		case err != nil:
			t.Fatal(err)
		case o.State == sandbox.StateBroken:
			return
		case o.State != sandbox.StateAbsent:
			if err := s.openAs(s.socket, owner).Delete(t.Context(), ref); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Fatal("Podman cannot be brought to leave a half-made container")
}

func TestHalfMadeIsFoundAndMended(t *testing.T) {
	t.Parallel()
	s := newService(t)
	owner, ref := newOwner(), sandbox.Ref{ID: "half", Dir: shortDir(t)}
	for name, mend := range map[string]func(d *Driver) error{
		"Create": func(d *Driver) error { return nil },
		"Delete": func(d *Driver) error { return d.Delete(t.Context(), ref) },
	} {
		halfMade(t, s, owner, ref)
		d := s.openAs(s.socket, owner)
		if ids, err := d.List(t.Context()); err != nil || len(ids) != 1 || ids[0] != "half" {
			t.Errorf("List: %q, %v", ids, err)
		}
		if err := d.Start(t.Context(), ref); err == nil {
			t.Error("Start of a half-made one succeeded")
		}
		if err := mend(d); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := d.Create(t.Context(), ref, program(image.RootName, "exit", "3")); err != nil {
			t.Fatalf("%s: Create: %v", name, err)
		}
		(&box{t, d, ref}).startAgain(guest.Configuration{})
		if o, err := d.Wait(t.Context(), ref); err != nil || o.ExitCode != 3 {
			t.Errorf("%s: it ended with %+v, %v", name, o, err)
		}
		if err := d.Delete(t.Context(), ref); err != nil {
			t.Errorf("Delete: %v", err)
		}
		if ids, err := d.List(t.Context()); err != nil || len(ids) > 0 {
			t.Errorf("List: %q, %v", ids, err)
		}
	}
}

// TestWaitSurvivesPodman has sandboxes end while Podman is there again, and
// while it is not.
func TestWaitSurvivesPodman(t *testing.T) {
	t.Parallel()
	s := newService(t)
	d := s.open()
	ends := map[string]chan sandbox.Observation{}
	pids := map[string]int{}
	refs := map[string]sandbox.Ref{}
	for _, id := range []string{"before", "meanwhile", "after"} {
		ref := sandbox.Ref{ID: id, Dir: shortDir(t)}
		refs[id] = ref
		if err := d.Create(t.Context(), ref, program(image.RootName, "sleep")); err != nil {
			t.Fatal(err)
		}
		if err := d.Start(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
		data, _, err := d.inspect(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		pids[id] = data.State.Pid
		ends[id] = make(chan sandbox.Observation, 1)
		go func() {
			o, err := d.Wait(context.Background(), ref)
			if err != nil {
				t.Errorf("Wait for %s: %v", id, err)
			}
			ends[id] <- o
		}()
	}
	end := func(id string) {
		t.Helper()
		if err := syscall.Kill(pids[id], syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	ended := func(id string) {
		t.Helper()
		select {
		case o := <-ends[id]:
			if o.State != sandbox.StateExited || o.ExitCode != 137 {
				t.Errorf("%s: %+v, want exited with 137", id, o)
			}
		case <-time.After(30 * time.Second):
			t.Errorf("%s: nobody noticed", id)
		}
	}
	end("before")
	ended("before")
	s.kill()
	end("meanwhile")
	time.Sleep(200 * time.Millisecond) // noticing that nobody is there
	s.start()
	ended("meanwhile")
	end("after")
	ended("after")
	for _, ref := range refs {
		if err := d.Delete(t.Context(), ref); err != nil {
			t.Error(err)
		}
	}
}

// proxy passes connections on to a socket and counts those that are open.
func proxy(t *testing.T, to string) (socket string, active *atomic.Int64) {
	t.Helper()
	socket, active = filepath.Join(shortDir(t), "p"), new(atomic.Int64)
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() {
		listener.Close()
		all.Wait()
	})
	all.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer client.Close()
				server, err := net.Dial("unix", to)
				if err != nil {
					return
				}
				active.Add(1)
				defer active.Add(-1)
				go func() {
					_, _ = io.Copy(server, client)
					server.Close()
				}()
				_, _ = io.Copy(client, server)
			})
		}
	})
	return socket, active
}

func TestManyWaitsShareOneConnection(t *testing.T) {
	t.Parallel()
	s := newService(t)
	socket, active := proxy(t, s.socket)
	d := s.openAs(socket, newOwner())
	const sandboxes, waits = 4, 1000
	var refs []sandbox.Ref
	for i := range sandboxes {
		ref := sandbox.Ref{ID: string(rune('a' + i)), Dir: shortDir(t)}
		refs = append(refs, ref)
		if err := d.Create(t.Context(), ref, program(image.RootName, "sleep")); err != nil {
			t.Fatal(err)
		}
		if err := d.Start(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
	}
	var done sync.WaitGroup
	for i := range waits {
		done.Go(func() {
			// guestd's own end: nobody has configured it.
			if o, err := d.Wait(context.Background(), refs[i%sandboxes]); err != nil || o.ExitCode != 143 {
				t.Errorf("Wait: %+v, %v", o, err)
			}
		})
	}
	quiet := 0
	eventually(t, "all have looked and one connection is left", func() bool {
		d.ends.mu.Lock()
		joined := d.ends.total
		d.ends.mu.Unlock()
		if quiet++; joined < waits || active.Load() != 1 {
			quiet = 0
		}
		return quiet > 20
	})
	for _, ref := range refs {
		if err := d.Stop(t.Context(), ref, time.Minute); err != nil {
			t.Error(err)
		}
	}
	done.Wait()
	for _, ref := range refs {
		if err := d.Delete(t.Context(), ref); err != nil {
			t.Error(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	eventually(t, "the stream is closed", func() bool { return active.Load() == 0 })
}

// TestDeadMonitor kills conmon, which alone can tell Podman how a container
// ended, and then the workload.
func TestDeadMonitor(t *testing.T) {
	t.Parallel()
	d := newService(t).open()
	for name, end := range map[string]func(ref sandbox.Ref, pid int) error{
		"stopped": func(ref sandbox.Ref, _ int) error { return d.Stop(t.Context(), ref, 0) },
		"killed":  func(_ sandbox.Ref, pid int) error { return syscall.Kill(pid, syscall.SIGKILL) },
	} {
		ref := sandbox.Ref{ID: name, Dir: shortDir(t)}
		if err := d.Create(t.Context(), ref, program(image.RootName, "ignore-term")); err != nil {
			t.Fatal(err)
		}
		if err := d.Start(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
		data, _, err := d.inspect(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(data.State.ConmonPid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, "conmon is gone", func() bool { return isGone(data.State.ConmonPid) })
		if o, err := d.Inspect(t.Context(), ref); err != nil || o.State != sandbox.StateRunning {
			t.Errorf("%s: before that it is %+v, %v", name, o, err)
		}
		waited := make(chan sandbox.Observation, 1)
		go func() {
			o, _ := d.Wait(context.Background(), ref)
			waited <- o
		}()
		eventually(t, "it is waited for", func() bool {
			d.ends.mu.Lock()
			defer d.ends.mu.Unlock()
			return d.ends.total == 1 && len(d.ends.looks) == 0
		})
		if err := end(ref, data.State.Pid); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		eventually(t, "the workload is gone", func() bool { return isGone(data.State.Pid) })
		d.ends.review(t.Context()) // which is made every minute
		if o := <-waited; o.State != sandbox.StateExited || o.ExitCode != 137 {
			t.Errorf("%s: Wait says %+v", name, o)
		}
		if o, err := d.Inspect(t.Context(), ref); err != nil || o.State != sandbox.StateExited || o.ExitCode != 137 || o.Detail == "" {
			t.Errorf("%s: it is %+v, %v", name, o, err)
		}
		// It is as good as any that ended.
		if err := d.Start(t.Context(), ref); err != nil {
			t.Errorf("%s: Start: %v", name, err)
		}
		if err := d.Delete(t.Context(), ref); err != nil {
			t.Errorf("%s: Delete: %v", name, err)
		}
	}
}

func TestCloseEndsWaits(t *testing.T) {
	t.Parallel()
	d := backend(t)
	b := newBox(t, d)
	b.start(program(image.RootName, "sleep"))
	waiter, err := New(d.cfg)
	if err != nil {
		t.Fatal(err)
	}
	waited := make(chan error, 1)
	go func() {
		_, err := waiter.Wait(context.Background(), b.ref)
		waited <- err
	}()
	eventually(t, "it waits", func() bool {
		waiter.ends.mu.Lock()
		defer waiter.ends.mu.Unlock()
		return waiter.ends.total == 1
	})
	if err := waiter.Close(); err != nil {
		t.Error(err)
	}
	if err := <-waited; err == nil {
		t.Error("Wait returned as if it had ended")
	}
	if err := waiter.Close(); err != nil {
		t.Error(err)
	}
}
