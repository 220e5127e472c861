package server

import (
	"encoding/json"
	"maps"
	"math"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/exposure"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
)

// sandboxToWire converts a sandbox. The message shares the sandbox's slices
// and maps, which nobody changes.
func sandboxToWire(sb *manager.Sandbox) *agentv1.Sandbox {
	return &agentv1.Sandbox{
		Name:         sb.Name,
		Uid:          sb.UID,
		Spec:         specToWire(sb.Spec),
		Labels:       sb.Labels,
		DesiredState: desiredToWire(sb.Desired),
		Status:       statusToWire(sb),
		Version:      sb.Version.String(),
		CreateTime:   timeToWire(sb.CreatedAt),
		UpdateTime:   timeToWire(sb.UpdatedAt),
	}
}

func statusToWire(sb *manager.Sandbox) *agentv1.SandboxStatus {
	status := &agentv1.SandboxStatus{
		Phase:            phaseToWire(sb.Phase),
		Reason:           sb.Reason,
		Message:          validUTF8(sb.Message),
		Generation:       sb.Generation,
		StartTime:        timeToWire(sb.StartedAt),
		ReadyTime:        timeToWire(sb.ReadyAt),
		LastActivityTime: timeToWire(sb.LastActivityAt),
		RestartCount:     sb.RestartCount,
		NextRestartTime:  timeToWire(sb.NextRestartAt),
		Resources:        resourcesToWire(sb.Resources),
		DetectedPorts:    detectedToWire(sb.Detected),
		GuestdVersion:    sb.GuestdVersion,
		Exposures:        exposuresToWire(sb.Exposures),
	}
	for _, e := range sb.Endpoints {
		status.Endpoints = append(status.Endpoints, endpointToWire(e, sb.Generation))
	}
	if sb.Exit != nil {
		status.Exit = &agentv1.Exit{
			Code:      int32(min(max(sb.Exit.Code, math.MinInt32), math.MaxInt32)),
			Time:      timeToWire(sb.Exit.At),
			OomKilled: sb.Exit.OOMKilled,
		}
		if code := sb.Exit.Code; code > 128 && code <= 128+64 {
			status.Exit.Signal = sandbox.SignalName(int32(code) - 128)
		}
	}
	return status
}

func protocolToWire(udp bool) agentv1.Protocol {
	if udp {
		return agentv1.Protocol_PROTOCOL_UDP
	}
	return agentv1.Protocol_PROTOCOL_TCP
}

func endpointToWire(e manager.Endpoint, generation uint64) *agentv1.Endpoint {
	return &agentv1.Endpoint{
		Name: e.Name, Address: e.Address.String(), GuestPort: uint32(e.GuestPort),
		Protocol: protocolToWire(e.UDP), Generation: generation,
	}
}

func detectedToWire(ports []manager.Detected) []*agentv1.DetectedPort {
	var w []*agentv1.DetectedPort
	for _, p := range ports {
		w = append(w, &agentv1.DetectedPort{
			GuestPort: uint32(p.Port), Protocol: protocolToWire(p.UDP), Program: p.Program, Refusal: p.Refusal,
		})
	}
	return w
}

func exposuresToWire(exposures []manager.Exposure) []*agentv1.Exposure {
	var w []*agentv1.Exposure
	for _, x := range exposures {
		shown := &agentv1.Exposure{
			Source: x.Source, Target: x.Target, TotalCount: uint32(min(x.Total, math.MaxInt32)), Incomplete: x.Incomplete,
		}
		for _, f := range x.Findings {
			shown.Files = append(shown.Files, &agentv1.ExposedFile{Path: f.Path, Kind: exposedKindToWire(f.Kind)})
		}
		w = append(w, shown)
	}
	return w
}

func exposedKindToWire(kind exposure.Kind) agentv1.ExposedFile_Kind {
	switch kind {
	case exposure.Environment:
		return agentv1.ExposedFile_KIND_ENVIRONMENT
	case exposure.Key:
		return agentv1.ExposedFile_KIND_KEY
	case exposure.Credentials:
		return agentv1.ExposedFile_KIND_CREDENTIALS
	default:
		return agentv1.ExposedFile_KIND_UNSPECIFIED
	}
}

func desiredToWire(d manager.Desired) agentv1.DesiredState {
	switch d {
	case manager.DesiredStopped:
		return agentv1.DesiredState_DESIRED_STATE_STOPPED
	case manager.DesiredRunning:
		return agentv1.DesiredState_DESIRED_STATE_RUNNING
	case manager.DesiredDeleted:
		return agentv1.DesiredState_DESIRED_STATE_DELETED
	default:
		return agentv1.DesiredState_DESIRED_STATE_UNSPECIFIED
	}
}

func phaseToWire(p manager.Phase) agentv1.Phase {
	switch p {
	case manager.PhaseCreating:
		return agentv1.Phase_PHASE_CREATING
	case manager.PhaseStopped:
		return agentv1.Phase_PHASE_STOPPED
	case manager.PhaseStarting:
		return agentv1.Phase_PHASE_STARTING
	case manager.PhaseReady:
		return agentv1.Phase_PHASE_READY
	case manager.PhaseBackoff:
		return agentv1.Phase_PHASE_BACKOFF
	case manager.PhaseStopping:
		return agentv1.Phase_PHASE_STOPPING
	case manager.PhaseFailed:
		return agentv1.Phase_PHASE_FAILED
	case manager.PhaseDeleting:
		return agentv1.Phase_PHASE_DELETING
	case manager.PhaseHibernated:
		return agentv1.Phase_PHASE_HIBERNATED
	case manager.PhasePaused:
		return agentv1.Phase_PHASE_PAUSED
	default:
		return agentv1.Phase_PHASE_UNSPECIFIED
	}
}

func specToWire(s sandbox.Spec) *agentv1.SandboxSpec {
	spec := &agentv1.SandboxSpec{
		Driver:        s.Driver,
		MachineClass:  s.MachineClass,
		Entrypoint:    s.Entrypoint,
		Command:       s.Command,
		User:          s.User,
		WorkingDir:    s.WorkingDir,
		Env:           s.Env,
		Mounts:        mountsToWire(s.Mounts),
		Ports:         portsToWire(s.Ports),
		Secrets:       secretsToWire(s.Secrets),
		Readiness:     readinessToWire(s.Readiness),
		Idle:          idleToWire(s.Idle),
		Restart:       restartToWire(s.Restart),
		DriverOptions: optionsToWire(s.DriverOptions),
		Keyless:       s.Keyless,
		AutoForward:   autoForwardToWire(s.AutoForward),
		Egress:        egressToWire(s.Egress),
	}
	if s.Rotation != (sandbox.RotationPolicy{}) {
		spec.SecretRotation = &agentv1.SecretRotation{Action: rotationActionToWire(s.Rotation.Action), Signal: s.Rotation.Signal}
	}
	if s.Resources != (sandbox.Resources{}) {
		spec.Resources = resourcesToWire(s.Resources)
	}
	switch {
	case s.Image != "":
		spec.Source = &agentv1.SandboxSpec_Image{Image: s.Image}
	case s.Machine != "":
		spec.Source = &agentv1.SandboxSpec_Machine{Machine: s.Machine}
	}
	return spec
}

func resourcesToWire(r sandbox.Resources) *agentv1.Resources {
	return &agentv1.Resources{CpuMillis: r.CPUMillis, MemoryMib: r.MemoryMiB, Pids: r.Pids}
}

func mountsToWire(mounts []sandbox.Mount) []*agentv1.Mount {
	var w []*agentv1.Mount
	for _, m := range mounts {
		mount := &agentv1.Mount{Source: m.Source, Target: m.Target, ReadWrite: m.ReadWrite, SizeMib: m.SizeMiB}
		switch m.Kind {
		case sandbox.MountWorkspace:
			mount.Kind = agentv1.Mount_KIND_WORKSPACE
		case sandbox.MountData:
			mount.Kind = agentv1.Mount_KIND_DATA
		case sandbox.MountDisk:
			mount.Kind = agentv1.Mount_KIND_DISK
		}
		w = append(w, mount)
	}
	return w
}

func portsToWire(ports []sandbox.Port) []*agentv1.Port {
	var w []*agentv1.Port
	for _, p := range ports {
		w = append(w, &agentv1.Port{
			Name: p.Name, GuestPort: uint32(p.GuestPort), HostPort: uint32(p.HostPort),
			Protocol: protocolToWire(p.UDP), BindAddress: p.BindAddress,
		})
	}
	return w
}

func secretsToWire(refs []sandbox.SecretRef) []*agentv1.SecretRef {
	var w []*agentv1.SecretRef
	for _, ref := range refs {
		w = append(w, &agentv1.SecretRef{
			Name: ref.Name, Source: ref.Source, File: ref.File, Optional: ref.Optional,
		})
	}
	return w
}

func readinessToWire(r sandbox.Readiness) *agentv1.Readiness {
	if r.HTTP == nil && r.TCPPort == 0 && len(r.Exec) == 0 && r.Timeout == 0 && r.Interval == 0 {
		return nil
	}
	w := &agentv1.Readiness{Timeout: durationToWire(r.Timeout), Interval: durationToWire(r.Interval)}
	switch {
	case r.HTTP != nil:
		w.Probe = &agentv1.Readiness_Http{Http: &agentv1.HttpProbe{Port: uint32(r.HTTP.Port), Path: r.HTTP.Path}}
	case r.TCPPort != 0:
		w.Probe = &agentv1.Readiness_Tcp{Tcp: &agentv1.TcpProbe{Port: uint32(r.TCPPort)}}
	case len(r.Exec) > 0:
		w.Probe = &agentv1.Readiness_Exec{Exec: &agentv1.ExecProbe{Command: r.Exec}}
	}
	return w
}

func idleToWire(p sandbox.IdlePolicy) *agentv1.IdlePolicy {
	if p == (sandbox.IdlePolicy{}) {
		return nil
	}
	w := &agentv1.IdlePolicy{Timeout: durationToWire(p.Timeout)}
	switch p.Action {
	case sandbox.IdleStop:
		w.Action = agentv1.IdlePolicy_ACTION_STOP
	case sandbox.IdleHibernate:
		w.Action = agentv1.IdlePolicy_ACTION_HIBERNATE
	}
	return w
}

func restartToWire(p sandbox.RestartPolicy) *agentv1.RestartPolicy {
	if p == (sandbox.RestartPolicy{}) {
		return nil
	}
	w := &agentv1.RestartPolicy{
		MaxRetries:     p.MaxRetries,
		InitialBackoff: durationToWire(p.InitialBackoff),
		MaxBackoff:     durationToWire(p.MaxBackoff),
	}
	switch p.Mode {
	case sandbox.RestartNever:
		w.Mode = agentv1.RestartPolicy_MODE_NEVER
	case sandbox.RestartOnFailure:
		w.Mode = agentv1.RestartPolicy_MODE_ON_FAILURE
	case sandbox.RestartAlways:
		w.Mode = agentv1.RestartPolicy_MODE_ALWAYS
	}
	return w
}

func rotationActionToWire(action sandbox.RotationAction) agentv1.SecretRotation_Action {
	switch action {
	case sandbox.RotationLeave:
		return agentv1.SecretRotation_ACTION_LEAVE
	case sandbox.RotationSignal:
		return agentv1.SecretRotation_ACTION_SIGNAL
	case sandbox.RotationRestart:
		return agentv1.SecretRotation_ACTION_RESTART
	}
	return agentv1.SecretRotation_ACTION_UNSPECIFIED
}

func autoForwardToWire(a sandbox.AutoForward) *agentv1.AutoForward {
	if a.Mode == "" && len(a.Deny) == 0 {
		return nil
	}
	w := &agentv1.AutoForward{}
	switch a.Mode {
	case sandbox.AutoForwardOff:
		w.Mode = agentv1.AutoForward_MODE_OFF
	case sandbox.AutoForwardOffer:
		w.Mode = agentv1.AutoForward_MODE_OFFER
	case sandbox.AutoForwardForward:
		w.Mode = agentv1.AutoForward_MODE_FORWARD
	}
	for _, port := range a.Deny {
		w.DenyPorts = append(w.DenyPorts, uint32(port))
	}
	return w
}

// optionsToWire returns nil for what is not a JSON object; none but objects
// are recorded.
func optionsToWire(options json.RawMessage) *structpb.Struct {
	var object map[string]any
	if json.Unmarshal(options, &object) != nil || object == nil {
		return nil
	}
	w, err := structpb.NewStruct(object)
	if err != nil {
		return nil
	}
	return w
}

func imageToWire(image sandbox.Image) *agentv1.Image {
	return &agentv1.Image{
		Id: image.ID, Digest: image.Digest, Names: image.Names,
		SizeBytes: image.SizeBytes, CreateTime: timeToWire(image.CreatedAt),
	}
}

func imagesToWire(images []sandbox.Image) []*agentv1.Image {
	var w []*agentv1.Image
	for _, image := range images {
		w = append(w, imageToWire(image))
	}
	return w
}

func classesToWire(classes map[string]manager.Class) []*agentv1.MachineClass {
	var w []*agentv1.MachineClass
	for _, name := range slices.Sorted(maps.Keys(classes)) {
		w = append(w, &agentv1.MachineClass{
			Name: name, Driver: classes[name].Driver, Resources: resourcesToWire(classes[name].Resources),
		})
	}
	return w
}

// timeToWire leaves the zero time out.
func timeToWire(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// durationToWire leaves zero out.
func durationToWire(d time.Duration) *durationpb.Duration {
	if d == 0 {
		return nil
	}
	return durationpb.New(d)
}
