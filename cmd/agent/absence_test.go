package main

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// TestForwardsReturnWithTheAgent has the agent die and stay away: without a
// descriptor store nobody listens meanwhile, and clients are refused. With the
// next agent the same port leads to the same sandbox, which never stopped.
func TestForwardsReturnWithTheAgent(t *testing.T) {
	onBackends(t, func(t *testing.T, b backend) {
		h := newCrashHost(t, b)
		h.start()
		made := h.create("web", h.served("web", 0))
		address := endpoint(made, h.guestPort(0))
		h.reach("web", address)
		h.absence.Lock()
		h.kill()
		h.eventually("clients are refused", func() error {
			if _, err := call(t.Context(), address); !errors.Is(err, syscall.ECONNREFUSED) {
				return errors.Join(errors.New("not refused"), err)
			}
			return nil
		})
		h.absence.Unlock()
		h.awaitAgent()
		// Who is answered by the agent finds the forwards in place.
		if said, err := call(t.Context(), address); err != nil || said != h.greeting("web") {
			t.Errorf("as soon as the agent answers the port says %q, %v", said, err)
		}
		now := h.get("web")
		if now.GetStatus().GetGeneration() != made.GetStatus().GetGeneration() || endpoint(now, h.guestPort(0)) != address {
			t.Errorf("it was generation %d at %s, and is now %s", made.GetStatus().GetGeneration(), address, now)
		}
		h.delete("web")
	})
}

func execs(h *crashHost, name string) ([]*agentv1.ExecSession, error) {
	list, err := agentv1.NewExecServiceClient(h.conn).ListExecs(h.t.Context(), &agentv1.ListExecsRequest{Name: name})
	return list.GetExecs(), err
}

// TestKeptExecOutlivesTheAgent attaches through the next agent to what was
// begun through the one before.
func TestKeptExecOutlivesTheAgent(t *testing.T) {
	onBackends(t, func(t *testing.T, b backend) {
		h := newCrashHost(t, b)
		h.start()
		h.create("web", b.spec())
		client := agentv1.NewExecServiceClient(h.conn)
		began := make(chan string, 1)
		first := make(chan error, 1)
		go func() {
			_, err := runInside(t.Context(), h.conn, &agentv1.ExecStart{
				Name: "web", Command: b.command("print-loop", "20ms"), Keep: true,
			}, func(s *agentv1.ExecStarted) { began <- s.GetExecId() })
			first <- err
		}()
		id := <-began
		h.kill()
		if err := <-first; !interrupted(err) {
			t.Errorf("the exec's stream ended with %v", err)
		}
		h.awaitAgent()
		all, err := execs(h, "web")
		if err != nil || len(all) != 1 || all[0].GetExecId() != id || all[0].GetExit() != nil {
			t.Fatalf("execs after a restart: %v, %v", all, err)
		}
		stream, err := client.Exec(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&agentv1.ExecRequest{Message: &agentv1.ExecRequest_Attach{
			Attach: &agentv1.ExecAttach{Name: "web", ExecId: id},
		}}); err != nil {
			t.Fatal(err)
		}
		// It has gone on printing in between, and goes on now.
		var seen strings.Builder
		for !strings.Contains(seen.String(), "line 50\n") {
			answer, err := stream.Recv()
			if err != nil {
				t.Fatalf("after %q: %v", seen.String(), err)
			}
			seen.Write(answer.GetStdout())
			seen.Write(answer.GetStderr())
		}
		if _, err := client.SignalExec(t.Context(), &agentv1.SignalExecRequest{Name: "web", ExecId: id, Signal: "TERM"}); err != nil {
			t.Error(err)
		}
		if _, err := collect(stream, nil); err != nil {
			t.Errorf("its end: %v", err)
		}
		h.delete("web")
	})
}

// TestKilledClientLeavesNothingInside kills clients, and once the agent, amid a
// command that nobody asked to keep.
func TestKilledClientLeavesNothingInside(t *testing.T) {
	onBackends(t, func(t *testing.T, b backend) {
		h := newCrashHost(t, b)
		h.start()
		h.create("web", b.spec())
		for victim, kill := range map[string]func(*exec.Cmd){
			"client": func(c *exec.Cmd) { _ = c.Process.Kill() },
			"agent":  func(*exec.Cmd) { h.kill() },
		} {
			mark := filepath.Base(h.dir) + "-" + victim
			inside := b.command("ready-after", "1h", filepath.Join("/tmp", mark))
			caller := exec.Command(os.Args[0], append([]string{callerFlag, h.socket, "web"}, inside...)...)
			out, err := caller.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := caller.Start(); err != nil {
				t.Fatal(err)
			}
			if line, err := bufio.NewReader(out).ReadString('\n'); line != "started\n" {
				t.Errorf("the client says %q, %v", line, err)
			}
			others := func() []int {
				return slices.DeleteFunc(running(mark), func(pid int) bool { return pid == caller.Process.Pid })
			}
			if len(others()) == 0 {
				t.Error("no process inside was found: its end proves nothing")
			}
			kill(caller)
			h.eventually("what a dead "+victim+" began has ended", func() error {
				all, err := execs(h, "web")
				if left := others(); err != nil || len(all) > 0 || len(left) > 0 {
					return errors.Join(errors.New("still there"), err)
				}
				return nil
			})
			_ = caller.Process.Kill()
			_ = caller.Wait()
		}
		h.delete("web")
	})
}

// TestExecsLeakNothing runs two thousand commands and counts what guestd, the
// container and the agent hold before and after.
func TestExecsLeakNothing(t *testing.T) {
	t.Parallel()
	b := podmanBackend(t)
	h := newCrashHost(t, b)
	h.start()
	h.create("web", b.spec())
	run := func(n int) {
		for range n {
			if _, err := h.output("web", b.command("exit", "0")...); err != nil {
				t.Fatal(err)
			}
		}
	}
	run(1000) // what is only ever made once is made now, and guestd's heap is as large as it gets
	guestd := firstProcess(t, h, "web")
	before := holdings(t, h, guestd)
	began := time.Now()
	run(2000)
	t.Logf("2000 execs in %s", time.Since(began))
	var after holding
	h.eventually("nothing more is held than before", func() error {
		after = holdings(t, h, guestd)
		if after.files > before.files || after.processes > before.processes || after.agentFiles > before.agentFiles+2 {
			return errors.New("more is held")
		}
		return nil
	})
	if after.memoryKiB > before.memoryKiB+1536 || after.memoryKiB > 12<<10 {
		t.Errorf("guestd has %d KiB, and had %d", after.memoryKiB, before.memoryKiB)
	}
	t.Logf("before %+v, after %+v", before, after)
	if left, err := execs(h, "web"); err != nil || len(left) > 0 {
		t.Errorf("%d execs are remembered, %v", len(left), err)
	}
	h.delete("web")
}
