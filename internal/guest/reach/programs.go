//go:build linux

package reach

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// What is looked at to find the programs of new sockets, at most: descriptors
// of a process, and of all.
const (
	maxOfProcess   = 256
	maxDescriptors = 8192
)

// findPrograms puts into names the programs of the sockets whose inodes are
// wanted, as far as guestd's user may look. Of several processes that hold one
// the first counts, which usually is the parent.
func findPrograms(wanted map[uint32]struct{}, names map[uint32]string) {
	folder, err := os.Open("/proc")
	if err != nil {
		return
	}
	defer folder.Close()
	processes, _ := folder.Readdirnames(-1) // in the order of their numbers
	self := strconv.Itoa(os.Getpid())
	for left := maxDescriptors; len(processes) > 0 && left > 0 && len(wanted) > 0; processes = processes[1:] {
		pid := processes[0]
		if pid[0] < '0' || pid[0] > '9' || pid == self {
			continue
		}
		left -= findProgram(filepath.Join("/proc", pid), wanted, names)
	}
}

// findProgram looks at one process and returns how many descriptors it saw.
func findProgram(process string, wanted map[uint32]struct{}, names map[uint32]string) (seen int) {
	folder, err := os.Open(process + "/fd")
	if err != nil {
		return 0 // another user's, or ended
	}
	defer folder.Close()
	descriptors, _ := folder.Readdirnames(maxOfProcess)
	var program string
	for _, descriptor := range descriptors {
		target, _ := os.Readlink(process + "/fd/" + descriptor)
		inode, ok := socketInode(target)
		if _, want := wanted[inode]; !ok || !want {
			continue
		}
		if program == "" {
			comm, err := os.ReadFile(process + "/comm")
			if err != nil {
				break
			}
			program = strings.TrimSuffix(string(comm), "\n")
		}
		names[inode] = program
		delete(wanted, inode)
	}
	return len(descriptors)
}

// socketInode reads what a descriptor of a socket links to: "socket:[4711]".
func socketInode(target string) (uint32, bool) {
	rest, ok := strings.CutPrefix(target, "socket:[")
	digits, closed := strings.CutSuffix(rest, "]")
	inode, err := strconv.ParseUint(digits, 10, 32)
	return uint32(inode), ok && closed && err == nil
}
