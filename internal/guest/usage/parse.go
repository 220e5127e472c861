//go:build linux

package usage

import (
	"bytes"
	"math"
)

// The fields of /proc/pid/stat behind the name, counted from the state, which
// is the third; see proc_pid_stat(5).
const (
	fieldUser = 14 - 3 + iota
	fieldSystem
	fieldChildUser
	fieldChildSystem

	fieldStart    = 22 - 3
	fieldResident = 24 - 3
)

// parse takes what /proc/pid/stat says, and reports whether it says it. The
// name may hold anything, parentheses and line ends included.
func (p *process) parse(stat []byte) bool {
	begin, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	if begin < 0 || end < begin {
		return false
	}
	p.commSize = copy(p.comm[:], stat[begin+1:end])
	field := 0
	for value := range bytes.FieldsSeq(stat[end+1:]) {
		number, ok := uint64(0), true
		switch field {
		case fieldUser, fieldSystem, fieldChildUser, fieldChildSystem, fieldStart, fieldResident:
			number, ok = parseNumber(value)
		}
		switch field {
		case fieldUser, fieldSystem:
			p.ticks += number
		case fieldChildUser, fieldChildSystem:
			p.childTicks += number
		case fieldStart:
			p.start = number
		case fieldResident:
			p.memory = number * pageSize()
			return ok
		}
		if !ok {
			return false
		}
		field++
	}
	return false
}

// parsePID reads a name in a directory, which a zero byte ends.
func parsePID(name []byte) (int32, bool) {
	if end := bytes.IndexByte(name, 0); end >= 0 {
		name = name[:end]
	}
	pid, ok := parseNumber(name)
	return int32(pid & math.MaxInt32), ok && pid > 0 && pid <= math.MaxInt32
}

// parseNumber reads a decimal number with white space around it.
func parseNumber(text []byte) (uint64, bool) {
	text = bytes.TrimSpace(text)
	var number uint64
	for _, digit := range text {
		if digit < '0' || digit > '9' || number > (math.MaxUint64-9)/10 {
			return 0, false
		}
		number = 10*number + uint64(digit-'0')
	}
	return number, len(text) > 0
}

// parseKeyed finds a number in lines of a key, a space and a number.
func parseKeyed(text []byte, key string) (uint64, bool) {
	for line := range bytes.Lines(text) {
		if rest, ok := bytes.CutPrefix(line, []byte(key)); ok && len(rest) > 0 && rest[0] == ' ' {
			return parseNumber(rest)
		}
	}
	return 0, false
}

// parseResident reads the second field of /proc/pid/statm, in pages.
func parseResident(statm []byte) uint64 {
	_, rest, _ := bytes.Cut(statm, []byte(" "))
	field, _, _ := bytes.Cut(rest, []byte(" "))
	pages, _ := parseNumber(field)
	return pages
}

// parseNetwork sums up /proc/net/dev but for the loopback interface.
func parseNetwork(text []byte) (received, sent uint64) {
	for line := range bytes.Lines(text) {
		name, counters, ok := bytes.Cut(line, []byte(":"))
		if !ok || string(bytes.TrimSpace(name)) == "lo" {
			continue
		}
		field := 0
		for value := range bytes.FieldsSeq(counters) {
			number, _ := parseNumber(value)
			switch field {
			case 0:
				received += number
			case 8:
				sent += number
			}
			field++
		}
	}
	return received, sent
}

// parseBlockIO sums up io.stat of a cgroup: "8:0 rbytes=1 wbytes=2 rios=3 …".
func parseBlockIO(text []byte) (read, written uint64) {
	for field := range bytes.FieldsSeq(text) {
		key, value, _ := bytes.Cut(field, []byte("="))
		number, _ := parseNumber(value)
		switch string(key) {
		case "rbytes":
			read += number
		case "wbytes":
			written += number
		}
	}
	return read, written
}

// parseQuota reads cpu.max, "QUOTA PERIOD", as a number of CPUs, rounded up; as
// all there are if there is no quota.
func parseQuota(text []byte) int {
	first, second, _ := bytes.Cut(bytes.TrimSpace(text), []byte(" "))
	quota, limited := parseNumber(first)
	period, ok := parseNumber(second)
	if !limited || !ok || quota == 0 || period == 0 || quota > math.MaxInt32 || period > math.MaxInt32 {
		return math.MaxInt32
	}
	return int((quota + period - 1) / period) //nolint:gosec // Checked above.
}
