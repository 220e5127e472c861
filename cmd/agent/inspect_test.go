package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// containerName is the name that Podman knows a sandbox by.
func containerName(t *testing.T, h *crashHost, name string) string {
	t.Helper()
	owner, err := os.ReadFile(filepath.Join(h.state, "owner"))
	if err != nil {
		t.Fatal(err)
	}
	return "choiros-" + strings.TrimSpace(string(owner)) + "-" + name
}

// podmanSays is what Podman's own command line prints.
func podmanSays(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("podman", args...).Output()
	if err != nil {
		t.Fatalf("podman %s: %v", args[0], err)
	}
	return strings.TrimSpace(string(out))
}

// firstProcess is the pid, on the host, of a container's first process.
func firstProcess(t *testing.T, h *crashHost, name string) int {
	t.Helper()
	pid, err := strconv.Atoi(podmanSays(t, "inspect", "--format", "{{.State.Pid}}", containerName(t, h, name)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// members are the processes in the pid namespace of a process, itself too.
func members(t *testing.T, of int) (pids []int) {
	t.Helper()
	space, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", of))
	if err != nil {
		t.Fatal(err)
	}
	links, err := filepath.Glob("/proc/[0-9]*/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if other, _ := os.Readlink(link); other == space {
			pid, _ := strconv.Atoi(strings.Split(link, "/")[2])
			pids = append(pids, pid)
		}
	}
	return pids
}

// holding is what could leak.
type holding struct{ files, agentFiles, processes, memoryKiB int }

func holdings(t *testing.T, h *crashHost, guestd int) holding {
	t.Helper()
	h.mu.Lock()
	agent := h.cmd.Process.Pid
	h.mu.Unlock()
	return holding{
		files: openFiles(t, guestd), agentFiles: openFiles(t, agent),
		processes: len(members(t, guestd)), memoryKiB: residentKiB(t, guestd),
	}
}

func openFiles(t *testing.T, pid int) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// residentKiB is VmRSS of proc_pid_status(5).
func residentKiB(t *testing.T, pid int) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	kib, err := strconv.Atoi(strings.Fields(rest + " 0")[0])
	if err != nil || kib == 0 {
		t.Fatalf("no VmRSS of %d: %v", pid, err)
	}
	return kib
}

// grepTree returns the regular files below a folder that have one of some texts
// in them, and the number of files it has read. Sockets and the like are left
// alone, and so is what goes while it looks.
func grepTree(dir string, texts ...[]byte) (found []string, read int, err error) {
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return skippable(err)
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return skippable(err)
		}
		read++
		for _, text := range texts {
			if bytes.Contains(content, text) {
				found = append(found, path)
				break
			}
		}
		return nil
	})
	return found, read, err
}

func skippable(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil
	}
	return err
}
