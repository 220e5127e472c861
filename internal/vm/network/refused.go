package network

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// maxRefusals destinations are told apart.
const maxRefusals = 64

type refusalKey struct {
	destination string
	port        uint16
	protocol    string
}

// refusals counts what the policy keeps the guest from. The zero value is
// ready for use.
type refusals struct {
	mu    sync.Mutex
	byKey map[refusalKey]*sandbox.Refusal
	total uint64
}

func (r *refusals) add(destination string, port uint16, protocol string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.total++
	k := refusalKey{destination, port, protocol}
	found := r.byKey[k]
	if found == nil {
		if r.byKey == nil {
			r.byKey = map[refusalKey]*sandbox.Refusal{}
		}
		if len(r.byKey) >= maxRefusals {
			var oldest refusalKey
			for k, have := range r.byKey {
				if least := r.byKey[oldest]; least == nil || have.Last.Before(least.Last) {
					oldest = k
				}
			}
			delete(r.byKey, oldest)
		}
		found = &sandbox.Refusal{Destination: destination, Port: port, Protocol: protocol}
		r.byKey[k] = found
	}
	found.Count++
	found.Last = time.Now()
}

func (r *refusals) sum() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.total
}

// list returns them, the latest first.
func (r *refusals) list() []sandbox.Refusal {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]sandbox.Refusal, 0, len(r.byKey))
	for _, have := range r.byKey {
		all = append(all, *have)
	}
	slices.SortFunc(all, func(a, b sandbox.Refusal) int {
		return cmp.Or(b.Last.Compare(a.Last), cmp.Compare(a.Destination, b.Destination), cmp.Compare(a.Port, b.Port))
	})
	return all
}
