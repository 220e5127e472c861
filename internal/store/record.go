package store

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// recordFormat is the format that this version writes. A reader refuses newer
// ones, so that going back to an older agent loses nothing.
const recordFormat = 1

// Desired is what a sandbox is meant to be.
type Desired string

// The desired states.
const (
	DesiredStopped Desired = "stopped"
	DesiredRunning Desired = "running"
	DesiredDeleted Desired = "deleted"
)

// Pending is an intent whose action is not known to be complete. Whoever finds
// it after a crash finishes it.
type Pending string

// The pending intents.
const (
	PendingNone   Pending = ""
	PendingCreate Pending = "create" // artefacts are being made
	PendingBoot   Pending = "boot"   // a boot of Record.Generation is under way
	PendingStop   Pending = "stop"   // being stopped; Desired says what comes next
	// Its memory is being saved; if it was not, it is stopped.
	PendingHibernate Pending = "hibernate"
)

// Record is what was asked for of one sandbox. Its JSON names are for ever.
type Record struct {
	Format int          `json:"format"`
	Name   string       `json:"name"`
	UID    string       `json:"uid"`
	Spec   sandbox.Spec `json:"spec"`

	Labels  map[string]string `json:"labels,omitempty"`
	Desired Desired           `json:"desired"`
	Pending Pending           `json:"pending,omitempty"`
	// Reason is why Desired became what it is, if not by request: IDLE, ….
	Reason string `json:"reason,omitempty"`
	// Failure is why it was given up, for people; empty: it was not.
	Failure string `json:"failure,omitempty"`
	// Generation counts boots; it is raised before the boot it counts.
	Generation uint64 `json:"generation"`
	// HostBoot identifies the run of the host that the last boot was in.
	HostBoot string `json:"host_boot,omitempty"`
	// Resources are those the artefacts were made with.
	Resources sandbox.Resources `json:"resources,omitzero"`
	// Paused says that it is halted; of one that is meant to run.
	Paused bool `json:"paused,omitempty"`
	// Hibernated says that its next boot goes on from the memory that it had.
	Hibernated bool `json:"hibernated,omitempty"`
	// EgressDue says that the driver may not have Spec.Egress yet.
	EgressDue bool `json:"egress_due,omitempty"`
	// Leases are the host ports that are the sandbox's, until it is deleted.
	Leases []Lease `json:"leases,omitempty"`
	// Grace is for PendingStop and DesiredDeleted.
	Grace time.Duration `json:"grace_ns,omitempty"`

	// Requests are the identified requests behind the creation, the last
	// restart, the last removal of a forward and the deletion, so that a retry
	// after a crash recognises them.
	Created     Request `json:"created_by,omitzero"`
	Restarted   Request `json:"restarted_by,omitzero"`
	Unforwarded Request `json:"unforwarded_by,omitzero"`
	Deleted     Request `json:"deleted_by,omitzero"`

	CreatedAt time.Time `json:"created_at"`
	UpdatedAt time.Time `json:"updated_at"`
}

// Lease is a host port that leads to a port inside.
type Lease struct {
	Name        string `json:"name,omitempty"`
	GuestPort   uint16 `json:"guest_port"`
	HostPort    uint16 `json:"host_port"`
	UDP         bool   `json:"udp,omitempty"`
	BindAddress string `json:"bind_address,omitempty"` // empty: 127.0.0.1
	// Auto says that nobody asked for it: something was found to listen there.
	Auto bool `json:"auto,omitempty"`
}

// Request identifies one request of a caller's. The zero Request is none.
type Request struct {
	ID string `json:"id"`
	// Fingerprint is a hash of the method and the arguments.
	Fingerprint string `json:"fingerprint"`
}

// decodeRecord reads a record strictly: a key that is not known may hold an
// intent that is not understood.
func decodeRecord(data []byte, name string) (Record, error) {
	var format struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(data, &format); err != nil {
		return Record{}, err
	}
	if format.Format < 1 || format.Format > recordFormat {
		return Record{}, fmt.Errorf("its format is %d; this agent reads 1 to %d", format.Format, recordFormat)
	}
	var rec Record
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&rec); err != nil {
		return Record{}, err
	}
	if rec.Name != name {
		return Record{}, fmt.Errorf("it is the record of %q", rec.Name)
	}
	if err := sandbox.ValidateName("name", rec.Name); err != nil {
		return Record{}, err
	}
	switch rec.Desired {
	case DesiredStopped, DesiredRunning, DesiredDeleted:
	default:
		return Record{}, fmt.Errorf("its desired state is %q", rec.Desired)
	}
	switch rec.Pending {
	case PendingNone, PendingCreate, PendingBoot, PendingStop, PendingHibernate:
	default:
		return Record{}, fmt.Errorf("its pending intent is %q", rec.Pending)
	}
	for _, l := range rec.Leases {
		if l.GuestPort == 0 || l.HostPort == 0 {
			return Record{}, fmt.Errorf("it has a lease without a port")
		}
	}
	if rec.UID == "" {
		return Record{}, fmt.Errorf("it has no uid")
	}
	if err := rec.Spec.Validate(); err != nil {
		return Record{}, err
	}
	return rec, nil
}
