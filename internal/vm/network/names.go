package network

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	// maxNames answers are remembered; those that would be forgotten first make
	// room.
	maxNames = 4096
	// An answer holds for its TTL, but at least for minTTL: programs keep what
	// they resolved a little longer than they should.
	minTTL = time.Minute
	maxTTL = 24 * time.Hour
)

// names remembers which names the guest was told that an address has. The zero
// value is ready for use.
type names struct {
	mu    sync.Mutex
	until map[answer]time.Time
	// byAddr has the same names, found by address.
	byAddr map[netip.Addr][]string
}

type answer struct {
	addr netip.Addr
	name string
}

// remember notes that addr was given as an answer for name.
func (n *names) remember(name string, addr netip.Addr, ttl time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.until == nil {
		n.until, n.byAddr = map[answer]time.Time{}, map[netip.Addr][]string{}
	}
	a, until := answer{addr, name}, time.Now().Add(min(max(ttl, minTTL), maxTTL))
	old, known := n.until[a]
	if !known {
		if len(n.until) >= maxNames {
			n.makeRoom()
		}
		n.byAddr[addr] = append(n.byAddr[addr], name)
	}
	if !known || old.Before(until) {
		n.until[a] = until
	}
}

// makeRoom forgets what is over or, failing that, the eighth that would be
// first.
func (n *names) makeRoom() {
	now := time.Now()
	n.drop(func(_ answer, until time.Time) bool { return until.Before(now) })
	if len(n.until) < maxNames {
		return
	}
	all := slices.SortedFunc(maps.Values(n.until), time.Time.Compare)
	n.drop(func(_ answer, until time.Time) bool { return !until.After(all[len(all)/8]) })
}

func (n *names) drop(which func(answer, time.Time) bool) {
	for a, until := range n.until {
		if !which(a, until) {
			continue
		}
		delete(n.until, a)
		left := slices.DeleteFunc(n.byAddr[a.addr], func(name string) bool { return name == a.name })
		if len(left) == 0 {
			delete(n.byAddr, a.addr)
		} else {
			n.byAddr[a.addr] = left
		}
	}
}

// of returns the names that addr was given as an answer for.
func (n *names) of(addr netip.Addr) []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var found []string
	now := time.Now()
	for _, name := range n.byAddr[addr] {
		if n.until[answer{addr, name}].After(now) {
			found = append(found, name)
		}
	}
	return found
}

// keep forgets all names but those that keep.
func (n *names) keep(keep func(name string) bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.drop(func(a answer, _ time.Time) bool { return !keep(a.name) })
}
