package server

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// loadAverage is that of 1, 5 and 15 minutes; nil if the host does not tell.
// The sysctl returns struct loadavg of sys/resource.h: three uint32 in fixed
// point, and, after padding, a long that says how much one is.
func loadAverage() []float64 {
	data, err := unix.SysctlRaw("vm.loadavg")
	if err != nil || len(data) < 24 {
		return nil
	}
	one := float64(binary.LittleEndian.Uint64(data[16:]))
	if one == 0 {
		return nil
	}
	var loads []float64
	for i := range 3 {
		loads = append(loads, float64(binary.LittleEndian.Uint32(data[4*i:]))/one)
	}
	return loads
}

// residentMemory is the most that this process had resident, in bytes, see
// getrusage(2); macOS tells the present only through Mach.
func residentMemory() uint64 {
	var usage unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &usage) != nil {
		return 0
	}
	return uint64(usage.Maxrss)
}
