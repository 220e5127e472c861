package sandbox

import (
	"encoding/json"
	"maps"
	"slices"
	"time"
)

// Spec is what a sandbox is made of, as its caller asked for it. The store
// keeps it as JSON, so a field's JSON name is for ever. It holds references
// to secrets, never values.
type Spec struct {
	// Driver names the driver that runs it; never empty once recorded.
	Driver string `json:"driver"`
	// Image is an OCI reference; exactly one of Image and Machine is set.
	Image   string `json:"image,omitempty"`
	Machine string `json:"machine,omitempty"`
	// MachineClass names a row of the agent's table of classes; may be empty.
	MachineClass string `json:"machine_class,omitempty"`

	Entrypoint []string          `json:"entrypoint,omitempty"` // nil: the image's
	Command    []string          `json:"command,omitempty"`    // nil: the image's
	User       string            `json:"user,omitempty"`       // user[:group]; empty: the image's
	WorkingDir string            `json:"working_dir,omitempty"`
	Env        map[string]string `json:"env,omitempty"`

	Resources Resources   `json:"resources,omitzero"`
	Mounts    []Mount     `json:"mounts,omitempty"`
	Ports     []Port      `json:"ports,omitempty"`
	Secrets   []SecretRef `json:"secrets,omitempty"`

	Readiness Readiness     `json:"readiness,omitzero"`
	Idle      IdlePolicy    `json:"idle,omitzero"`
	Restart   RestartPolicy `json:"restart,omitzero"`

	// DriverOptions is a JSON object that only the driver understands, or nil.
	DriverOptions json.RawMessage `json:"driver_options,omitempty"`

	// Keyless refuses names that the agent reserves for providers' keys, among
	// secrets and environment.
	Keyless     bool           `json:"keyless,omitempty"`
	Rotation    RotationPolicy `json:"secret_rotation,omitzero"`
	AutoForward AutoForward    `json:"auto_forward,omitzero"`

	// Egress says what it may connect to; see EgressPolicer.
	Egress Egress `json:"egress,omitzero"`
}

// Clone returns a copy that shares nothing with s.
func (s Spec) Clone() Spec {
	s.Entrypoint = slices.Clone(s.Entrypoint)
	s.Command = slices.Clone(s.Command)
	s.Env = maps.Clone(s.Env)
	s.Mounts = slices.Clone(s.Mounts)
	s.Ports = slices.Clone(s.Ports)
	s.Secrets = slices.Clone(s.Secrets)
	s.Readiness.Exec = slices.Clone(s.Readiness.Exec)
	if s.Readiness.HTTP != nil {
		probe := *s.Readiness.HTTP
		s.Readiness.HTTP = &probe
	}
	s.DriverOptions = slices.Clone(s.DriverOptions)
	s.AutoForward.Deny = slices.Clone(s.AutoForward.Deny)
	s.Egress = s.Egress.Clone()
	return s
}

// Resources bound a sandbox. Zero means no limit.
type Resources struct {
	CPUMillis uint32 `json:"cpu_millis,omitempty"` // thousandths of a CPU
	MemoryMiB uint64 `json:"memory_mib,omitempty"`
	Pids      uint32 `json:"pids,omitempty"` // processes and threads
}

// Or returns r with each zero replaced by that of other.
func (r Resources) Or(other Resources) Resources {
	if r.CPUMillis == 0 {
		r.CPUMillis = other.CPUMillis
	}
	if r.MemoryMiB == 0 {
		r.MemoryMiB = other.MemoryMiB
	}
	if r.Pids == 0 {
		r.Pids = other.Pids
	}
	return r
}

// MountKind says what a mount is for.
type MountKind string

// The kinds of mount.
const (
	// MountWorkspace is a person's sources: read-only unless ReadWrite.
	MountWorkspace MountKind = "workspace"
	// MountData is the workload's own durable data: always writable, owned by
	// the sandbox's user as seen from inside.
	MountData MountKind = "data"
	// MountDisk is a disk image of the host's that a virtual machine has as a
	// disk of its own: durable data that goes with snapshots of its memory.
	MountDisk MountKind = "disk"
)

// Mount shows a folder, or a disk image, of the host inside the sandbox.
type Mount struct {
	Kind      MountKind `json:"kind"`
	Source    string    `json:"source"` // absolute, on the host; of a disk: the image
	Target    string    `json:"target"` // absolute, inside; never empty once validated
	ReadWrite bool      `json:"read_write,omitempty"`
	// SizeMiB is a disk's, made if the image is absent; it takes room only as
	// it is filled. An image that is there keeps its own, if that is more.
	SizeMiB uint64 `json:"size_mib,omitempty"`
}

// Writable reports whether the sandbox may write to it.
func (m Mount) Writable() bool { return m.Kind == MountData || m.Kind == MountDisk || m.ReadWrite }

// Port makes a service inside reachable on the host.
type Port struct {
	Name        string `json:"name,omitempty"`
	GuestPort   uint16 `json:"guest_port"`
	HostPort    uint16 `json:"host_port,omitempty"` // 0: leased
	UDP         bool   `json:"udp,omitempty"`
	BindAddress string `json:"bind_address,omitempty"` // empty: 127.0.0.1
}

// SecretRef names a secret and how it is delivered; never its value.
type SecretRef struct {
	Name     string `json:"name"`
	Source   string `json:"source"`
	File     bool   `json:"file,omitempty"`
	Optional bool   `json:"optional,omitempty"`
}

// AllNames, as a SecretRef's name, stands for all that its source has.
const AllNames = "*"

// RotationAction says what becomes of a workload whose secrets have changed.
type RotationAction string

// The rotation actions. Empty means RotationLeave.
const (
	RotationLeave   RotationAction = "leave"
	RotationSignal  RotationAction = "signal"
	RotationRestart RotationAction = "restart"
)

// RotationPolicy says what becomes of a workload whose secrets have changed.
type RotationPolicy struct {
	Action RotationAction `json:"action,omitempty"`
	Signal string         `json:"signal,omitempty"` // as ParseSignal takes it; empty: HUP
}

// AutoForwardMode says what becomes of ports found to be listened on inside.
type AutoForwardMode string

// The modes. Empty means AutoForwardOffer.
const (
	AutoForwardOff     AutoForwardMode = "off"     // not looked for
	AutoForwardOffer   AutoForwardMode = "offer"   // shown
	AutoForwardForward AutoForwardMode = "forward" // forwarded
)

// AutoForward says what becomes of ports found to be listened on inside.
type AutoForward struct {
	Mode AutoForwardMode `json:"mode,omitempty"`
	// Deny are guest ports that are never forwarded by themselves.
	Deny []uint16 `json:"deny_ports,omitempty"`
}

// DefaultReadyTimeout and DefaultProbeInterval apply where Readiness has zero.
const (
	DefaultReadyTimeout  = 45 * time.Second
	DefaultProbeInterval = 200 * time.Millisecond
)

// Readiness says when a started sandbox counts as ready. At most one of HTTP,
// TCP and Exec is set; with none it is ready as soon as it runs.
type Readiness struct {
	HTTP     *HTTPProbe    `json:"http,omitempty"`
	TCPPort  uint16        `json:"tcp_port,omitempty"`
	Exec     []string      `json:"exec,omitempty"` // run inside; ready when it exits 0
	Timeout  time.Duration `json:"timeout_ns,omitempty"`
	Interval time.Duration `json:"interval_ns,omitempty"`
}

// HTTPProbe succeeds on a status from 200 to 399.
type HTTPProbe struct {
	Port uint16 `json:"port"`
	Path string `json:"path"`
}

// Probes reports whether there is a probe.
func (r Readiness) Probes() bool { return r.HTTP != nil || r.TCPPort != 0 || len(r.Exec) > 0 }

// ReadyTimeout is the time from start to ready after which the start failed.
func (r Readiness) ReadyTimeout() time.Duration {
	if r.Timeout == 0 {
		return DefaultReadyTimeout
	}
	return r.Timeout
}

// ProbeInterval is the pause between two probes.
func (r Readiness) ProbeInterval() time.Duration {
	if r.Interval == 0 {
		return DefaultProbeInterval
	}
	return r.Interval
}

// IdleAction says what to do with an idle sandbox.
type IdleAction string

// The idle actions. Empty means IdleStop.
const (
	IdleStop      IdleAction = "stop"
	IdleHibernate IdleAction = "hibernate"
)

// IdlePolicy says what happens to a sandbox that nobody uses.
type IdlePolicy struct {
	Timeout time.Duration `json:"timeout_ns,omitempty"` // zero: never
	Action  IdleAction    `json:"action,omitempty"`
}

// RestartMode says when a workload that ended by itself is started again.
type RestartMode string

// The restart modes. Empty means RestartNever.
const (
	RestartNever     RestartMode = "never"
	RestartOnFailure RestartMode = "on-failure"
	RestartAlways    RestartMode = "always"
)

// RestartPolicy says what happens when a workload ends by itself.
type RestartPolicy struct {
	Mode           RestartMode   `json:"mode,omitempty"`
	MaxRetries     uint32        `json:"max_retries,omitempty"`        // zero: no bound
	InitialBackoff time.Duration `json:"initial_backoff_ns,omitempty"` // zero: 1 s
	MaxBackoff     time.Duration `json:"max_backoff_ns,omitempty"`     // zero: 1 min
}

// Backoff is the pause before restart number n, counted from zero: the
// initial backoff doubled n times, at most the maximum.
func (p RestartPolicy) Backoff(n uint32) time.Duration {
	pause, limit := p.InitialBackoff, p.MaxBackoff
	if pause == 0 {
		pause = time.Second
	}
	if limit == 0 {
		limit = time.Minute
	}
	for range n {
		if pause >= limit {
			break
		}
		pause *= 2
	}
	return min(pause, limit)
}

// Applies reports whether a workload that exited with this status is to be
// started again, after retries restarts in a row.
func (p RestartPolicy) Applies(code int, retries uint32) bool {
	if p.MaxRetries > 0 && retries >= p.MaxRetries {
		return false
	}
	return p.Mode == RestartAlways || p.Mode == RestartOnFailure && code != 0
}
