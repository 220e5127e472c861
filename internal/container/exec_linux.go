package container

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// monitorsOf returns the conmon processes of an exec session. They are this
// user's, and known by the session's id among their arguments, which no other
// process has.
func monitorsOf(session string) []int {
	return processes(func(dir string) bool {
		name, err := os.ReadFile(filepath.Join(dir, "comm"))
		if err != nil || string(name) != "conmon\n" {
			return false
		}
		args, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		return err == nil && isMonitor(args, session)
	})
}

// isMonitor reports whether these are the arguments of a session's conmon.
func isMonitor(cmdline []byte, session string) bool {
	args := bytes.Split(cmdline, []byte{0})
	for i, arg := range args[:len(args)-1] {
		if string(arg) == "-u" && string(args[i+1]) == session {
			return true
		}
	}
	return false
}

// killChildren kills the commands that monitors watch. Those of another user
// inside than the host's are for Podman to kill.
func killChildren(monitors []int) {
	if len(monitors) == 0 {
		return
	}
	kill(processes(func(dir string) bool {
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		return err == nil && slices.Contains(monitors, parentIn(string(stat))) &&
			!slices.Contains(monitors, pidOf(dir))
	}))
}

// parentIn returns the parent's pid in the text of proc_pid_stat(5).
func parentIn(stat string) int {
	// The command's name may hold anything, and is in parentheses.
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 2 {
		return 0
	}
	pid, _ := strconv.Atoi(fields[1])
	return pid
}

// processes returns the pids of those whose folder in /proc is found to be right.
func processes(right func(dir string) bool) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, entry := range entries {
		dir := filepath.Join("/proc", entry.Name())
		if pid := pidOf(dir); pid > 0 && right(dir) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func pidOf(dir string) int {
	pid, _ := strconv.Atoi(filepath.Base(dir))
	return pid
}

func kill(pids []int) {
	for _, pid := range pids {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}
