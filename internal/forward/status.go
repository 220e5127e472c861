package forward

import (
	"cmp"
	"slices"
)

// State says what a lease does.
type State string

// The states.
const (
	// StateReserved: picked and not opened yet.
	StateReserved State = "reserved"
	// StateListening: clients can connect.
	StateListening State = "listening"
	// StateBlocked: the port cannot be bound; it is tried again and again.
	StateBlocked State = "blocked"
	// StateReleasing: what goes through it is being ended.
	StateReleasing State = "releasing"
)

// Status is a lease and how it fares.
type Status struct {
	Lease
	State State
	// Detail says, for people, why it does not listen; else empty.
	Detail string
	// LastError is why the last connection could not be carried; empty: the last
	// could.
	LastError string
	Counts
}

// Counts are of connections, or of flows where the protocol is UDP.
type Counts struct {
	Open     int    // now, those that wait included
	Pending  int    // now, those that wait for the sandbox
	Accepted uint64 // of all that came
	Failed   uint64 // of those accepted: the sandbox could not be reached
	Refused  uint64 // of all that came: there were too many
	BytesIn  uint64 // into the sandbox
	BytesOut uint64 // out of it
	Dropped  uint64 // datagrams, either way
}

func (c *Counts) add(other Counts) {
	c.Open += other.Open
	c.Pending += other.Pending
	c.Accepted += other.Accepted
	c.Failed += other.Failed
	c.Refused += other.Refused
	c.BytesIn += other.BytesIn
	c.BytesOut += other.BytesOut
	c.Dropped += other.Dropped
}

// Totals are of one protocol since New.
type Totals struct {
	Leases, Listening, Blocked int
	Counts
}

// Leases returns the leases of a sandbox, or of all if sandbox is empty, by
// protocol and number.
func (f *Forwarder) Leases(sandbox string) []Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []Status
	for _, l := range f.leases {
		if sandbox != "" && l.Sandbox != sandbox {
			continue
		}
		all = append(all, Status{
			Lease: l.Lease, State: l.state, Detail: l.detail, LastError: l.lastError, Counts: l.counts(),
		})
	}
	slices.SortFunc(all, func(a, b Status) int {
		return cmp.Or(cmp.Compare(a.Protocol(), b.Protocol()), cmp.Compare(a.HostPort, b.HostPort))
	})
	return all
}

// Totals returns what all leases together carry and have carried.
func (f *Forwarder) Totals() (tcp, udp Totals) {
	f.mu.Lock()
	defer f.mu.Unlock()
	totals := f.past
	for _, l := range f.leases {
		sum := &totals[protocolIndex(l.UDP)]
		sum.Leases++
		switch l.state {
		case StateListening:
			sum.Listening++
		case StateBlocked:
			sum.Blocked++
		case StateReserved, StateReleasing:
		}
		sum.add(l.counts())
	}
	return totals[0], totals[1]
}

func protocolIndex(udp bool) int {
	if udp {
		return 1
	}
	return 0
}
