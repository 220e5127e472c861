package manager

import (
	"bufio"
	"fmt"
	"os"
	"strings"
)

// hostBootID identifies this run of the host; see random(4).
func hostBootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
}

// hostMemory returns the host's memory in MiB: MemTotal and MemAvailable of
// proc_meminfo(5).
func hostMemory() (total, available uint64, err error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		var key string
		var kib uint64
		if _, err := fmt.Sscan(lines.Text(), &key, &kib); err != nil {
			continue
		}
		switch key {
		case "MemTotal:":
			total = kib / 1024
		case "MemAvailable:":
			return total, kib / 1024, nil
		}
	}
	return 0, 0, fmt.Errorf("/proc/meminfo has no MemAvailable")
}
