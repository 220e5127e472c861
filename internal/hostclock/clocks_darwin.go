package hostclock

import "golang.org/x/sys/unix"

// See clock_gettime(3). They are mach_continuous_time and mach_absolute_time,
// which NTP does not slew.
const (
	elapsedClock = unix.CLOCK_MONOTONIC_RAW
	awakeClock   = unix.CLOCK_UPTIME_RAW
)
