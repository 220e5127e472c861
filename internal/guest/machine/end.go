//go:build linux

package machine

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// The ioctl that has a file system write all it has, and then no more; see
// FIFREEZE in linux/fs.h.
const freeze = 0xc0045877

// Settle writes to the disks what is only in memory.
func Settle() { unix.Sync() }

// Freeze leaves the disks' file systems in order, as if they had been unmounted.
// After that whoever writes to one waits for good: the machine is to be switched
// off. m may be nil.
func (m *Made) Freeze() {
	if m == nil {
		return
	}
	for _, file := range m.freezable {
		_ = ioctl(file, freeze, nil) // it has a journal
	}
}

// PowerOff switches the machine off, and returns only if that is refused.
func PowerOff() error { return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) }

// AskToPowerOff has the system that guestd is a service of switch the machine
// off: systemd, if it runs there, in its own way; see SIGRTMIN+4 in systemd(1).
func AskToPowerOff() error {
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		const powerOff = syscall.Signal(34 + 4)
		return unix.Kill(1, powerOff)
	}
	unix.Sync()
	return PowerOff()
}
