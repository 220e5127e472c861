//go:build !darwin || !cgo

package vz

import (
	"runtime"

	"github.com/choiros/agent/internal/vm"
)

// New makes a machine of config, whose Dir must be there, and starts nothing.
// It takes over config.Network, also on an error. A *HostError is in the errors
// about what this Mac cannot do.
func New(config vm.Config, _ Options) (vm.Machine, error) {
	if config.Network != nil {
		config.Network.Close()
	}
	return nil, unavailable()
}

// Probe says what this Mac can do for machines. Its error is a *HostError if it
// can do nothing.
func Probe() (Found, error) { return Found{}, unavailable() }

func unavailable() error {
	if runtime.GOOS == "darwin" {
		return &HostError{
			Problem: "this program was built without cgo, and cannot run virtual machines",
			Cure:    "build it on the Mac with make",
		}
	}
	return &HostError{Problem: "Virtualization.framework is on Macs alone", Cure: "use QEMU"}
}

// state is a vz.VirtualMachineState.
type state int

// nsError is a vz.NSError.
type nsError struct {
	Domain               string
	Code                 int
	LocalizedDescription string
	UserInfo             string
}

func (e *nsError) Error() string { return e.LocalizedDescription }
