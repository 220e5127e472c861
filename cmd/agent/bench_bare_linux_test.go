package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/test/image"
)

// The rival of a machine: QEMU alone. And the memory of both.

// processesOfMachine are the processes of a machine by their names: all of them
// work in its folder.
func processesOfMachine(b *testing.B, state, name string) map[int]string {
	b.Helper()
	box := filepath.Join(state, "vm", "boxes", name)
	found := map[int]string{}
	entries, _ := filepath.Glob("/proc/[0-9]*") // the pattern is a good one
	for _, entry := range entries {
		at, _ := os.Readlink(filepath.Join(entry, "cwd")) // gone, or another user's
		if at != box && !strings.HasPrefix(at, box+"/") {
			continue
		}
		command, err := os.ReadFile(filepath.Join(entry, "comm"))
		if err != nil {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(entry))
		if err != nil {
			b.Fatal(err)
		}
		found[pid] = strings.TrimSpace(string(command))
	}
	return found
}

// qemuOf is the pid of a machine's QEMU.
func qemuOf(b *testing.B, state, name string) int {
	b.Helper()
	all := processesOfMachine(b, state, name)
	for pid, command := range all {
		if strings.HasPrefix(command, "qemu-") {
			return pid
		}
	}
	b.Fatalf("no QEMU among %v", all)
	return 0
}

// bareQEMU is QEMU with a kernel and an initramfs whose process 1 says a word
// and does nothing else, and without anything that this does not need.
type bareQEMU struct {
	path string
	args []string
	cmd  *exec.Cmd
	stop context.CancelFunc
}

const bareWord = "up\n"

// bareInit writes the word to its standard output, which is the console, and
// sleeps for ever.
var bareInit = map[string]string{
	"amd64": "\xb8\x01\x00\x00\x00" + // mov $1, %eax (write)
		"\xbf\x01\x00\x00\x00" + // mov $1, %edi
		"\x48\x8d\x35\x10\x00\x00\x00" + // lea word(%rip), %rsi
		"\xba\x03\x00\x00\x00" + // mov $3, %edx
		"\x0f\x05" + // syscall
		"\xb8\x22\x00\x00\x00" + // mov $34, %eax (pause)
		"\x0f\x05" + // syscall
		"\xeb\xf7" + // jmp to the mov before
		bareWord,
}

// bareLike makes the rival of a machine that runs, of which it takes program,
// kernel, accelerator, processor and memory: none can ever differ. The
// initramfs is the guest kit's, with another process 1 in addition.
func bareLike(b *testing.B, qemu int) *bareQEMU {
	b.Helper()
	code, ok := bareInit[runtime.GOARCH]
	if !ok {
		b.Skip("no process 1 for " + runtime.GOARCH)
	}
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", qemu))
	if err != nil {
		b.Fatal(err)
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", qemu))
	if err != nil {
		b.Fatal(err)
	}
	initramfs, err := os.ReadFile(filepath.Join(image.Kit(b), "initramfs"))
	if err != nil {
		b.Fatal(err)
	}
	initrd := filepath.Join(b.TempDir(), "initrd")
	if err := os.WriteFile(initrd, append(initramfs, cpio("bare", executable(b, code))...), 0o600); err != nil {
		b.Fatal(err)
	}
	bare := &bareQEMU{path: path, args: []string{
		"-initrd", initrd, "-device", "virtio-serial-pci,disable-legacy=on,max_ports=1",
		"-chardev", "stdio,id=con0,signal=off", "-device", "virtconsole,chardev=con0",
	}}
	alone := []string{"-nodefaults", "-no-user-config", "-no-reboot"}
	kept := []string{"-display", "-sandbox", "-machine", "-accel", "-cpu", "-smp", "-m", "-kernel"}
	theirs := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
	for i, arg := range theirs {
		switch {
		case slices.Contains(alone, arg):
			bare.args = append(bare.args, arg)
		case slices.Contains(kept, arg) && !strings.HasPrefix(theirs[i+1], "memory-backend="):
			bare.args = append(bare.args, arg, theirs[i+1])
		case arg == "-append":
			bare.args = append(bare.args, arg, theirs[i+1]+" rdinit=/bare")
		}
	}
	return bare
}

// cpio is an archive (newc, Documentation/driver-api/early-userspace/
// buffer-format.rst) with one executable file. The kernel unpacks any number of
// them, one behind the other.
func cpio(name string, content []byte) []byte {
	var out bytes.Buffer
	add := func(name string, mode int, content []byte) {
		fmt.Fprintf(&out, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
		out.Write(make([]byte, -out.Len()&3))
		out.Write(content)
		out.Write(make([]byte, -out.Len()&3))
	}
	add(name, 0o100755, content)
	add("TRAILER!!!", 0, nil)
	return out.Bytes()
}

// boot starts it, and returns once process 1 has said its word.
func (q *bareQEMU) boot(b *testing.B) error {
	b.Helper()
	ctx, stop := context.WithTimeout(b.Context(), bootLimit)
	q.stop = stop
	q.cmd = exec.CommandContext(ctx, q.path, q.args...)
	out, err := q.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	var said bytes.Buffer
	q.cmd.Stderr = &said
	if err := q.cmd.Start(); err != nil {
		return err
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if strings.TrimSpace(lines.Text()) == strings.TrimSpace(bareWord) {
			return nil
		}
		fmt.Fprintln(&said, lines.Text())
	}
	q.kill(b)
	return fmt.Errorf("QEMU alone ended: %s", &said)
}

// kill ends it, and returns once it has.
func (q *bareQEMU) kill(b *testing.B) {
	b.Helper()
	q.stop()
	_ = q.cmd.Wait() // it was killed
}

// memory is what processes take of the host's memory, in MiB: proportional set
// sizes (PSS), of which the sum is right for what they share.
type memory struct {
	guest float64 // the guest's own
	// translated is code that QEMU has translated, and only where it emulates.
	translated float64
	// files are pages of programs, the kernel and the initramfs, which all
	// machines share, and which the host takes back when it needs them.
	files float64
	own   float64 // all else
}

func (m memory) plus(n memory) memory {
	return memory{m.guest + n.guest, m.translated + n.translated, m.files + n.files, m.own + n.own}
}

// memoryOf reads a process's, smaps in proc_pid_smaps(5).
func memoryOf(b *testing.B, pid int) (m memory) {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		b.Fatal(err)
	}
	into := &m.own
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if !strings.HasSuffix(fields[0], ":") {
			into = m.kind(b, fields)
			continue
		}
		if fields[0] != "Pss:" && fields[0] != "Anonymous:" {
			continue
		}
		kib, err := strconv.ParseFloat(fields[1], 64)
		switch {
		case err != nil:
			b.Fatal(err)
		case fields[0] == "Pss:":
			*into += kib / 1024
		case into == &m.files: // was written to, and is the file's no more
			m.files, m.own = m.files-kib/1024, m.own+kib/1024
		}
	}
	return m
}

// kind is what a mapping, the first line of which is given, counts as.
func (m *memory) kind(b *testing.B, fields []string) *float64 {
	b.Helper()
	var from, to uint64
	if _, err := fmt.Sscanf(fields[0], "%x-%x", &from, &to); err != nil {
		b.Fatal(err)
	}
	file := ""
	if len(fields) > 5 {
		file = fields[5]
	}
	switch {
	case strings.HasPrefix(file, "/memfd:memory-backend"):
		return &m.guest
	case strings.HasPrefix(file, "/") && !strings.HasPrefix(file, "/memfd:"):
		return &m.files
	case file == "" && fields[1] == "rwxp":
		return &m.translated
	case file == "" && fields[1] == "rw-p" && to-from >= benchMachineMiB<<20:
		return &m.guest // that no other process maps
	}
	return &m.own
}

// BenchmarkMachineMemory is what an idle machine without folders takes of the
// host beyond its own memory, against QEMU alone. What QEMU has translated is
// counted apart: with KVM there is none.
func BenchmarkMachineMemory(b *testing.B) {
	h, _ := newMachineHost(b)
	if _, err := h.createMachine(b.Context(), "machine", &agentv1.SandboxSpec{}); err != nil {
		b.Fatal(err)
	}
	each := map[string]memory{}
	var all memory
	for pid, command := range processesOfMachine(b, h.state, "machine") {
		name := "shim"
		if strings.HasPrefix(command, "qemu-") {
			name = "qemu"
		}
		m := memoryOf(b, pid)
		each[name], all = each[name].plus(m), all.plus(m)
	}
	bare := bareLike(b, qemuOf(b, h.state, "machine"))
	if err := bare.boot(b); err != nil {
		b.Fatal(err)
	}
	alone := memoryOf(b, bare.cmd.Process.Pid)
	bare.kill(b)
	for b.Loop() {
	}
	b.ReportMetric(0, "ns/op")
	for name, m := range each {
		b.ReportMetric(m.own, name+"-own-MiB")
	}
	b.ReportMetric(all.own+all.files, "beyond-guest-MiB")
	b.ReportMetric(all.own, "own-MiB")
	b.ReportMetric(all.guest, "guest-MiB")
	b.ReportMetric(all.translated, "translated-MiB")
	// Not its files, some of which it shares with the machine.
	b.ReportMetric(alone.own, "bare-qemu-own-MiB")
	b.ReportMetric(all.own/alone.own, "own/bare-own")
}
