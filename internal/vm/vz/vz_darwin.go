//go:build cgo

package vz

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"

	"github.com/Code-Hex/vz/v3"
	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/vm"
)

// New makes a machine of config, whose Dir must be there, and starts nothing.
// It takes over config.Network, also on an error. A *HostError is in the errors
// about what this Mac cannot do.
func New(config vm.Config, options Options) (vm.Machine, error) {
	m, err := newMachine(mac{}, config, options)
	if err != nil {
		return nil, err
	}
	return m, nil
}

// Probe says what this Mac can do for machines. Its error is a *HostError if it
// can do nothing.
func Probe() (Found, error) { return probe(mac{}) }

// What the portable files know by these names.
type (
	state   = vz.VirtualMachineState
	nsError = vz.NSError
)

// Numbers of the portable files that are others than vz's do not compile.
var (
	_ = [1]struct{}{}[stateStopped-vz.VirtualMachineStateStopped]
	_ = [1]struct{}{}[stateRunning-vz.VirtualMachineStateRunning]
	_ = [1]struct{}{}[statePaused-vz.VirtualMachineStatePaused]
	_ = [1]struct{}{}[stateError-vz.VirtualMachineStateError]
	_ = [1]struct{}{}[cached-cachingMode(vz.DiskImageCachingModeCached)]
	_ = [1]struct{}{}[syncFsync-syncMode(vz.DiskImageSynchronizationModeFsync)]
	_ = [1]struct{}{}[vzInvalidConfiguration-vz.ErrorInvalidVirtualMachineConfiguration]
	_ = [1]struct{}{}[vzInvalidState-vz.ErrorInvalidVirtualMachineState]
	_ = [1]struct{}{}[vzLimitExceeded-vz.ErrorVirtualMachineLimitExceeded]
	_ = [1]struct{}{}[vzOutOfDiskSpace-vz.ErrorOutOfDiskSpace]
	_ = [1]struct{}{}[darwinENODEV-unix.ENODEV]
	_ = [1]struct{}{}[darwinECONNRESET-unix.ECONNRESET]
	_ = [1]struct{}{}[darwinECONNREFUSED-unix.ECONNREFUSED]
)

// mac is the framework.
type mac struct{}

var _ framework = mac{}

func (mac) GOARCH() string { return runtime.GOARCH }

func (mac) ProductVersion() (string, error) { return unix.Sysctl("kern.osproductversion") }

func (mac) HypervisorSupport() (bool, error) {
	value, err := unix.SysctlUint32("kern.hv_support")
	return value != 0, err
}

func (mac) VirtualMachineConfigurationMinimumAllowedCPUCount() uint {
	return vz.VirtualMachineConfigurationMinimumAllowedCPUCount()
}

func (mac) VirtualMachineConfigurationMaximumAllowedCPUCount() uint {
	return vz.VirtualMachineConfigurationMaximumAllowedCPUCount()
}

func (mac) VirtualMachineConfigurationMinimumAllowedMemorySize() uint64 {
	return vz.VirtualMachineConfigurationMinimumAllowedMemorySize()
}

func (mac) VirtualMachineConfigurationMaximumAllowedMemorySize() uint64 {
	return vz.VirtualMachineConfigurationMaximumAllowedMemorySize()
}

func (mac) NewGenericMachineIdentifier() ([]byte, error) {
	id, err := vz.NewGenericMachineIdentifier()
	if err != nil {
		return nil, err
	}
	return slices.Clone(id.DataRepresentation()), nil // it is the framework's memory
}

func (mac) NewVirtualMachineConfiguration(b blueprint) (configuration, error) {
	boot, err := bootLoader(b)
	if err != nil {
		return nil, fmt.Errorf("boot loader: %w", err)
	}
	config, err := vz.NewVirtualMachineConfiguration(boot, b.CPUs, b.MemorySize)
	if err != nil {
		return nil, err
	}
	for _, step := range []struct {
		what string
		add  func(*vz.VirtualMachineConfiguration, blueprint) error
	}{
		{"platform", addPlatform},
		{"disks", addDisks},
		{"shares", addShares},
		{"network", addNetwork},
		{"console", addConsole},
		{"devices", addOthers},
	} {
		if err := step.add(config, b); err != nil {
			return nil, fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return macConfiguration{config}, nil
}

func bootLoader(b blueprint) (vz.BootLoader, error) {
	if b.Kernel != "" {
		options := []vz.LinuxBootLoaderOption{vz.WithCommandLine(b.CommandLine)}
		if b.Initrd != "" {
			options = append(options, vz.WithInitrd(b.Initrd))
		}
		return vz.NewLinuxBootLoader(b.Kernel, options...)
	}
	var options []vz.NewEFIVariableStoreOption
	if b.CreateEFIVariableStore {
		options = append(options, vz.WithCreatingEFIVariableStore())
	}
	variables, err := vz.NewEFIVariableStore(b.EFIVariableStore, options...)
	if err != nil {
		return nil, err
	}
	return vz.NewEFIBootLoader(vz.WithEFIVariableStore(variables))
}

func addPlatform(config *vz.VirtualMachineConfiguration, b blueprint) error {
	var options []vz.GenericPlatformConfigurationOption
	if len(b.MachineIdentifier) > 0 {
		id, err := vz.NewGenericMachineIdentifierWithData(b.MachineIdentifier)
		if err != nil {
			return err
		}
		if !bytes.Equal(id.DataRepresentation(), b.MachineIdentifier) {
			return errors.New("the machine identifier is damaged; remove machine-identifier from the folder of the sandbox, and with it what was hibernated")
		}
		options = append(options, vz.WithGenericMachineIdentifier(id))
	}
	platform, err := vz.NewGenericPlatformConfiguration(options...)
	if err != nil {
		return err
	}
	config.SetPlatformVirtualMachineConfiguration(platform)
	return nil
}

func addDisks(config *vz.VirtualMachineConfiguration, b blueprint) error {
	var devices []vz.StorageDeviceConfiguration
	for _, disk := range b.Disks {
		attachment, err := vz.NewDiskImageStorageDeviceAttachmentWithCacheAndSync(disk.Path, disk.ReadOnly,
			vz.DiskImageCachingMode(disk.CachingMode), vz.DiskImageSynchronizationMode(disk.SyncMode))
		if err != nil {
			return fmt.Errorf("%s, a raw image at %s: %w", disk.Identifier, disk.Path, err)
		}
		device, err := vz.NewVirtioBlockDeviceConfiguration(attachment)
		if err != nil {
			return err
		}
		if err := device.SetBlockDeviceIdentifier(disk.Identifier); err != nil {
			return err
		}
		devices = append(devices, device)
	}
	config.SetStorageDevicesVirtualMachineConfiguration(devices)
	return nil
}

func addShares(config *vz.VirtualMachineConfiguration, b blueprint) error {
	var devices []vz.DirectorySharingDeviceConfiguration
	add := func(tag string, share vz.DirectoryShare) error {
		device, err := vz.NewVirtioFileSystemDeviceConfiguration(tag)
		if err != nil {
			return err
		}
		device.SetDirectoryShare(share)
		devices = append(devices, device)
		return nil
	}
	for _, share := range b.Shares {
		folder, err := vz.NewSharedDirectory(share.Path, share.ReadOnly)
		if err != nil {
			return fmt.Errorf("%s: %w", share.Tag, err)
		}
		single, err := vz.NewSingleDirectoryShare(folder)
		if err != nil {
			return err
		}
		if err := add(share.Tag, single); err != nil {
			return fmt.Errorf("%s: %w", share.Tag, err)
		}
	}
	if b.RosettaTag != "" {
		share, err := rosettaShare()
		if err != nil {
			return fmt.Errorf("rosetta: %w", err)
		}
		if err := add(b.RosettaTag, share); err != nil {
			return fmt.Errorf("rosetta: %w", err)
		}
	}
	config.SetDirectorySharingDevicesVirtualMachineConfiguration(devices)
	return nil
}

func addNetwork(config *vz.VirtualMachineConfiguration, b blueprint) error {
	if b.Network == nil && !b.NAT {
		return nil
	}
	attachment, err := attachNetwork(b)
	if err != nil {
		return err
	}
	device, err := vz.NewVirtioNetworkDeviceConfiguration(attachment)
	if err != nil {
		return err
	}
	address, err := vz.NewMACAddress(b.MAC)
	if err != nil {
		return err
	}
	device.SetMACAddress(address)
	config.SetNetworkDevicesVirtualMachineConfiguration([]*vz.VirtioNetworkDeviceConfiguration{device})
	return nil
}

func attachNetwork(b blueprint) (vz.NetworkDeviceAttachment, error) {
	if b.NAT {
		return vz.NewNATNetworkDeviceAttachment()
	}
	return vz.NewFileHandleNetworkDeviceAttachment(b.Network)
}

func addConsole(config *vz.VirtualMachineConfiguration, b blueprint) error {
	if b.Console == nil {
		return nil
	}
	attachment, err := vz.NewFileHandleSerialPortAttachment(b.Console, b.Console)
	if err != nil {
		return err
	}
	port, err := vz.NewVirtioConsoleDeviceSerialPortConfiguration(attachment)
	if err != nil {
		return err
	}
	config.SetSerialPortsVirtualMachineConfiguration([]*vz.VirtioConsoleDeviceSerialPortConfiguration{port})
	return nil
}

func addOthers(config *vz.VirtualMachineConfiguration, _ blueprint) error {
	socket, err := vz.NewVirtioSocketDeviceConfiguration()
	if err != nil {
		return err
	}
	entropy, err := vz.NewVirtioEntropyDeviceConfiguration()
	if err != nil {
		return err
	}
	balloon, err := vz.NewVirtioTraditionalMemoryBalloonDeviceConfiguration()
	if err != nil {
		return err
	}
	config.SetSocketDevicesVirtualMachineConfiguration([]vz.SocketDeviceConfiguration{socket})
	config.SetEntropyDevicesVirtualMachineConfiguration([]*vz.VirtioEntropyDeviceConfiguration{entropy})
	config.SetMemoryBalloonDevicesVirtualMachineConfiguration([]vz.MemoryBalloonDeviceConfiguration{balloon})
	return nil
}

// macConfiguration is a configuration, which has its methods from vz but one.
type macConfiguration struct {
	*vz.VirtualMachineConfiguration
}

func (c macConfiguration) NewVirtualMachine() (virtualMachine, error) {
	machine, err := vz.NewVirtualMachine(c.VirtualMachineConfiguration)
	if err != nil {
		return nil, err
	}
	return macMachine{machine}, nil
}

// macMachine is a machine, which has its methods from vz but two.
type macMachine struct{ *vz.VirtualMachine }

func (m macMachine) Start() error { return m.VirtualMachine.Start() }

func (m macMachine) SocketDevices() []socketDevice {
	var devices []socketDevice
	for _, device := range m.VirtualMachine.SocketDevices() {
		devices = append(devices, macSocketDevice{device})
	}
	return devices
}

// macSocketDevice gives interfaces in the stead of pointers: a nil pointer is
// none that is nil.
type macSocketDevice struct{ device *vz.VirtioSocketDevice }

func (d macSocketDevice) Connect(port uint32) (net.Conn, error) {
	conn, err := d.device.Connect(port)
	if err != nil {
		return nil, err
	}
	return conn, nil
}

func (d macSocketDevice) Listen(port uint32) (net.Listener, error) {
	listener, err := d.device.Listen(port)
	if err != nil {
		return nil, err
	}
	return listener, nil
}
