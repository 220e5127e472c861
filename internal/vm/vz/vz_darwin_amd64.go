//go:build cgo

package vz

import (
	"errors"

	"github.com/Code-Hex/vz/v3"
)

// errIntel is of what vz has for Apple silicon alone, and what the portable
// files therefore do not ask for here.
var errIntel = errors.New("this is for Apple silicon")

func (mac) LinuxRosettaDirectoryShareAvailability() rosettaAvailability { return rosettaNotSupported }

func rosettaShare() (vz.DirectoryShare, error) { return nil, errIntel }

func (macConfiguration) ValidateSaveRestoreSupport() (bool, error) { return false, errIntel }

func (macMachine) SaveMachineStateToPath(string) error { return errIntel }

func (macMachine) RestoreMachineStateFromURL(string) error { return errIntel }
