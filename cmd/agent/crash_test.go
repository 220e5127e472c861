package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

// scenario is every operation that has steps, each retried under its request
// id until it is answered, whatever happens to the agent meanwhile. In between
// the sandbox answers at its ports and has its secret.
func scenario(h *crashHost, name string) {
	h.mutate(name, "create", true)
	first := endpoint(h.get(name), h.guestPort(boxNumber(name)))
	h.inUse(name, first)
	h.mutate(name, "stop", false)
	h.wake(name, first)
	h.inUse(name, first)
	h.removePort(name)
	second := h.addPort(name)
	h.inUse(name, second)
	h.mutate(name, "stop", false)
	h.mutate(name, "start", true)
	h.mutate(name, "restart", true)
	h.inUse(name, second)
	h.pauseAndWake(name, second)
	h.inUse(name, second)
	h.mutate(name, "delete", false)
	for _, address := range []string{first, second} {
		if said, err := call(h.t.Context(), address); !errors.Is(err, syscall.ECONNREFUSED) {
			h.t.Errorf("after %s was deleted %s says %q, %v", name, address, said, err)
		}
	}
}

// pauseAndWake pauses a sandbox twice: once it is told to go on, once somebody
// connects. It does nothing where no sandbox can be paused.
func (h *crashHost) pauseAndWake(name, address string) {
	h.t.Helper()
	if _, pauses := h.driver().(sandbox.Pauser); !pauses {
		return
	}
	is := func(phase agentv1.Phase, paused bool) {
		h.t.Helper()
		h.eventually(name+" is "+phase.String(), func() error {
			now, err := h.client().GetSandbox(h.t.Context(), &agentv1.GetSandboxRequest{Name: name})
			if err != nil {
				return err
			}
			obs, err := h.driver().Inspect(h.t.Context(), sandbox.Ref{ID: name, Dir: filepath.Join(h.state, "sandboxes", name)})
			if got := now.GetSandbox().GetStatus().GetPhase(); err == nil && (got != phase || obs.Paused != paused) {
				err = fmt.Errorf("it is %s, and paused on the host: %t", got, obs.Paused)
			}
			return err
		})
	}
	for _, resume := range []bool{true, false} {
		h.insist(name+" pause", func(ctx context.Context, id string) error {
			_, err := h.client().PauseSandbox(ctx, &agentv1.PauseSandboxRequest{Name: name, RequestId: id})
			return err
		})
		is(agentv1.Phase_PHASE_PAUSED, true)
		if resume {
			h.insist(name+" resume", func(ctx context.Context, id string) error {
				_, err := h.client().ResumeSandbox(ctx, &agentv1.ResumeSandboxRequest{Name: name, RequestId: id})
				return err
			})
			is(agentv1.Phase_PHASE_READY, false)
		}
	}
	h.reach(name, address)
	is(agentv1.Phase_PHASE_READY, false)
}

// boxNumber tells sandboxes that live at the same time apart: it is that at the
// end of a name.
func boxNumber(name string) int {
	n, _ := strconv.Atoi(name[strings.LastIndex(name, "-")+1:])
	return n
}

// inUse does what a running sandbox is there for, through a port of the host
// that never changes.
func (h *crashHost) inUse(name, address string) {
	h.t.Helper()
	h.reach(name, address)
	h.eventually(name+" has its secret", func() error {
		out, err := h.output(name, h.backend.variable("SECRET")...)
		if err == nil && !strings.Contains(out, secretValue) {
			h.t.Errorf("%s has the secret %q", name, out)
		}
		return err
	})
	now, err := h.client().GetSandbox(h.t.Context(), &agentv1.GetSandboxRequest{Name: name})
	known := slices.ContainsFunc(now.GetSandbox().GetStatus().GetEndpoints(), func(e *agentv1.Endpoint) bool {
		return e.GetAddress() == address
	})
	if err != nil && !interrupted(err) || err == nil && !known {
		h.t.Errorf("%s answers at %s, and is said to at %v, %v", name, address, now.GetSandbox().GetStatus().GetEndpoints(), err)
	}
}

// wake connects to a stopped sandbox.
func (h *crashHost) wake(name, address string) {
	h.t.Helper()
	h.reach(name, address)
	h.eventually(name+" was woken", func() error {
		now, err := h.client().GetSandbox(h.t.Context(), &agentv1.GetSandboxRequest{Name: name})
		if err == nil && now.GetSandbox().GetStatus().GetPhase() != agentv1.Phase_PHASE_READY {
			err = errors.New(now.GetSandbox().GetStatus().GetPhase().String())
		}
		if err == nil {
			h.note(name, "wake", true, now.GetSandbox())
		}
		return err
	})
}

// removePort ends the forward of the port that the sandbox listens on.
func (h *crashHost) removePort(name string) {
	h.t.Helper()
	h.insist(name+" remove port", func(ctx context.Context, id string) error {
		_, err := agentv1.NewPortServiceClient(h.conn).RemovePort(ctx, &agentv1.RemovePortRequest{
			Name: name, GuestPort: h.guestPort(boxNumber(name)), RequestId: id,
		})
		return err
	})
}

// addPort forwards it anew and returns where it is.
func (h *crashHost) addPort(name string) (address string) {
	h.t.Helper()
	h.insist(name+" add port", func(ctx context.Context, id string) error {
		r, err := agentv1.NewPortServiceClient(h.conn).AddPort(ctx, &agentv1.AddPortRequest{
			Name: name, Port: &agentv1.Port{Name: "again", GuestPort: h.guestPort(boxNumber(name))}, RequestId: id,
		})
		address = r.GetForward().GetEndpoint().GetAddress()
		return err
	})
	return address
}

// TestKillAtEveryStep kills the agent, as kill -9 does, at each step of each
// operation in turn.
func TestKillAtEveryStep(t *testing.T) {
	onBackends(t, func(t *testing.T, b backend) {
		rehearsal := newCrashHost(t, b)
		trace := filepath.Join(t.TempDir(), "steps")
		rehearsal.start(stepsEnv + "=" + trace)
		scenario(rehearsal, "web")
		data, err := os.ReadFile(trace)
		if err != nil {
			t.Fatal(err)
		}
		steps := strings.Fields(string(data))
		if len(steps) < 15 || !slices.Contains(steps, "delete:record") || !slices.Contains(steps, "port:intent") {
			t.Fatalf("the scenario has only the steps %v", steps)
		}
		nth := map[string]int{}
		for _, step := range steps {
			nth[step]++
			at := fmt.Sprintf("%s:%d", step, nth[step])
			t.Run(at, func(t *testing.T) {
				t.Parallel()
				h := newCrashHost(t, b)
				h.start(killEnv + "=" + at)
				scenario(h, "web")
				if h.crashes.Load() != 1 {
					t.Errorf("the agent was killed %d times; want once, at %s", h.crashes.Load(), at)
				}
				h.check()
			})
		}
	})
}

// TestRandomOperationsWithKills runs random operations on several sandboxes
// at once while the agent is killed at random, and compares records, operating
// system and API after each restart.
func TestRandomOperationsWithKills(t *testing.T) {
	onBackends(t, func(t *testing.T, b backend) {
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d", seed)
		h := newCrashHost(t, b)
		h.start()
		for round := range b.rounds {
			random := rand.New(rand.NewPCG(seed, uint64(round)))
			var workers sync.WaitGroup
			for w := range 4 {
				own := rand.New(rand.NewPCG(random.Uint64(), uint64(w)))
				workers.Go(func() { h.randomly(fmt.Sprintf("box-%d", w), own, 6) })
			}
			ended := make(chan struct{})
			go func() { workers.Wait(); close(ended) }()
			h.killUntil(ended, func() time.Duration { return time.Duration(random.IntN(b.killWithin)) * time.Millisecond })
			h.check()
		}
		if h.crashes.Load() < int64(b.rounds) {
			t.Errorf("only %d kills in %d rounds", h.crashes.Load(), b.rounds)
		}
		for w := range 4 {
			if name := fmt.Sprintf("box-%d", w); h.model(name) != nil {
				h.mutate(name, "delete", false)
			}
		}
		h.check()
	})
}

// randomly does n random operations on one sandbox that nobody else changes.
func (h *crashHost) randomly(name string, random *rand.Rand, n int) {
	for range n {
		known := h.model(name)
		if known == nil {
			h.mutate(name, "create", random.IntN(4) > 0)
			continue
		}
		switch random.IntN(10) {
		case 0, 1:
			h.mutate(name, "delete", false)
		case 2, 3, 4:
			h.mutate(name, "stop", false)
		case 5, 6:
			h.mutate(name, "restart", true)
		case 7:
			h.mutate(name, "ensure", true)
		default:
			h.mutate(name, "start", true)
		}
	}
}

// expectation is what a client that was answered may rely on.
type expectation struct {
	uid        string
	running    bool
	generation uint64
}

func (h *crashHost) model(name string) *expectation {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.expected[name]
}

// mutate has an operation done, and
// notes what may be relied on from then on.
func (h *crashHost) mutate(name, operation string, running bool) {
	h.t.Helper()
	h.insist(operation+" "+name, func(ctx context.Context, id string) error {
		got, err := h.ask(ctx, name, operation, running, id)
		if err == nil {
			h.note(name, operation, running, got)
		}
		return err
	})
}

// insist asks for something until it is answered, under one request id.
func (h *crashHost) insist(what string, ask func(ctx context.Context, id string) error) {
	h.t.Helper()
	if err := h.try(ask); err != nil {
		h.t.Errorf("%s: %v", what, err)
	}
}

// try asks until it is answered, and returns what an agent that lives says.
func (h *crashHost) try(ask func(ctx context.Context, id string) error) error {
	id := fmt.Sprintf("%s-%d", h.t.Name(), h.requests.Add(1))
	for deadline := time.Now().Add(5 * time.Minute); ; {
		err := ask(h.t.Context(), id)
		if err == nil {
			h.answers.Add(1)
		}
		if !interrupted(err) || h.t.Context().Err() != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("never answered: %w", err)
		}
		h.awaitAgent()
	}
}

// interrupted reports whether an error is that of an agent that died.
func interrupted(err error) bool {
	return slices.Contains([]codes.Code{codes.Unavailable, codes.Canceled}, status.Code(err))
}

func (h *crashHost) ask(ctx context.Context, name, operation string, running bool, id string) (*agentv1.Sandbox, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	switch client := h.client(); operation {
	case "create":
		r, err := client.CreateSandbox(ctx, &agentv1.CreateSandboxRequest{
			Sandbox: &agentv1.Sandbox{Name: name, Spec: h.served(name, boxNumber(name))}, Start: running, RequestId: id,
		})
		return r.GetSandbox(), err
	case "start":
		r, err := client.StartSandbox(ctx, &agentv1.StartSandboxRequest{Name: name, RequestId: id})
		return r.GetSandbox(), err
	case "ensure":
		r, err := client.EnsureSandbox(ctx, &agentv1.EnsureSandboxRequest{Name: name})
		return r.GetSandbox(), err
	case "stop":
		r, err := client.StopSandbox(ctx, &agentv1.StopSandboxRequest{Name: name, RequestId: id})
		return r.GetSandbox(), err
	case "restart":
		r, err := client.RestartSandbox(ctx, &agentv1.RestartSandboxRequest{Name: name, RequestId: id})
		return r.GetSandbox(), err
	default:
		_, err := client.DeleteSandbox(ctx, &agentv1.DeleteSandboxRequest{Name: name, RequestId: id})
		return nil, err
	}
}

// note checks an answer against what was known and remembers it.
func (h *crashHost) note(name, operation string, running bool, got *agentv1.Sandbox) {
	h.t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	before := h.expected[name]
	if operation == "delete" {
		delete(h.expected, name)
		return
	}
	now := &expectation{uid: got.GetUid(), running: running, generation: got.GetStatus().GetGeneration()}
	h.expected[name] = now
	if ready := got.GetStatus().GetPhase() == agentv1.Phase_PHASE_READY; ready != running {
		h.t.Errorf("%s %s answered with phase %s", operation, name, got.GetStatus().GetPhase())
	}
	if before == nil {
		return
	}
	if before.uid != now.uid {
		h.t.Errorf("%s %s: it is another sandbox than before", operation, name)
	}
	least := before.generation
	if operation == "restart" || running && !before.running {
		least++
	}
	if now.generation < least {
		h.t.Errorf("%s %s: generation %d after %d", operation, name, now.generation, before.generation)
	}
}

// check compares records, operating system and API with each other and with
// what clients were promised.
func (h *crashHost) check() {
	h.t.Helper()
	h.awaitAgent()
	ctx := h.t.Context()
	listed, err := h.client().ListSandboxes(ctx, &agentv1.ListSandboxesRequest{})
	if err != nil {
		h.t.Fatal(err)
	}
	var inAPI []string
	for _, s := range listed.GetSandboxes() {
		inAPI = append(inAPI, s.GetName())
		h.checkOne(ctx, s)
	}
	h.mu.Lock()
	for name := range h.expected {
		if !slices.Contains(inAPI, name) {
			h.t.Errorf("%s is lost", name)
		}
	}
	h.mu.Unlock()
	var onHost, inStore []string
	h.eventually("records, folders and artefacts agree with the API", func() error {
		if onHost, err = h.driver().List(ctx); err != nil {
			return err
		}
		inStore = nil
		records, err := filepath.Glob(filepath.Join(h.state, "records", "*"))
		for _, path := range records {
			inStore = append(inStore, strings.TrimSuffix(filepath.Base(path), ".json"))
		}
		if !slices.Equal(inAPI, onHost) || !slices.Equal(inAPI, inStore) {
			err = fmt.Errorf("the API has %v, the host %v, the store %v", inAPI, onHost, inStore)
		}
		folders, _ := filepath.Glob(filepath.Join(h.state, "sandboxes", "*"))
		if len(folders) != len(inAPI) {
			err = errors.Join(err, fmt.Errorf("folders: %v", folders))
		}
		return errors.Join(err, h.backend.orphans(h, inAPI))
	})
}

// checkOne compares one sandbox of the API with the host.
func (h *crashHost) checkOne(ctx context.Context, s *agentv1.Sandbox) {
	h.t.Helper()
	want := h.model(s.GetName())
	if want == nil {
		h.t.Errorf("%s exists though its deletion was answered", s.GetName())
		return
	}
	if s.GetUid() != want.uid || s.GetStatus().GetGeneration() < want.generation {
		h.t.Errorf("%s is %s, generation %d; promised were %s, %d", s.GetName(), s.GetUid(), s.GetStatus().GetGeneration(), want.uid, want.generation)
	}
	h.eventually(s.GetName()+" is as promised", func() error {
		now, err := h.client().GetSandbox(ctx, &agentv1.GetSandboxRequest{Name: s.GetName()})
		if err != nil {
			return err
		}
		ref := sandbox.Ref{ID: s.GetName(), Dir: filepath.Join(h.state, "sandboxes", s.GetName())}
		obs, err := h.driver().Inspect(ctx, ref)
		if err != nil {
			return err
		}
		ready := now.GetSandbox().GetStatus().GetPhase() == agentv1.Phase_PHASE_READY
		desired := now.GetSandbox().GetDesiredState() == agentv1.DesiredState_DESIRED_STATE_RUNNING
		runs := obs.State == sandbox.StateRunning
		if ready != want.running || desired != want.running || runs != want.running {
			return fmt.Errorf("phase %s, desired %s, on the host %s; promised running: %t",
				now.GetSandbox().GetStatus().GetPhase(), now.GetSandbox().GetDesiredState(), obs.State, want.running)
		}
		return nil
	})
}
