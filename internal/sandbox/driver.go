package sandbox

import (
	"context"
	"io"
	"net"
	"time"
)

// Ref is all a driver is given to find a sandbox again. Nothing else that it
// needs may live only in memory: every method works on a driver opened a
// moment ago by another process.
type Ref struct {
	// ID is the sandbox's name, [a-z0-9][a-z0-9-]{0,62}; unique for the owner
	// the driver was opened with.
	ID string
	// Dir is a directory of the host that is this sandbox's alone, mode 0700.
	// It exists before Create; the manager removes it after Delete. A driver
	// may keep sockets, logs and the like in it.
	Dir string
}

// Driver makes sandboxes exist: eight verbs and a dial. It finds them again
// from their Ref and the operating system alone.
//
// What runs first in every sandbox is guestd (internal/guest/guestd), which
// waits on the guest channel to be configured and only then starts the
// workload that the spec names. A driver knows no more of it than the command
// line it is started with; how it ends is how guestd ends.
//
// Every method is idempotent and safe for concurrent use, also on one sandbox
// and also from two processes. Every method honours its context and returns
// soon after it ends; what a mutation had begun by then is finished or undone
// in the background, or is left such that repeating the call completes it.
// What is started outlives the context, the driver value and the process.
//
// Errors wrap a sentinel of this package where one fits: ErrUnavailable when
// the backend does not answer, ErrInvalid (a *FieldError) for what the spec
// has wrong, ErrExhausted when the host is out of something. They name the
// operation and the ID once.
//
// Package drivertest is this contract as tests.
type Driver interface {
	// Probe reports whether the backend works on this host and what it lets
	// the driver do. If it does not work the error is an *UnavailableError
	// that says why and what mends it.
	Probe(ctx context.Context) (Report, error)

	// List returns the IDs of all artefacts on the host that were made under
	// this driver's owner, running or not, half-made ones included, and of
	// nobody else's. Sorted.
	List(ctx context.Context) ([]string, error)

	// Create makes the artefacts of a sandbox, running nothing. If they exist
	// it succeeds without changing them. On an error nothing is left behind
	// that List would not show.
	Create(ctx context.Context, ref Ref, spec Spec) error

	// Start boots a created sandbox and returns once the operating system
	// says that it runs, which is before guestd listens. If it runs, it
	// succeeds. Of an absent one: an error that wraps ErrNotFound. One that
	// ends at once is no error.
	Start(ctx context.Context, ref Ref) error

	// Stop asks the workload to end (SIGTERM), kills it (SIGKILL) after grace,
	// and returns once it has ended. Zero grace: killed at once. Of a sandbox
	// that is absent or does not run it succeeds. If ctx ends first the
	// sandbox is being stopped all the same, or Stop may be called again.
	Stop(ctx context.Context, ref Ref, grace time.Duration) error

	// Inspect says what the operating system knows. Absent is a state and not
	// an error.
	Inspect(ctx context.Context, ref Ref) (Observation, error)

	// Wait returns how the present life ended once it has, or at once how the
	// last one ended if the sandbox does not run. Of one that is absent, or
	// becomes so, or never ran: the matching observation. Thousands of
	// concurrent waits cost little. If ctx ends first it returns ctx's error.
	Wait(ctx context.Context, ref Ref) (Observation, error)

	// Delete removes all artefacts of a sandbox, killing it if it runs. Of an
	// absent one it succeeds. Mounted folders are never touched.
	Delete(ctx context.Context, ref Ref) error

	// Dial opens a byte stream to a port of the sandbox's guest channel. If
	// nothing listens there: at once an error that wraps ErrUnavailable, as may
	// be the one for a sandbox that does not run. The caller closes the
	// connection; ctx ends only the dialling.
	Dial(ctx context.Context, ref Ref, port uint32) (net.Conn, error)
}

// Report is what Probe found.
type Report struct {
	// Version is the backend's.
	Version string
	// Limits this host lets the driver enforce.
	Limits Limits
	// Warnings are sentences for people about what works less well than it
	// could, each with its cure.
	Warnings []string
}

// Limits says which resource limits can be enforced.
type Limits struct{ CPU, Memory, Pids bool }

// State is what the operating system knows of a sandbox.
type State string

// The states.
const (
	// StateAbsent: there are no artefacts.
	StateAbsent State = "absent"
	// StateCreated: made and never started.
	StateCreated State = "created"
	// StateRunning: the workload runs.
	StateRunning State = "running"
	// StateExited: it ran and ended; ExitCode says how.
	StateExited State = "exited"
	// StateBroken: artefacts that can only be deleted, such as half-made ones.
	StateBroken State = "broken"
)

// Observation is what Inspect and Wait return.
type Observation struct {
	State State
	// StartedAt is when the present or last life began; zero if none has.
	StartedAt time.Time
	// FinishedAt, ExitCode and OOMKilled are of the last life, when Exited.
	FinishedAt time.Time
	ExitCode   int // 128+n when signal n ended it
	OOMKilled  bool
	// Paused: it runs and is halted; see Pauser.
	Paused bool
	// Saved: it does not run, and its next life goes on from the memory that
	// the last one had; see Hibernator.
	Saved bool
	// Detail is what the backend says beyond that, for people; may be empty.
	Detail string
}

// Validator is implemented by drivers that can tell beforehand that a spec
// will not do: options they do not know, an image they do not have, a limit
// that this host cannot enforce. The error is a *FieldError, or wraps
// ErrUnavailable. A driver without it is asked for nothing in DriverOptions.
type Validator interface {
	Validate(ctx context.Context, spec Spec) error
}

// LogSource is implemented by drivers that keep what workloads print.
type LogSource interface {
	// Logs calls yield for each entry, oldest first, until the end (or, when
	// following, until the present life has ended and all was read), until
	// ctx ends, or until yield returns an error, which Logs then returns.
	// Entries are yielded from one goroutine; Data is valid during the call.
	Logs(ctx context.Context, ref Ref, opts LogOptions, yield func(LogEntry) error) error
}

// LogOptions selects log entries.
type LogOptions struct {
	Follow bool
	// Tail is how many of the last lines to begin with; negative: all.
	Tail int
	// Since leaves out what was printed before; zero: nothing.
	Since time.Time
	// Stdout and Stderr choose streams.
	Stdout, Stderr bool
}

// LogEntry is one line, or a part of at most 16 KiB of a longer one.
type LogEntry struct {
	Time   time.Time
	Stderr bool
	// Data ends with the newline that the line was printed with, if any.
	Data []byte
}

// Resizer is implemented by drivers that can change the limits of a created
// sandbox. The new limits hold from the next Start at the latest.
type Resizer interface {
	Resize(ctx context.Context, ref Ref, limits Resources) error
}

// Pauser is implemented by drivers that can halt a sandbox with all that is in
// its memory, and let it go on. A halted one takes no part in anything: its
// guestd does not answer, connections to it wait.
type Pauser interface {
	// Pause halts a sandbox that runs; of one that is halted it succeeds. Of
	// one that does not run: an error that wraps ErrState, or of an absent one
	// ErrNotFound.
	Pause(ctx context.Context, ref Ref) error
	// Resume lets it go on; of one that runs and is not halted it succeeds. Of
	// one that does not run: as Pause. Stop and Delete of a halted one do so by
	// themselves, if need be.
	Resume(ctx context.Context, ref Ref) error
}

// Hibernator is implemented by drivers that can end a sandbox and keep what is
// in its memory, so that its next life goes on from there.
type Hibernator interface {
	// CheckHibernate refuses a spec whose sandboxes cannot be hibernated, with
	// an error that wraps ErrUnsupported and says what keeps them from it.
	CheckHibernate(spec Spec) error
	// Hibernate saves the memory of a sandbox that runs, and ends its life;
	// Inspect says Saved then. What was saved is sealed, used by one Start at
	// most, and gone before anything runs from it; if anything that it depends
	// on was changed, or it cannot be restored, that Start boots as ever. Stop
	// discards it. On an error the sandbox runs on, or has ended as Inspect
	// says. Of one that does not run: as Pause of Pauser; of one whose memory
	// cannot be saved: an error that wraps ErrUnsupported.
	Hibernate(ctx context.Context, ref Ref) error
}

// Snapshotter is implemented by drivers that keep copies of a sandbox's disks,
// the last 3 of each, for as long as the disk is there. target is where a disk
// is mounted; empty: the only one. Of an absent sandbox: an error that wraps
// ErrNotFound; of one without disks: ErrUnsupported.
type Snapshotter interface {
	// SnapshotDisk copies a disk of a sandbox that does not run, or is paused;
	// then the copy is as after a power cut. Else the error wraps ErrState.
	SnapshotDisk(ctx context.Context, ref Ref, target string) (DiskSnapshot, error)
	// DiskSnapshots lists the copies, the latest first.
	DiskSnapshots(ctx context.Context, ref Ref, target string) ([]DiskSnapshot, error)
	// RestoreDisk makes a disk what it was, of a sandbox that does not run; a
	// memory that was saved is forgotten. On an error the disk is as before.
	RestoreDisk(ctx context.Context, ref Ref, target, id string) error
}

// DiskSnapshot is a copy of a disk.
type DiskSnapshot struct {
	ID        string
	CreatedAt time.Time
	SizeBytes uint64 // of the disk; the copy takes room for its data alone
}

// Console is implemented by drivers whose sandboxes have a console of their
// own, beside what the workload prints.
type Console interface {
	// Console opens the console of a sandbox that runs: what it said last
	// (at most 1 MiB), then what it says, to the end of its life; what is written
	// to it is typed. Of one that does not run: an error. The caller closes it,
	// which changes nothing of the sandbox.
	Console(ctx context.Context, ref Ref) (net.Conn, error)
}

// EgressPolicer is implemented by drivers that enforce Spec.Egress.
type EgressPolicer interface {
	// SetEgress replaces the policy of a sandbox: at once if it runs, also for
	// connections that are open, and for its next lives. Of an absent one: an
	// error that wraps ErrNotFound.
	SetEgress(ctx context.Context, ref Ref, egress Egress) error
	// EgressRefused tells what a sandbox that runs was refused in its present
	// life, the latest first, at most 64, and how often in all. Of one that does
	// not run: an error that wraps ErrState, or one that wraps ErrNotFound.
	EgressRefused(ctx context.Context, ref Ref) (recent []Refusal, total uint64, err error)
}

// EgressChecker is implemented by an EgressPolicer that cannot keep every
// policy of every sandbox. The error is a *FieldError.
type EgressChecker interface {
	CheckEgress(spec Spec) error
}

// ImageStore is implemented by drivers that boot OCI images.
type ImageStore interface {
	// LoadImage adds the images of an OCI or docker archive and returns them.
	// It reads to the end before it adds anything: if reading fails, nothing
	// is added; nor if the archive is corrupt or truncated, for which the error
	// wraps ErrCorrupt.
	LoadImage(ctx context.Context, archive io.Reader) ([]Image, error)
	// PullImage fetches an image from its registry. progress is called with
	// lines for people, from one goroutine.
	PullImage(ctx context.Context, reference string, progress func(string)) (Image, error)
	Images(ctx context.Context) ([]Image, error)
	// RemoveImage removes an image by name or id; of one that is absent the
	// error wraps ErrNotFound, of one in use ErrState.
	RemoveImage(ctx context.Context, reference string) error
}

// Image is one image of a store.
type Image struct {
	ID        string // sha256:<hex> of the configuration
	Digest    string // sha256:<hex> of the manifest; empty: unknown
	Names     []string
	SizeBytes uint64
	CreatedAt time.Time
}

// Abilities names what a driver can do beyond the basics, found by type
// assertion: some of "console", "egress", "hibernate", "images", "logs", "pause", "resize",
// "snapshot".
func Abilities(d Driver) []string {
	var names []string
	if _, ok := d.(Console); ok {
		names = append(names, "console")
	}
	if _, ok := d.(EgressPolicer); ok {
		names = append(names, "egress")
	}
	if _, ok := d.(Hibernator); ok {
		names = append(names, "hibernate")
	}
	if _, ok := d.(ImageStore); ok {
		names = append(names, "images")
	}
	if _, ok := d.(LogSource); ok {
		names = append(names, "logs")
	}
	if _, ok := d.(Pauser); ok {
		names = append(names, "pause")
	}
	if _, ok := d.(Resizer); ok {
		names = append(names, "resize")
	}
	if _, ok := d.(Snapshotter); ok {
		names = append(names, "snapshot")
	}
	return names
}
