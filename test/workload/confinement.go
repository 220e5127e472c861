package main

import (
	"context"
	"fmt"
	"os"
	"strings"
)

// id prints uid and gid, and of /proc/self/status (proc_pid_status(5)) what
// says how confined the process is.
func id(_ context.Context, s streams, _ []string) error {
	fmt.Fprintf(s.stdout, "uid=%d\ngid=%d\n", os.Getuid(), os.Getgid())
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(line, ":")
		switch key {
		case "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp":
			fmt.Fprintf(s.stdout, "%s=%s\n", key, strings.TrimSpace(value))
		}
	}
	return nil
}

// limits prints what the kernel enforces on this cgroup (version 2, in a
// cgroup namespace of its own, as containers have it). A limit that cannot be
// read is "unknown".
func limits(_ context.Context, s streams, _ []string) error {
	for _, name := range []string{"memory.max", "pids.max", "cpu.max"} {
		value := "unknown"
		if b, err := os.ReadFile("/sys/fs/cgroup/" + name); err == nil {
			value = strings.TrimSpace(string(b))
		}
		fmt.Fprintf(s.stdout, "%s=%s\n", name, value)
	}
	return nil
}

// mounts prints, of each line of /proc/self/mounts (proc_pid_mounts(5)), the
// target, type and options.
func mounts(_ context.Context, s streams, _ []string) error {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) >= 4 {
			fmt.Fprintln(s.stdout, f[1], f[2], f[3])
		}
	}
	return nil
}
