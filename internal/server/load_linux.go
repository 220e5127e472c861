package server

import (
	"os"
	"strconv"
	"strings"
)

// loadAverage is that of 1, 5 and 15 minutes, see proc_loadavg(5); nil if the
// host does not tell.
func loadAverage() []float64 {
	data, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return nil
	}
	fields := strings.Fields(string(data))
	if len(fields) < 3 {
		return nil
	}
	var loads []float64
	for _, field := range fields[:3] {
		load, err := strconv.ParseFloat(field, 64)
		if err != nil {
			return nil
		}
		loads = append(loads, load)
	}
	return loads
}

// residentMemory is this process's, in bytes, see proc_pid_statm(5); zero if
// the host does not tell.
func residentMemory() uint64 {
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(data))
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseUint(fields[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * uint64(os.Getpagesize())
}
