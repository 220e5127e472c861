package vz

import (
	"errors"
	"testing"
)

// refused is the framework's one answer to whatever is wrong with a machine.
func refused(why string) error {
	return &nsError{
		Domain: vzDomain, Code: vzInvalidConfiguration, LocalizedDescription: "Invalid virtual machine configuration. " + why,
		UserInfo: "{\n    NSLocalizedFailure = \"Invalid virtual machine configuration.\";\n}",
	}
}

// everything refuses every machine.
func everything(why string) func(blueprint) error {
	return func(blueprint) error { return refused(why) }
}

func TestUnsignedProgramIsToldFromAWrongMachine(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		refuses      func(blueprint) error
		noHypervisor bool
		says         []string
		host         bool
	}{
		"unsigned": {everything("Der Prozess hat keine Berechtigung."), false, []string{
			"not signed with the entitlement com.apple.security.virtualization", "make", "codesign --force --sign -", "VZErrorDomain 2",
		}, true},
		"no hypervisor": {everything("Virtualization is not available on this hardware."), true, []string{"cannot run virtual machines", "use another Mac"}, true},
		"this machine alone": {func(b blueprint) error {
			if b.MemorySize == smallestMemory {
				return nil
			}
			return refused("The storage device attachment is invalid.")
		}, false, []string{"macOS refuses such a machine", "The storage device attachment is invalid."}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStandIn()
			s.refuses, s.noHypervisor = c.refuses, c.noHypervisor
			config, options := setup(t)
			_, err := newMachine(s, config, options)
			wantText(t, err, c.says...)
			host, isHost := errors.AsType[*HostError](err)
			if isHost != c.host || isHost && host.Cure == "" {
				t.Errorf("%T %v", err, err)
			}
			if _, ok := errors.AsType[*nsError](err); !ok {
				t.Errorf("%v has lost what the framework said", err)
			}
			if _, err := probe(s); (err != nil) != c.host {
				t.Errorf("Probe says %v", err)
			}
		})
	}
}

func TestProbe(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	s.rosetta = rosettaNotInstalled
	found, err := probe(s)
	if err != nil || found.Version != "15.2" || !found.SavesStates {
		t.Errorf("%+v, %v", found, err)
	}
	wantText(t, found.RosettaMissing, "softwareupdate --install-rosetta")
	s.rosetta, s.version = rosettaInstalled, "13.0"
	if found, err = probe(s); err != nil || found.SavesStates || found.RosettaMissing != nil {
		t.Errorf("%+v, %v", found, err)
	}
	s.version = "12.0"
	_, err = probe(s)
	wantText(t, err, "too old")
	if len(s.blueprints) > 0 || s.machine != nil {
		t.Error("Probe made more than the smallest configuration")
	}
}
