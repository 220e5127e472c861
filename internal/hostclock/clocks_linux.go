package hostclock

import "golang.org/x/sys/unix"

// See clock_gettime(2). Both are slewed by NTP alike, and so the wall clock
// moves against them only in steps.
const (
	elapsedClock = unix.CLOCK_BOOTTIME
	awakeClock   = unix.CLOCK_MONOTONIC
)
