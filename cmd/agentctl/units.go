package main

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// parseMemory reads an amount of memory in MiB: 512m, 2g, 1.5GiB. The units
// are binary however they are written: m, mb and MiB are all 2^20 bytes.
func parseMemory(s string) (mib uint64, err error) {
	number, unit := splitUnit(s)
	var factor float64
	switch strings.ToLower(unit) {
	case "m", "mb", "mi", "mib":
		factor = 1
	case "g", "gb", "gi", "gib":
		factor = 1 << 10
	case "t", "tb", "ti", "tib":
		factor = 1 << 20
	case "":
		return 0, fmt.Errorf("%q has no unit; write 512m or 2g", s)
	default:
		return 0, fmt.Errorf("%q is not an amount of memory; write 512m or 2g", s)
	}
	n, err := decimal(number)
	if err != nil {
		return 0, fmt.Errorf("%q is not an amount of memory; write 512m or 2g", s)
	}
	n *= factor
	if n < 1 || n >= 1<<53 {
		return 0, fmt.Errorf("%q is too little or too much", s)
	}
	if n != math.Trunc(n) {
		return 0, fmt.Errorf("%q is not a whole number of MiB", s)
	}
	return uint64(n), nil
}

// parseCPUs reads a number of CPUs in thousandths: 2, 1.5, 0.25.
func parseCPUs(s string) (millis uint32, err error) {
	n, err := decimal(s)
	if err != nil {
		return 0, fmt.Errorf("%q is not a number of CPUs; write 2 or 1.5", s)
	}
	n = math.Round(n * 1000)
	if n < 1 || n > math.MaxUint32 {
		return 0, fmt.Errorf("%q is too little or too much", s)
	}
	return uint32(n), nil
}

// parseCount reads a whole number above zero.
func parseCount(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is not a whole number above zero", s)
	}
	return uint32(n), nil
}

// decimal reads digits with at most one point in them.
func decimal(s string) (float64, error) {
	if s == "" || strings.Trim(s, "0123456789.") != "" || len(s) > 32 {
		return 0, errors.New("not a decimal number")
	}
	return strconv.ParseFloat(s, 64)
}

func splitUnit(s string) (number, unit string) {
	i := strings.LastIndexAny(s, "0123456789.") + 1
	return s[:i], strings.TrimSpace(s[i:])
}

// parseDuration reads Go's durations, and days: 45s, 1h30m, 2d, 1d12h.
func parseDuration(s string) (time.Duration, error) {
	problem := fmt.Errorf("%q is not a duration; write 45s, 30m or 1h30m", s)
	rest, days := s, 0.0
	if number, after, found := strings.Cut(s, "d"); found {
		var err error
		if days, err = decimal(number); err != nil {
			return 0, problem
		}
		rest = after
	}
	var d time.Duration
	if rest != "" || s == "" {
		var err error
		if d, err = time.ParseDuration(rest); err != nil {
			return 0, problem
		}
	}
	total := days*float64(24*time.Hour) + float64(d)
	if d < 0 {
		return 0, fmt.Errorf("%q is negative", s)
	}
	if total > float64(100*365*24*time.Hour) {
		return 0, fmt.Errorf("%q is longer than a hundred years", s)
	}
	return time.Duration(days*float64(24*time.Hour)) + d, nil
}

// duration prints a duration shortly: 850ms, 4.2s, 42s, 3m20s, 5h12m, 12d.
func duration(d time.Duration) string {
	switch {
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < 10*time.Minute:
		return pair(d, time.Minute, "m", time.Second, "s")
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return pair(d, time.Hour, "h", time.Minute, "m")
	default:
		return fmt.Sprintf("%dd", d/(24*time.Hour))
	}
}

// age prints how long ago something was, in whole seconds at the finest.
func age(d time.Duration) string {
	if d < 10*time.Second {
		return fmt.Sprintf("%ds", max(d, 0)/time.Second)
	}
	return duration(d)
}

func pair(d, big time.Duration, bigUnit string, small time.Duration, smallUnit string) string {
	if rest := d % big / small; rest > 0 {
		return fmt.Sprintf("%d%s%d%s", d/big, bigUnit, rest, smallUnit)
	}
	return fmt.Sprintf("%d%s", d/big, bigUnit)
}

// size prints an amount of bytes: 12 B, 340 KiB, 1.5 GiB.
func size(bytes uint64) string {
	if bytes < 1024 {
		return fmt.Sprintf("%d B", bytes)
	}
	n, unit := float64(bytes), 0
	for n >= 1023.5 && unit < 5 {
		n /= 1024
		unit++
	}
	digits := 0
	if n < 10 && n != math.Trunc(n) {
		digits = 1
	}
	return strings.TrimSuffix(strconv.FormatFloat(n, 'f', digits, 64), ".0") + " " + [...]string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"}[unit]
}

// cpus prints thousandths of a CPU as CPUs.
func cpus(millis uint32) string {
	return strconv.FormatFloat(float64(millis)/1000, 'f', -1, 64)
}
