package vz

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// entitlement is what a program needs to run virtual machines.
const entitlement = "com.apple.security.virtualization"

// The versions of macOS that are needed: for machine identifiers and EFI, and
// for saved states.
const (
	leastMajor               = 13
	leastMajorForSavedStates = 14
)

// Found is what this Mac can do for machines.
type Found struct {
	// Version of macOS.
	Version string
	// SavesStates: machines can be hibernated here.
	SavesStates bool
	// RosettaMissing says why machines have no Rosetta, and how they come to
	// it; nil if they can have it.
	RosettaMissing error
}

// probe is Probe over a framework.
func probe(f framework) (Found, error) {
	if err := checkVersion(f, leastMajor); err != nil {
		return Found{}, err
	}
	if err := checkHost(f); err != nil {
		return Found{}, err
	}
	version, err := f.ProductVersion()
	if err != nil {
		return Found{}, err
	}
	return Found{Version: version, SavesStates: checkSavedStates(f) == nil, RosettaMissing: checkRosetta(f)}, nil
}

// checkVersion is an error on a macOS that is older than the major version.
func checkVersion(f framework, least int) error {
	version, err := f.ProductVersion()
	if err != nil {
		return fmt.Errorf("version of macOS: %w", err)
	}
	major, _, _ := strings.Cut(version, ".")
	number, err := strconv.Atoi(major)
	if err != nil {
		return fmt.Errorf("version of macOS: %q is none", version)
	}
	if number < least {
		return &HostError{
			Problem: fmt.Sprintf("macOS %s is too old for this: it takes macOS %d", version, least),
			Cure:    "update macOS in System Settings, General, Software Update",
		}
	}
	return nil
}

// checkSavedStates is an error where no machine's state can be saved.
func checkSavedStates(f framework) error {
	if f.GOARCH() != "arm64" {
		return &HostError{Problem: "the memory of a virtual machine can be saved on Apple silicon alone", Cure: "stop the sandbox instead"}
	}
	return checkVersion(f, leastMajorForSavedStates)
}

// checkHost is an error if this Mac, or this program, can run no machine at
// all: it has the framework look at the smallest that there can be.
func checkHost(f framework) error {
	program, err := os.Executable()
	if err != nil {
		return err
	}
	smallest, err := f.NewVirtualMachineConfiguration(blueprint{
		// Any file will do: a kernel is looked at when it is booted.
		Kernel:     program,
		CPUs:       f.VirtualMachineConfigurationMinimumAllowedCPUCount(),
		MemorySize: f.VirtualMachineConfigurationMinimumAllowedMemorySize(),
	})
	if err != nil {
		return fmt.Errorf("the smallest machine: %w", said(err))
	}
	valid, err := smallest.Validate()
	if err == nil && valid {
		return nil
	}
	if supported, failed := f.HypervisorSupport(); failed == nil && !supported {
		return &HostError{Problem: "this Mac cannot run virtual machines, perhaps because it is one", Cure: "use another Mac", Err: said(err)}
	}
	if err == nil || hasCode(err, vzDomain, vzInvalidConfiguration) {
		return &HostError{
			Problem: "macOS lets this program run no virtual machine: it is not signed with the entitlement " + entitlement,
			Cure:    "build it on the Mac with make, which signs it, or sign " + program + " with codesign --force --sign - --entitlements FILE",
			Err:     said(err),
		}
	}
	return fmt.Errorf("the smallest machine: %w", said(err))
}

// checkRosetta is an error if there is no Rosetta for Linux here.
func checkRosetta(f framework) error {
	if f.GOARCH() != "arm64" {
		return &HostError{Problem: "Rosetta is for Apple silicon", Cure: "run x86-64 images as they are"}
	}
	if err := checkVersion(f, leastMajor); err != nil {
		return err
	}
	switch f.LinuxRosettaDirectoryShareAvailability() {
	case rosettaInstalled:
		return nil
	case rosettaNotInstalled:
		return &HostError{
			Problem: "Rosetta is not installed, so an arm64 machine cannot run x86-64 programs",
			Cure:    "install it with softwareupdate --install-rosetta, or use an arm64 image",
		}
	}
	return &HostError{Problem: "this Mac has no Rosetta for virtual machines, so they cannot run x86-64 programs", Cure: "use an arm64 image"}
}
