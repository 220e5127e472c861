package manager

import "golang.org/x/sys/unix"

// hostBootID identifies this run of the host.
func hostBootID() (string, error) { return unix.Sysctl("kern.bootsessionuuid") }

// hostMemory returns the host's memory in MiB. What is available is the
// kernel's own judgement of memory pressure, a percentage: free pages alone
// say nothing on a system that fills its memory with caches.
func hostMemory() (total, available uint64, err error) {
	size, err := unix.SysctlUint64("hw.memsize")
	if err != nil {
		return 0, 0, err
	}
	level, err := unix.SysctlUint32("kern.memorystatus_level")
	if err != nil {
		return 0, 0, err
	}
	total = size >> 20
	return total, total * uint64(min(level, 100)) / 100, nil
}
