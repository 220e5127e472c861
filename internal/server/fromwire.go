package server

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

// defaultGrace is what an absent grace means, see StopSandboxRequest.
const (
	defaultGrace = 10 * time.Second
	maxGrace     = 10 * time.Minute
)

// specFromWire converts a spec. Its errors name fields as the domain does:
// spec.ports[0].guest_port. Only what cannot be said in the domain's types is
// refused here.
func specFromWire(w *agentv1.SandboxSpec) (sandbox.Spec, error) {
	if w == nil {
		return sandbox.Spec{}, sandbox.Invalidf("spec", "is missing")
	}
	spec := sandbox.Spec{
		Driver:       w.GetDriver(),
		Image:        w.GetImage(),
		Machine:      w.GetMachine(),
		MachineClass: w.GetMachineClass(),
		Entrypoint:   w.GetEntrypoint(),
		Command:      w.GetCommand(),
		User:         w.GetUser(),
		WorkingDir:   w.GetWorkingDir(),
		Env:          maps.Clone(w.GetEnv()),
		Resources:    resourcesFromWire(w.GetResources()),
		Secrets:      secretsFromWire(w.GetSecrets()),
		Keyless:      w.GetKeyless(),
	}
	var err error
	if spec.Mounts, err = mountsFromWire(w.GetMounts()); err != nil {
		return sandbox.Spec{}, err
	}
	if spec.Ports, err = portsFromWire(w.GetPorts()); err != nil {
		return sandbox.Spec{}, err
	}
	if spec.Readiness, err = readinessFromWire(w.GetReadiness()); err != nil {
		return sandbox.Spec{}, err
	}
	if spec.Idle, err = idleFromWire(w.GetIdle()); err != nil {
		return sandbox.Spec{}, err
	}
	if spec.Restart, err = restartFromWire(w.GetRestart()); err != nil {
		return sandbox.Spec{}, err
	}
	if spec.Rotation, err = rotationFromWire(w.GetSecretRotation()); err != nil {
		return sandbox.Spec{}, err
	}
	if spec.AutoForward, err = autoForwardFromWire(w.GetAutoForward()); err != nil {
		return sandbox.Spec{}, err
	}
	if spec.Egress, err = egressFromWire(w.GetEgress()); err != nil {
		return sandbox.Spec{}, err
	}
	if spec.DriverOptions, err = optionsFromWire("spec.driver_options", w.GetDriverOptions()); err != nil {
		return sandbox.Spec{}, err
	}
	return spec, nil
}

func resourcesFromWire(w *agentv1.Resources) sandbox.Resources {
	return sandbox.Resources{CPUMillis: w.GetCpuMillis(), MemoryMiB: w.GetMemoryMib(), Pids: w.GetPids()}
}

func secretsFromWire(w []*agentv1.SecretRef) []sandbox.SecretRef {
	var refs []sandbox.SecretRef
	for _, ref := range w {
		refs = append(refs, sandbox.SecretRef{
			Name: ref.GetName(), Source: ref.GetSource(), File: ref.GetFile(), Optional: ref.GetOptional(),
		})
	}
	return refs
}

func mountsFromWire(w []*agentv1.Mount) ([]sandbox.Mount, error) {
	var mounts []sandbox.Mount
	for i, m := range w {
		mount := sandbox.Mount{Source: m.GetSource(), Target: m.GetTarget(), ReadWrite: m.GetReadWrite(), SizeMiB: m.GetSizeMib()}
		switch kind := m.GetKind(); kind {
		case agentv1.Mount_KIND_UNSPECIFIED: // refused by the domain
		case agentv1.Mount_KIND_WORKSPACE:
			mount.Kind = sandbox.MountWorkspace
		case agentv1.Mount_KIND_DATA:
			mount.Kind = sandbox.MountData
		case agentv1.Mount_KIND_DISK:
			mount.Kind = sandbox.MountDisk
		default:
			return nil, unknownEnum(fmt.Sprintf("spec.mounts[%d].kind", i), int32(kind))
		}
		mounts = append(mounts, mount)
	}
	return mounts, nil
}

func portsFromWire(w []*agentv1.Port) ([]sandbox.Port, error) {
	var ports []sandbox.Port
	for i, p := range w {
		port, err := portSpecFromWire(fmt.Sprintf("spec.ports[%d]", i), p)
		if err != nil {
			return nil, err
		}
		ports = append(ports, port)
	}
	return ports, nil
}

func portSpecFromWire(field string, p *agentv1.Port) (port sandbox.Port, err error) {
	port = sandbox.Port{Name: p.GetName(), BindAddress: p.GetBindAddress()}
	if port.UDP, err = udpFromWire(field+".protocol", p.GetProtocol()); err != nil {
		return port, err
	}
	if port.GuestPort, err = portFromWire(field+".guest_port", p.GetGuestPort(), 1); err != nil {
		return port, err
	}
	port.HostPort, err = portFromWire(field+".host_port", p.GetHostPort(), 0)
	return port, err
}

func udpFromWire(field string, protocol agentv1.Protocol) (udp bool, err error) {
	switch protocol {
	case agentv1.Protocol_PROTOCOL_UNSPECIFIED, agentv1.Protocol_PROTOCOL_TCP:
		return false, nil
	case agentv1.Protocol_PROTOCOL_UDP:
		return true, nil
	}
	return false, unknownEnum(field, int32(protocol))
}

func portFromWire(field string, number, low uint32) (uint16, error) {
	if number < low || number > math.MaxUint16 {
		return 0, sandbox.Invalidf(field, "%d is not from %d to %d", number, low, math.MaxUint16)
	}
	return uint16(number), nil
}

func readinessFromWire(w *agentv1.Readiness) (sandbox.Readiness, error) {
	var readiness sandbox.Readiness
	var err error
	switch probe := w.GetProbe().(type) {
	case *agentv1.Readiness_Http:
		port, err := portFromWire("spec.readiness.http.port", probe.Http.GetPort(), 1)
		if err != nil {
			return readiness, err
		}
		readiness.HTTP = &sandbox.HTTPProbe{Port: port, Path: probe.Http.GetPath()}
	case *agentv1.Readiness_Tcp:
		if readiness.TCPPort, err = portFromWire("spec.readiness.tcp.port", probe.Tcp.GetPort(), 1); err != nil {
			return readiness, err
		}
	case *agentv1.Readiness_Exec:
		// The domain takes an empty command for no probe at all.
		if readiness.Exec = probe.Exec.GetCommand(); len(readiness.Exec) == 0 {
			return readiness, sandbox.Invalidf("spec.readiness.exec.command", "is missing")
		}
	}
	if readiness.Timeout, err = durationFromWire("spec.readiness.timeout", w.GetTimeout()); err != nil {
		return readiness, err
	}
	readiness.Interval, err = durationFromWire("spec.readiness.interval", w.GetInterval())
	return readiness, err
}

func idleFromWire(w *agentv1.IdlePolicy) (sandbox.IdlePolicy, error) {
	var idle sandbox.IdlePolicy
	switch action := w.GetAction(); action {
	case agentv1.IdlePolicy_ACTION_UNSPECIFIED:
	case agentv1.IdlePolicy_ACTION_STOP:
		idle.Action = sandbox.IdleStop
	case agentv1.IdlePolicy_ACTION_HIBERNATE:
		idle.Action = sandbox.IdleHibernate
	default:
		return idle, unknownEnum("spec.idle.action", int32(action))
	}
	var err error
	idle.Timeout, err = durationFromWire("spec.idle.timeout", w.GetTimeout())
	return idle, err
}

func restartFromWire(w *agentv1.RestartPolicy) (sandbox.RestartPolicy, error) {
	restart := sandbox.RestartPolicy{MaxRetries: w.GetMaxRetries()}
	switch mode := w.GetMode(); mode {
	case agentv1.RestartPolicy_MODE_UNSPECIFIED:
	case agentv1.RestartPolicy_MODE_NEVER:
		restart.Mode = sandbox.RestartNever
	case agentv1.RestartPolicy_MODE_ON_FAILURE:
		restart.Mode = sandbox.RestartOnFailure
	case agentv1.RestartPolicy_MODE_ALWAYS:
		restart.Mode = sandbox.RestartAlways
	default:
		return restart, unknownEnum("spec.restart.mode", int32(mode))
	}
	var err error
	if restart.InitialBackoff, err = durationFromWire("spec.restart.initial_backoff", w.GetInitialBackoff()); err != nil {
		return restart, err
	}
	restart.MaxBackoff, err = durationFromWire("spec.restart.max_backoff", w.GetMaxBackoff())
	return restart, err
}

func rotationFromWire(w *agentv1.SecretRotation) (sandbox.RotationPolicy, error) {
	rotation := sandbox.RotationPolicy{Signal: w.GetSignal()}
	switch action := w.GetAction(); action {
	case agentv1.SecretRotation_ACTION_UNSPECIFIED:
	case agentv1.SecretRotation_ACTION_LEAVE:
		rotation.Action = sandbox.RotationLeave
	case agentv1.SecretRotation_ACTION_SIGNAL:
		rotation.Action = sandbox.RotationSignal
	case agentv1.SecretRotation_ACTION_RESTART:
		rotation.Action = sandbox.RotationRestart
	default:
		return rotation, unknownEnum("spec.secret_rotation.action", int32(action))
	}
	return rotation, nil
}

func autoForwardFromWire(w *agentv1.AutoForward) (sandbox.AutoForward, error) {
	var auto sandbox.AutoForward
	switch mode := w.GetMode(); mode {
	case agentv1.AutoForward_MODE_UNSPECIFIED:
	case agentv1.AutoForward_MODE_OFF:
		auto.Mode = sandbox.AutoForwardOff
	case agentv1.AutoForward_MODE_OFFER:
		auto.Mode = sandbox.AutoForwardOffer
	case agentv1.AutoForward_MODE_FORWARD:
		auto.Mode = sandbox.AutoForwardForward
	default:
		return auto, unknownEnum("spec.auto_forward.mode", int32(mode))
	}
	for i, number := range w.GetDenyPorts() {
		port, err := portFromWire(fmt.Sprintf("spec.auto_forward.deny_ports[%d]", i), number, 1)
		if err != nil {
			return auto, err
		}
		auto.Deny = append(auto.Deny, port)
	}
	return auto, nil
}

// optionsFromWire returns the options as JSON with sorted keys, nil if there
// are none.
func optionsFromWire(field string, w *structpb.Struct) (json.RawMessage, error) {
	if len(w.GetFields()) == 0 {
		return nil, nil
	}
	object, err := objectFromWire(field, w)
	if err != nil {
		return nil, err
	}
	return json.Marshal(object)
}

func objectFromWire(field string, w *structpb.Struct) (map[string]any, error) {
	object := make(map[string]any, len(w.GetFields()))
	for key, value := range w.GetFields() {
		var err error
		if object[key], err = valueFromWire(field+"."+key, value); err != nil {
			return nil, err
		}
	}
	return object, nil
}

// valueFromWire refuses what google.protobuf.Value can say and JSON cannot.
func valueFromWire(field string, w *structpb.Value) (any, error) {
	switch kind := w.GetKind().(type) {
	case *structpb.Value_NullValue:
		return nil, nil
	case *structpb.Value_BoolValue:
		return kind.BoolValue, nil
	case *structpb.Value_StringValue:
		return kind.StringValue, nil
	case *structpb.Value_NumberValue:
		if math.IsNaN(kind.NumberValue) || math.IsInf(kind.NumberValue, 0) {
			return nil, sandbox.Invalidf(field, "is not a finite number")
		}
		return kind.NumberValue, nil
	case *structpb.Value_StructValue:
		return objectFromWire(field, kind.StructValue)
	case *structpb.Value_ListValue:
		list := make([]any, len(kind.ListValue.GetValues()))
		for i, value := range kind.ListValue.GetValues() {
			var err error
			if list[i], err = valueFromWire(fmt.Sprintf("%s[%d]", field, i), value); err != nil {
				return nil, err
			}
		}
		return list, nil
	default:
		return nil, sandbox.Invalidf(field, "has no value")
	}
}

// durationFromWire converts a duration that cannot be negative. Absent is zero.
func durationFromWire(field string, w *durationpb.Duration) (time.Duration, error) {
	if w == nil {
		return 0, nil
	}
	if err := w.CheckValid(); err != nil {
		return 0, sandbox.Invalidf(field, "is not a valid duration")
	}
	d := w.AsDuration()
	if d < 0 {
		return 0, sandbox.Invalidf(field, "%s is negative", d)
	}
	if d == math.MaxInt64 { // AsDuration saturates
		return 0, sandbox.Invalidf(field, "%d s is longer than the 292 years that can be counted", w.GetSeconds())
	}
	return d, nil
}

func graceFromWire(w *durationpb.Duration) (time.Duration, error) {
	if w == nil {
		return defaultGrace, nil
	}
	grace, err := durationFromWire("grace", w)
	if err == nil && grace > maxGrace {
		err = sandbox.Invalidf("grace", "%s is longer than %s", grace, maxGrace)
	}
	return grace, err
}

// timeFromWire converts a time. Absent is the zero time.
func timeFromWire(field string, w *timestamppb.Timestamp) (time.Time, error) {
	if w == nil {
		return time.Time{}, nil
	}
	if err := w.CheckValid(); err != nil {
		return time.Time{}, sandbox.Invalidf(field, "is not a valid time")
	}
	return w.AsTime(), nil
}

func unknownEnum(field string, number int32) error {
	return sandbox.Unsupportedf(field, "%d is not a value that this agent knows", number)
}
