package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// tenancy is what is known for sure about when a port was a sandbox's: it was
// from held on until its deletion was begun, and is not since it was answered.
type tenancy struct {
	name, address         string
	held, ending, deleted time.Time // the last two are zero until then
}

// sighting is a client that was answered: it asked at a time, and not before.
type sighting struct {
	address, name string
	asked         time.Time
}

// register has both.
type register struct {
	mu        sync.Mutex
	tenancies map[string]*tenancy // by name
	sightings []sighting
	refusals  atomic.Int64
}

func (r *register) holds(name, address string) *tenancy {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tenancies[name] = &tenancy{name: name, address: address, held: time.Now()}
	return r.tenancies[name]
}

func (r *register) saw(s sighting) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sightings = append(r.sightings, s)
}

// size returns how many tenancies and sightings there are.
func (r *register) size() (tenancies, sightings int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.tenancies), len(r.sightings)
}

// check compares what clients saw with whose the ports were. greeting turns a
// name into what that sandbox says.
func (r *register) check(t *testing.T, greeting func(string) string) {
	t.Helper()
	bySaying, byAddress := map[string]*tenancy{}, map[string][]*tenancy{}
	for name, one := range r.tenancies {
		bySaying[greeting(name)] = one
		byAddress[one.address] = append(byAddress[one.address], one)
	}
	for _, s := range r.sightings {
		who := bySaying[s.name]
		switch {
		case who == nil:
			t.Errorf("%s was answered by %q, which no creation was answered for", s.address, s.name)
			continue
		case who.address != s.address:
			t.Errorf("%s, which is at %s, answered at %s", who.name, who.address, s.address)
		case !who.deleted.IsZero() && s.asked.After(who.deleted):
			t.Errorf("%s answered at %s though it had been gone for %s", who.name, s.address, s.asked.Sub(who.deleted))
		}
		for _, other := range byAddress[s.address] {
			if other != who && s.asked.After(other.held) && (other.ending.IsZero() || s.asked.Before(other.ending)) {
				t.Errorf("%s answered at %s, which was that of %s", who.name, s.address, other.name)
			}
		}
	}
}

// TestRegisterSeesTheWrongSandbox is there because the test below passes if
// its judge is blind.
func TestRegisterSeesTheWrongSandbox(t *testing.T) {
	t.Parallel()
	now := time.Now()
	at := func(ms int) time.Time { return now.Add(time.Duration(ms) * time.Millisecond) }
	r := register{tenancies: map[string]*tenancy{
		"a": {name: "a", address: "p", held: at(0), ending: at(10), deleted: at(20)},
		"b": {name: "b", address: "p", held: at(30)},
	}}
	for _, tc := range []struct {
		name  string
		asked int
		wrong bool
	}{{"a", 5, false}, {"a", 15, false}, {"a", 25, true}, {"a", 35, true}, {"b", 35, false}, {"b", 25, false}, {"b", 5, true}, {"c", 5, true}} {
		r.sightings = []sighting{{address: "p", name: tc.name, asked: at(tc.asked)}}
		trial := &testing.T{}
		r.check(trial, func(name string) string { return name })
		if trial.Failed() != tc.wrong {
			t.Errorf("%s at %d is wrong: %t", tc.name, tc.asked, trial.Failed())
		}
	}
}

// TestPortIsNeverAnothersTooEarly makes and deletes sandboxes that share three
// ports, kills the agent now and then, and has clients connect to all three
// all the time.
func TestPortIsNeverAnothersTooEarly(t *testing.T) {
	onBackends(t, func(t *testing.T, b backend) {
		const ports = 3
		h := newCrashHost(t, b)
		h.ports.last = h.ports.first + ports - 1
		h.start()
		const seconds, least = 8, 6 // or more time, where that makes too few sandboxes to prove anything
		r := &register{tenancies: map[string]*tenancy{}}
		began := time.Now()
		enough := func() bool {
			tenancies, sightings := r.size()
			return time.Since(began) > seconds*time.Second && tenancies >= least && sightings >= 5*least && h.crashes.Load() > 1
		}
		ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
		defer cancel()
		var clients, makers sync.WaitGroup
		clientsEnd, stopClients := context.WithCancel(t.Context())
		for i := range ports {
			for range 2 {
				clients.Go(func() { visit(clientsEnd, r, fmt.Sprintf("127.0.0.1:%d", h.ports.first+i)) })
			}
		}
		var born atomic.Int64
		for worker := range ports + 1 { // one more than there are ports
			makers.Go(func() {
				random := rand.New(rand.NewPCG(uint64(worker), uint64(time.Now().UnixNano())))
				for ctx.Err() == nil && !enough() {
					h.liveAndDie(ctx, r, int(born.Add(1)), random)
				}
			})
		}
		ended := make(chan struct{})
		go func() { makers.Wait(); close(ended) }()
		h.killUntil(ended, func() time.Duration { return time.Duration(300+rand.IntN(900)) * time.Millisecond })
		stopClients()
		clients.Wait()
		t.Logf("%d sandboxes on %d ports, %d answers, %d refusals, %d kills",
			len(r.tenancies), ports, len(r.sightings), r.refusals.Load(), h.crashes.Load())
		r.check(t, h.greeting)
		if !enough() {
			t.Error("that was too little to prove anything")
		}
		h.check()
	})
}

// liveAndDie is the life of one sandbox, if there is a port for it. It may be
// stopped, for a client to wake it.
func (h *crashHost) liveAndDie(ctx context.Context, r *register, n int, random *rand.Rand) {
	name := fmt.Sprintf("box-%d", n)
	var made *agentv1.Sandbox
	err := h.try(func(ctx context.Context, id string) error {
		got, err := h.ask(ctx, name, "create", true, id)
		made = got
		return err
	})
	if status.Code(err) == codes.ResourceExhausted {
		select {
		case <-time.After(time.Duration(random.IntN(30)) * time.Millisecond):
		case <-ctx.Done():
		}
		return
	}
	if err != nil {
		h.t.Errorf("create %s: %v", name, err)
		return
	}
	life := r.holds(name, endpoint(made, h.guestPort(n)))
	time.Sleep(time.Duration(random.IntN(100)) * time.Millisecond)
	if random.IntN(3) == 0 {
		if err := h.try(func(ctx context.Context, id string) error {
			_, err := h.ask(ctx, name, "stop", false, id)
			return err
		}); err != nil {
			h.t.Errorf("stop %s: %v", name, err)
		}
		time.Sleep(time.Duration(random.IntN(50)) * time.Millisecond)
	}
	r.mu.Lock()
	life.ending = time.Now()
	r.mu.Unlock()
	if err := h.try(func(ctx context.Context, id string) error {
		_, err := h.ask(ctx, name, "delete", false, id)
		return err
	}); err != nil {
		h.t.Errorf("delete %s: %v", name, err)
	}
	r.mu.Lock()
	life.deleted = time.Now()
	r.mu.Unlock()
}

// visit connects to an address again and again. Some connections it holds on
// to, and sees how long they are answered.
func visit(ctx context.Context, r *register, address string) {
	for n := 0; ctx.Err() == nil; n++ {
		d := net.Dialer{Timeout: 5 * time.Second}
		asked := time.Now()
		conn, err := d.DialContext(ctx, "tcp", address)
		if err != nil {
			r.refusals.Add(1)
			time.Sleep(3 * time.Millisecond)
			continue
		}
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		from := bufio.NewReader(conn)
		line, err := from.ReadString('\n')
		if err == nil {
			name := strings.TrimSuffix(line, "\n")
			r.saw(sighting{address, name, asked})
			for n%4 == 0 && err == nil && time.Since(asked) < 300*time.Millisecond {
				again := time.Now()
				if _, err = io.WriteString(conn, "x"); err == nil {
					_, err = from.ReadByte()
				}
				if err == nil {
					r.saw(sighting{address, name, again})
					time.Sleep(2 * time.Millisecond)
				}
			}
		}
		conn.Close()
	}
}
