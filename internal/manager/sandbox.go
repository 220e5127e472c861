package manager

import (
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// Phase is where a sandbox is in its life, as the API tells it.
type Phase string

// The phases. See Phase in sandbox.proto for what each means.
const (
	PhaseUnknown    Phase = "unknown"
	PhaseCreating   Phase = "creating"
	PhaseStopped    Phase = "stopped"
	PhaseStarting   Phase = "starting"
	PhaseReady      Phase = "ready"
	PhaseBackoff    Phase = "backoff"
	PhaseStopping   Phase = "stopping"
	PhaseFailed     Phase = "failed"
	PhaseDeleting   Phase = "deleting"
	PhasePaused     Phase = "paused"
	PhaseHibernated Phase = "hibernated"
)

// Desired is what the agent works towards.
type Desired string

// The desired states.
const (
	DesiredStopped Desired = "stopped"
	DesiredRunning Desired = "running"
	DesiredDeleted Desired = "deleted"
)

// Sandbox is one sandbox as it was at one moment: the record of what was asked
// for, and what is known of it. It is never changed once handed out; share it
// freely and copy before changing.
type Sandbox struct {
	Name      string
	UID       string
	Spec      sandbox.Spec
	Labels    map[string]string
	Desired   Desired
	CreatedAt time.Time
	UpdatedAt time.Time

	// Version rises with every change of anything here but LastActivityAt.
	Version Version

	Phase   Phase
	Reason  string // UPPER_SNAKE_CASE; empty when Phase says it all
	Message string // for people
	// Generation counts boots.
	Generation     uint64
	StartedAt      time.Time // zero: never
	ReadyAt        time.Time // zero: the present life is not, or none is present
	LastActivityAt time.Time
	Exit           *Exit // how the last life ended; nil: none has
	RestartCount   uint32
	NextRestartAt  time.Time // in PhaseBackoff
	// Endpoints are where its ports are reachable.
	Endpoints []Endpoint
	// GuestdVersion is that of the guestd inside; empty: not known.
	GuestdVersion string
	// Detected are the ports on which something listens inside and that are not
	// forwarded.
	Detected []Detected
	// Exposures are what its mounted folders show that looks like secrets, as of
	// when it was made or booted last, or adopted.
	Exposures []Exposure
	// Resources are those in force, after the machine class.
	Resources sandbox.Resources

	// created is the request that made it.
	created Request
}

// Detected is a port inside on which something listens.
type Detected struct {
	Port    uint16
	UDP     bool
	Program string // empty: not known
	// Refusal is why it is not forwarded by itself; empty: it can be.
	Refusal string
}

// Exit is how a life ended.
type Exit struct {
	Code      int // 128+n when signal n ended it
	At        time.Time
	OOMKilled bool
}
