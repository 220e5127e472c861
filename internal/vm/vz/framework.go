package vz

import (
	"net"
	"os"
)

// framework is what is used of Virtualization.framework that belongs to no
// machine, under the names of vz.
type framework interface {
	// GOARCH is that of this Mac, ProductVersion the version of its macOS,
	// HypervisorSupport whether its processor can run virtual machines:
	// kern.osproductversion and kern.hv_support of sysctl(3).
	GOARCH() string
	ProductVersion() (string, error)
	HypervisorSupport() (bool, error)

	VirtualMachineConfigurationMinimumAllowedCPUCount() uint
	VirtualMachineConfigurationMaximumAllowedCPUCount() uint
	VirtualMachineConfigurationMinimumAllowedMemorySize() uint64
	VirtualMachineConfigurationMaximumAllowedMemorySize() uint64
	LinuxRosettaDirectoryShareAvailability() rosettaAvailability

	// NewGenericMachineIdentifier returns a new one's representation.
	NewGenericMachineIdentifier() ([]byte, error)

	// NewVirtualMachineConfiguration makes what the blueprint says. Descriptors
	// in it have to stay open for as long as a machine of it runs.
	NewVirtualMachineConfiguration(b blueprint) (configuration, error)
}

// configuration is a vz.VirtualMachineConfiguration.
type configuration interface {
	Validate() (bool, error)
	ValidateSaveRestoreSupport() (bool, error)
	NewVirtualMachine() (virtualMachine, error)
}

// virtualMachine is a vz.VirtualMachine. vz brings each call to the machine's
// dispatch queue, and those that return errors block until the framework has
// answered. State and StateChangedNotify never block.
type virtualMachine interface {
	Start() error
	Pause() error
	Resume() error
	Stop() error
	RequestStop() (bool, error)
	CanStop() bool
	CanRequestStop() bool
	SaveMachineStateToPath(path string) error
	RestoreMachineStateFromURL(path string) error

	State() state
	StateChangedNotify() <-chan state

	SocketDevices() []socketDevice
}

// socketDevice is a vz.VirtioSocketDevice, to be used once the machine runs.
type socketDevice interface {
	// Connect may never return: the framework promises nothing for a guest
	// that is silent.
	Connect(port uint32) (net.Conn, error)
	// Listen's listener has an Accept that does not return when it is closed.
	Listen(port uint32) (net.Listener, error)
}

// The states that are asked for, with the numbers of VZVirtualMachineState.
const (
	stateStopped state = 0
	stateRunning state = 1
	statePaused  state = 2
	stateError   state = 3
)

// rosettaAvailability is a vz.LinuxRosettaAvailability.
type rosettaAvailability int

const (
	rosettaNotSupported rosettaAvailability = iota
	rosettaNotInstalled
	rosettaInstalled
)

// blueprint is what machines differ in; each also has a socket device, an
// entropy device and a memory balloon. Paths are absolute.
type blueprint struct {
	// Kernel is what vz.LinuxBootLoader boots; empty: EFI boots a disk.
	Kernel, Initrd, CommandLine string
	// EFIVariableStore is the file of EFI's variables, to be made if
	// CreateEFIVariableStore says so.
	EFIVariableStore       string
	CreateEFIVariableStore bool

	CPUs       uint
	MemorySize uint64
	// MachineIdentifier is a vz.GenericMachineIdentifier's representation;
	// empty: none is set.
	MachineIdentifier []byte

	Disks  []blockDevice
	Shares []directoryShare
	// RosettaTag is the tag of the share with Rosetta; empty: there is none.
	RosettaTag string

	// Network is a datagram socket; nil: no network device, unless NAT says that
	// it is on the framework's NAT.
	Network *os.File
	NAT     bool
	MAC     net.HardwareAddr
	// Console is what hvc0 reads from and writes to; nil: no console.
	Console *os.File
}

// blockDevice is a virtio block device on a raw image.
type blockDevice struct {
	Identifier, Path string
	ReadOnly         bool
	CachingMode      cachingMode
	SyncMode         syncMode
}

// cachingMode and syncMode are vz.DiskImageCachingMode and
// vz.DiskImageSynchronizationMode.
type (
	cachingMode int
	syncMode    int
)

const (
	cached    cachingMode = 2
	syncFsync syncMode    = 2
)

// directoryShare is a virtiofs device with a single folder.
type directoryShare struct {
	Tag, Path string
	ReadOnly  bool
}
