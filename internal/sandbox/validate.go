package sandbox

import (
	"fmt"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Bounds of what a request may hold. They are generous: they exist to keep a
// mistake or an attack from filling the store, not to ration.
const (
	maxLabels     = 64
	maxLabelValue = 256
	maxArgs       = 1024
	maxArgsBytes  = 128 << 10
	maxEnv        = 512
	maxMounts     = 32
	maxPorts      = 64
	maxSecrets    = 128
	maxDenied     = 1024
	maxCPUMillis  = 1024 * 1000
	maxMemoryMiB  = 64 << 20 // 64 TiB
	maxPids       = 4 << 20  // the kernel's PID_MAX_LIMIT, see proc(5)
	maxPath       = 4096     // PATH_MAX, see limits.h
	maxOptions    = 64 << 10
	minDiskMiB    = 16
	maxDiskMiB    = 16 << 20 // 16 TiB
)

// namePattern is also what a file, a container and a unit may be called.
var (
	namePattern     = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)
	labelPattern    = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$`)
	envPattern      = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	userPattern     = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,62})?$`)
	fileNamePattern = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)
	portNamePattern = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)
)

// ValidateName refuses what cannot be a sandbox's name.
func ValidateName(field, name string) error {
	if name == "" {
		return Invalidf(field, "is missing; give a name of the form [a-z0-9][a-z0-9-]{0,62}")
	}
	if !namePattern.MatchString(name) {
		return Invalidf(field, "%s is not of the form [a-z0-9][a-z0-9-]{0,62}", clip(name))
	}
	return nil
}

// ValidateLabels refuses labels that are malformed or too many.
func ValidateLabels(field string, labels map[string]string) error {
	if len(labels) > maxLabels {
		return Invalidf(field, "has %d labels; at most %d are allowed", len(labels), maxLabels)
	}
	for key, value := range labels {
		if !labelPattern.MatchString(key) {
			return Invalidf(field, "key %s is not of the form [A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?", clip(key))
		}
		if len(value) > maxLabelValue || !clean(value) {
			return Invalidf(fmt.Sprintf("%s[%s]", field, key), "is longer than %d bytes or has control characters", maxLabelValue)
		}
	}
	return nil
}

// Validate fills in the defaults that do not depend on a host and refuses a
// spec that is wrong in itself, naming the first field that is. It does not
// look at the host: whether an image or a path exists is checked elsewhere.
func (s *Spec) Validate() error {
	for _, check := range []func() error{
		s.validateSource, s.validateProcess, s.validateResources, s.validateMounts,
		s.validatePorts, s.validateSecrets, s.validateReadiness, s.validatePolicies,
		func() error { return s.Egress.Validate("spec.egress") },
	} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

func (s *Spec) validateSource() error {
	switch {
	case s.Image == "" && s.Machine == "":
		return Invalidf("spec.image", "is missing; name an image (or a machine) to run")
	case s.Image != "" && s.Machine != "":
		return Invalidf("spec.machine", "is given together with spec.image; give one")
	case len(s.Image) > 512 || !clean(s.Image) || strings.ContainsAny(s.Image, " \t"):
		return Invalidf("spec.image", "%s is not an image reference", clip(s.Image))
	case s.Machine != "" && !namePattern.MatchString(s.Machine):
		return Invalidf("spec.machine", "%s is not of the form [a-z0-9][a-z0-9-]{0,62}", clip(s.Machine))
	case len(s.DriverOptions) > maxOptions:
		return Invalidf("spec.driver_options", "is %d bytes long; at most %d are allowed", len(s.DriverOptions), maxOptions)
	case s.MachineClass != "" && !namePattern.MatchString(s.MachineClass):
		return Invalidf("spec.machine_class", "%s is not of the form [a-z0-9][a-z0-9-]{0,62}", clip(s.MachineClass))
	}
	return nil
}

func (s *Spec) validateProcess() error {
	if err := validateArgs("spec.entrypoint", s.Entrypoint); err != nil {
		return err
	}
	if err := validateArgs("spec.command", s.Command); err != nil {
		return err
	}
	if err := ValidateUser("spec.user", s.User); err != nil {
		return err
	}
	if s.WorkingDir != "" {
		if err := ValidatePath("spec.working_dir", s.WorkingDir); err != nil {
			return err
		}
	}
	return ValidateEnv("spec.env", s.Env)
}

// ValidateUser refuses what is not user[:group]; empty is nobody in particular.
func ValidateUser(field, user string) error {
	if user != "" && !userPattern.MatchString(user) {
		return Invalidf(field, "%s is not of the form user[:group]", clip(user))
	}
	return nil
}

// ValidateCommand refuses what no program can be called with.
func ValidateCommand(field string, args []string) error {
	if len(args) == 0 || args[0] == "" {
		return Invalidf(field, "names no program")
	}
	return validateArgs(field, args)
}

// ValidateEnv refuses names and values that no environment can have.
func ValidateEnv(field string, env map[string]string) error {
	if len(env) > maxEnv {
		return Invalidf(field, "has %d variables; at most %d are allowed", len(env), maxEnv)
	}
	size := 0
	for name, value := range env {
		if !envPattern.MatchString(name) {
			return Invalidf(field, "name %s is not of the form [A-Za-z_][A-Za-z0-9_]*", clip(name))
		}
		if strings.ContainsRune(value, 0) {
			return Invalidf(field+"["+name+"]", "has a NUL byte")
		}
		size += len(name) + len(value)
	}
	if size > maxArgsBytes {
		return Invalidf(field, "is %d bytes long; at most %d are allowed", size, maxArgsBytes)
	}
	return nil
}

func (s *Spec) validateResources() error {
	r := s.Resources
	switch {
	case r.CPUMillis != 0 && (r.CPUMillis < 10 || r.CPUMillis > maxCPUMillis):
		return Invalidf("spec.resources.cpu_millis", "%d is not from 10 to %d (thousandths of a CPU)", r.CPUMillis, maxCPUMillis)
	case r.MemoryMiB != 0 && (r.MemoryMiB < 8 || r.MemoryMiB > maxMemoryMiB):
		return Invalidf("spec.resources.memory_mib", "%d is not from 8 to %d", r.MemoryMiB, maxMemoryMiB)
	case r.Pids != 0 && (r.Pids < 2 || r.Pids > maxPids):
		return Invalidf("spec.resources.pids", "%d is not from 2 to %d", r.Pids, maxPids)
	}
	return nil
}

func (s *Spec) validateMounts() error {
	if len(s.Mounts) > maxMounts {
		return Invalidf("spec.mounts", "has %d mounts; at most %d are allowed", len(s.Mounts), maxMounts)
	}
	for i := range s.Mounts {
		m, field := &s.Mounts[i], fmt.Sprintf("spec.mounts[%d]", i)
		switch m.Kind {
		case MountWorkspace, MountData:
			if m.Target == "" {
				m.Target = "/" + string(m.Kind)
			}
			if m.SizeMiB != 0 {
				return Invalidf(field+".size_mib", "is given, but the mount is no disk")
			}
		case MountDisk:
			if m.SizeMiB < minDiskMiB || m.SizeMiB > maxDiskMiB {
				return Invalidf(field+".size_mib", "%d is not from %d to %d", m.SizeMiB, minDiskMiB, maxDiskMiB)
			}
		default:
			return Invalidf(field+".kind", "is missing; give workspace, data or disk")
		}
		if err := ValidatePath(field+".source", m.Source); err != nil {
			return err
		}
		if err := ValidatePath(field+".target", m.Target); err != nil {
			return err
		}
		if reservedTarget(m.Target) {
			return Invalidf(field+".target", "%s belongs to the system; choose another place", clip(m.Target))
		}
		for _, other := range s.Mounts[:i] {
			if other.Target == m.Target {
				return Invalidf(field+".target", "%s is the target of another mount", clip(m.Target))
			}
			if m.Kind == MountDisk && other.Kind == MountDisk && other.Source == m.Source {
				return Invalidf(field+".source", "%s is the image of another disk", clip(m.Source))
			}
		}
	}
	return nil
}

// reservedTarget reports whether mounting there would hide what the kernel,
// the container engine or guestd puts in every sandbox.
func reservedTarget(target string) bool {
	if target == "/" {
		return true
	}
	for _, dir := range []string{"/proc", "/sys", "/dev", "/run/choiros", "/run/guestd", "/run/secrets"} {
		if target == dir || strings.HasPrefix(target, dir+"/") {
			return true
		}
	}
	return false
}

func (s *Spec) validatePorts() error {
	if len(s.Ports) > maxPorts {
		return Invalidf("spec.ports", "has %d ports; at most %d are allowed", len(s.Ports), maxPorts)
	}
	for i, p := range s.Ports {
		field := fmt.Sprintf("spec.ports[%d]", i)
		if p.GuestPort == 0 {
			return Invalidf(field+".guest_port", "is not from 1 to 65535")
		}
		if p.Name != "" && !portNamePattern.MatchString(p.Name) {
			return Invalidf(field+".name", "%s is not of the form [a-z0-9-]{1,63}", clip(p.Name))
		}
		if p.BindAddress != "" {
			if _, err := netip.ParseAddr(p.BindAddress); err != nil {
				return Invalidf(field+".bind_address", "%s is not an IP address", clip(p.BindAddress))
			}
		}
		for _, other := range s.Ports[:i] {
			if p.GuestPort == other.GuestPort && p.UDP == other.UDP {
				return Invalidf(field+".guest_port", "%d is that of another port of this spec", p.GuestPort)
			}
			if p.HostPort != 0 && p.HostPort == other.HostPort && p.UDP == other.UDP {
				return Invalidf(field+".host_port", "%d is taken by another port of this spec", p.HostPort)
			}
			if p.Name != "" && p.Name == other.Name {
				return Invalidf(field+".name", "%s is the name of another port", clip(p.Name))
			}
		}
	}
	return nil
}

func (s *Spec) validateSecrets() error {
	if len(s.Secrets) > maxSecrets {
		return Invalidf("spec.secrets", "has %d secrets; at most %d are allowed", len(s.Secrets), maxSecrets)
	}
	for i, ref := range s.Secrets {
		field := fmt.Sprintf("spec.secrets[%d]", i)
		switch {
		case ref.Name == AllNames:
		case ref.File && !fileNamePattern.MatchString(ref.Name):
			return Invalidf(field+".name", "is not of the form %s", fileNamePattern)
		case !ref.File && !envPattern.MatchString(ref.Name):
			return Invalidf(field+".name", "is not of the form [A-Za-z_][A-Za-z0-9_]*")
		}
		for _, other := range s.Secrets[:i] {
			if ref.Name != AllNames && ref.Name == other.Name && ref.File == other.File {
				return Invalidf(field+".name", "is the name of another secret")
			}
		}
		scheme, rest, found := strings.Cut(ref.Source, ":")
		known := []string{"env-file", "file", "credential", "sops", "age", "aws-secretsmanager", "inline"}
		// The source is not echoed: a value pasted here by mistake must not
		// end up in a log.
		if !found || rest == "" || !slices.Contains(known, scheme) {
			return Invalidf(field+".source", "is not one of %s: followed by what it names", strings.Join(known, ":, "))
		}
	}
	return nil
}

func (s *Spec) validateReadiness() error {
	r, probes := &s.Readiness, 0
	if r.HTTP != nil {
		probes++
		if r.HTTP.Port == 0 {
			return Invalidf("spec.readiness.http.port", "is not from 1 to 65535")
		}
		if r.HTTP.Path == "" {
			r.HTTP.Path = "/"
		}
		if !strings.HasPrefix(r.HTTP.Path, "/") || !clean(r.HTTP.Path) {
			return Invalidf("spec.readiness.http.path", "%s does not begin with /", clip(r.HTTP.Path))
		}
	}
	if r.TCPPort != 0 {
		probes++
	}
	if len(r.Exec) > 0 {
		probes++
		if err := ValidateCommand("spec.readiness.exec.command", r.Exec); err != nil {
			return err
		}
	}
	if probes > 1 {
		return Invalidf("spec.readiness", "has %d probes; give at most one of http, tcp and exec", probes)
	}
	if err := validateDuration("spec.readiness.timeout", r.Timeout, 100*time.Millisecond, time.Hour); err != nil {
		return err
	}
	return validateDuration("spec.readiness.interval", r.Interval, 10*time.Millisecond, time.Minute)
}

func (s *Spec) validatePolicies() error {
	if err := validateDuration("spec.idle.timeout", s.Idle.Timeout, time.Second, 365*24*time.Hour); err != nil {
		return err
	}
	switch s.Idle.Action {
	case "", IdleStop, IdleHibernate:
	default:
		return Invalidf("spec.idle.action", "%s is neither stop nor hibernate", clip(string(s.Idle.Action)))
	}
	if err := s.validateRotation(); err != nil {
		return err
	}
	switch s.AutoForward.Mode {
	case "", AutoForwardOff, AutoForwardOffer, AutoForwardForward:
	default:
		return Invalidf("spec.auto_forward.mode", "%s is none of off, offer and forward", clip(string(s.AutoForward.Mode)))
	}
	if len(s.AutoForward.Deny) > maxDenied {
		return Invalidf("spec.auto_forward.deny_ports", "has %d ports; at most %d are allowed", len(s.AutoForward.Deny), maxDenied)
	}
	return s.validateRestart()
}

func (s *Spec) validateRotation() error {
	switch s.Rotation.Action {
	case "", RotationLeave, RotationSignal, RotationRestart:
	default:
		return Invalidf("spec.secret_rotation.action", "%s is none of leave, signal and restart", clip(string(s.Rotation.Action)))
	}
	if s.Rotation.Signal == "" {
		return nil
	}
	if s.Rotation.Action != RotationSignal {
		return Invalidf("spec.secret_rotation.signal", "is given, but the action is not signal")
	}
	_, err := ParseSignal("spec.secret_rotation.signal", s.Rotation.Signal)
	return err
}

func (s *Spec) validateRestart() error {
	r := s.Restart
	switch r.Mode {
	case "", RestartNever, RestartOnFailure, RestartAlways:
	default:
		return Invalidf("spec.restart.mode", "%s is none of never, on-failure and always", clip(string(r.Mode)))
	}
	if err := validateDuration("spec.restart.initial_backoff", r.InitialBackoff, 10*time.Millisecond, time.Hour); err != nil {
		return err
	}
	if err := validateDuration("spec.restart.max_backoff", r.MaxBackoff, 10*time.Millisecond, 24*time.Hour); err != nil {
		return err
	}
	if r.MaxBackoff != 0 && r.MaxBackoff < r.InitialBackoff {
		return Invalidf("spec.restart.max_backoff", "is shorter than spec.restart.initial_backoff")
	}
	return nil
}

func validateArgs(field string, args []string) error {
	if len(args) > maxArgs {
		return Invalidf(field, "has %d arguments; at most %d are allowed", len(args), maxArgs)
	}
	size := 0
	for i, arg := range args {
		if strings.ContainsRune(arg, 0) {
			return Invalidf(fmt.Sprintf("%s[%d]", field, i), "has a NUL byte")
		}
		size += len(arg)
	}
	if size > maxArgsBytes {
		return Invalidf(field, "is %d bytes long; at most %d are allowed", size, maxArgsBytes)
	}
	return nil
}

// ValidatePath refuses what is not the absolute path of a file, in its
// simplest form.
func ValidatePath(field, p string) error {
	switch {
	case p == "":
		return Invalidf(field, "is missing; give an absolute path")
	case !strings.HasPrefix(p, "/"):
		return Invalidf(field, "%s is not absolute", clip(p))
	case len(p) > maxPath || !clean(p):
		return Invalidf(field, "is longer than %d bytes or has control characters", maxPath)
	case path.Clean(p) != p:
		return Invalidf(field, "%s is not in its simplest form; write %s", clip(p), clip(path.Clean(p)))
	}
	return nil
}

func validateDuration(field string, d, low, high time.Duration) error {
	if d != 0 && (d < low || d > high) {
		return Invalidf(field, "%s is not from %s to %s", d, low, high)
	}
	return nil
}

// clean reports whether s is free of control characters.
func clean(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f })
}

// clip quotes user input for an error message, shortened.
func clip(s string) string {
	if len(s) > 80 {
		s = s[:80] + "…"
	}
	return fmt.Sprintf("%q", s)
}
