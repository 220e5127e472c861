//go:build cgo

package vz

import "github.com/Code-Hex/vz/v3"

var (
	_ = [1]struct{}{}[rosettaNotSupported-rosettaAvailability(vz.LinuxRosettaAvailabilityNotSupported)]
	_ = [1]struct{}{}[rosettaNotInstalled-rosettaAvailability(vz.LinuxRosettaAvailabilityNotInstalled)]
	_ = [1]struct{}{}[rosettaInstalled-rosettaAvailability(vz.LinuxRosettaAvailabilityInstalled)]
)

func (mac) LinuxRosettaDirectoryShareAvailability() rosettaAvailability {
	return rosettaAvailability(vz.LinuxRosettaDirectoryShareAvailability())
}

func rosettaShare() (vz.DirectoryShare, error) { return vz.NewLinuxRosettaDirectoryShare() }
