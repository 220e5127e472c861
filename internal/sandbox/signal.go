package sandbox

import (
	"strconv"
	"strings"
)

// signals are Linux's, whatever the host: what is signalled runs on Linux. The
// numbers are those of x86 and ARM; see signal(7).
func signals() map[string]int32 {
	return map[string]int32{
		"HUP": 1, "INT": 2, "QUIT": 3, "ILL": 4, "TRAP": 5, "ABRT": 6, "BUS": 7, "FPE": 8,
		"KILL": 9, "USR1": 10, "SEGV": 11, "USR2": 12, "PIPE": 13, "ALRM": 14, "TERM": 15,
		"STKFLT": 16, "CHLD": 17, "CONT": 18, "STOP": 19, "TSTP": 20, "TTIN": 21, "TTOU": 22,
		"URG": 23, "XCPU": 24, "XFSZ": 25, "VTALRM": 26, "PROF": 27, "WINCH": 28, "IO": 29,
		"PWR": 30, "SYS": 31,
	}
}

// maxSignal is the last of the real-time signals.
const maxSignal = 64

// ParseSignal returns the number of a signal inside a sandbox, given by its
// name (TERM, SIGTERM, sigterm) or its number (1 to 64).
func ParseSignal(field, text string) (int32, error) {
	if number, err := strconv.ParseInt(text, 10, 32); err == nil && number >= 1 && number <= maxSignal {
		return int32(number), nil
	}
	if number, ok := signals()[strings.TrimPrefix(strings.ToUpper(text), "SIG")]; ok {
		return number, nil
	}
	return 0, Invalidf(field, "%s is not a signal; give a name such as HUP or a number from 1 to %d", clip(text), maxSignal)
}

// SignalName returns the name of a signal inside a sandbox, such as SIGKILL,
// or its number as text if it has none.
func SignalName(number int32) string {
	for name, n := range signals() {
		if n == number {
			return "SIG" + name
		}
	}
	return strconv.Itoa(int(number))
}
