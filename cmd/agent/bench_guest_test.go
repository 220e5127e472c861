package main

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/test/image"
)

// Figures of guestd, the process inside: commands, secrets, memory.

// createBench makes and starts a sandbox of the test image, and waits for it.
func (h *crashHost) createBench(b *testing.B, name string, spec *agentv1.SandboxSpec) *agentv1.Sandbox {
	b.Helper()
	spec.Driver = "podman"
	spec.Source = &agentv1.SandboxSpec_Image{Image: image.RootName}
	made, err := h.client().CreateSandbox(b.Context(), &agentv1.CreateSandboxRequest{
		Sandbox: &agentv1.Sandbox{Name: name, Spec: spec}, Start: true,
	})
	if err != nil {
		b.Fatal(err)
	}
	return made.GetSandbox()
}

// containerName is what podman calls a sandbox.
func (h *crashHost) containerName(b *testing.B, name string) string {
	b.Helper()
	owner, err := os.ReadFile(filepath.Join(h.state, "owner"))
	if err != nil {
		b.Fatal(err)
	}
	return "choiros-" + strings.TrimSpace(string(owner)) + "-" + name
}

// exec runs a program inside a sandbox, to its end, which is to be a good one.
func (h *crashHost) exec(ctx context.Context, name string, command ...string) error {
	call, err := agentv1.NewExecServiceClient(h.conn).Exec(ctx)
	if err != nil {
		return err
	}
	err = call.Send(&agentv1.ExecRequest{Message: &agentv1.ExecRequest_Start{Start: &agentv1.ExecStart{
		Name: name, Command: command, NoStdin: true,
	}}})
	if err != nil {
		return err
	}
	for {
		r, err := call.Recv()
		if err != nil {
			return err
		}
		if exit := r.GetExit(); exit != nil {
			if exit.GetCode() != 0 {
				return fmt.Errorf("exit status %d", exit.GetCode())
			}
			return nil
		}
	}
}

// writeTrue writes a program whose only instructions are those of exit(0), for
// a Go program takes longer to begin than an exec is to take. It has none for
// this machine if ok is false.
func writeTrue(b *testing.B, file string) (ok bool) {
	b.Helper()
	code, ok := map[string]string{
		"amd64": "\xb8\x3c\x00\x00\x00\x31\xff\x0f\x05",             // mov $60, %eax; xor %edi, %edi; syscall
		"arm64": "\x00\x00\x80\xd2\xa8\x0b\x80\xd2\x01\x00\x00\xd4", // mov x0, #0; mov x8, #93; svc #0
	}[runtime.GOARCH]
	if !ok {
		return false
	}
	if err := os.WriteFile(file, executable(b, code), 0o755); err != nil { //nolint:gosec // A program.
		b.Fatal(err)
	}
	return true
}

// executable is a program with these instructions, of this machine's, and
// no others.
func executable(b *testing.B, code string) []byte {
	b.Helper()
	machine := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[runtime.GOARCH]
	const base, headers = 0x400000, 64 + 56
	size := uint64(headers + len(code))
	var file bytes.Buffer
	for _, part := range []any{
		elf.Header64{
			Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
			Type:  uint16(elf.ET_EXEC), Machine: uint16(machine), Version: uint32(elf.EV_CURRENT),
			Entry: base + headers, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1,
		},
		elf.Prog64{
			Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X),
			Vaddr: base, Paddr: base, Filesz: size, Memsz: size, Align: 0x1000,
		},
		[]byte(code),
	} {
		if err := binary.Write(&file, binary.LittleEndian, part); err != nil {
			b.Fatal(err)
		}
	}
	return file.Bytes()
}

// BenchmarkExec is a command from asking to its exit code, against
// `podman exec` of the same in the same container, and against starting it on
// the host, which is what the kernel and the program itself take.
func BenchmarkExec(b *testing.B) {
	h := newCrashHost(b, podmanBackend(b))
	h.start()
	dir := filepath.Join(h.dir, "bin")
	if err := os.Mkdir(dir, 0o755); err != nil { //nolint:gosec // The sandbox's user reads it.
		b.Fatal(err)
	}
	h.createBench(b, "bench", &agentv1.SandboxSpec{
		Command: []string{"sleep"},
		Mounts:  []*agentv1.Mount{{Kind: agentv1.Mount_KIND_WORKSPACE, Source: dir, Target: "/bench"}},
	})
	container := h.containerName(b, "bench")
	if err := podman("cp", container+":/workload", filepath.Join(dir, "workload")); err != nil {
		b.Fatal(err)
	}
	if writeTrue(b, filepath.Join(dir, "true")) {
		b.Run("true", func(b *testing.B) { h.benchExec(b, container, dir, "true") })
	}
	b.Run("go-program", func(b *testing.B) { h.benchExec(b, container, dir, "workload", "exit", "0") })
}

func (h *crashHost) benchExec(b *testing.B, container, dir, program string, args ...string) {
	inside := append([]string{"/bench/" + program}, args...)
	const each = 10 // for one of podman's, which takes far longer
	var ours, theirs, host samples
	for b.Loop() {
		for range each {
			ours = append(ours, timed(b, func() error { return h.exec(b.Context(), "bench", inside...) }))
			host = append(host, timed(b, exec.Command(filepath.Join(dir, program), args...).Run))
		}
		theirs = append(theirs, timed(b, func() error { return podman(append([]string{"exec", container}, inside...)...) }))
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(milliseconds(ours.at(50)), "agent-p50-ms")
	b.ReportMetric(milliseconds(ours.at(99)), "agent-p99-ms")
	b.ReportMetric(milliseconds(theirs.at(50)), "podman-exec-p50-ms")
	b.ReportMetric(milliseconds(host.at(50)), "on-host-p50-ms")
	b.ReportMetric(float64(theirs.at(50))/float64(ours.at(50)), "times-faster")
}

// BenchmarkSecrets is what twenty secrets of an env-file add to a start, and,
// without the noise of starts, how long reading and delivering them takes.
func BenchmarkSecrets(b *testing.B) {
	h := newCrashHost(b, podmanBackend(b))
	h.start()
	var content strings.Builder
	for i := range 20 {
		fmt.Fprintf(&content, "SECRET_%d=%s\n", i, strings.Repeat("x", 40))
	}
	file := filepath.Join(h.dir, "secrets.env")
	if err := os.WriteFile(file, []byte(content.String()), 0o600); err != nil {
		b.Fatal(err)
	}
	h.createBench(b, "plain", &agentv1.SandboxSpec{Command: []string{"sleep"}})
	h.createBench(b, "secret", &agentv1.SandboxSpec{
		Command: []string{"sleep"},
		Secrets: []*agentv1.SecretRef{{Name: "*", Source: "env-file:" + file}},
	})
	b.Run("start", func(b *testing.B) { h.benchSecretStart(b, "plain", "secret") })
	b.Run("push", func(b *testing.B) {
		secrets := agentv1.NewSecretServiceClient(h.conn)
		var took samples
		for b.Loop() {
			took = append(took, timed(b, func() error {
				r, err := secrets.PushSecrets(b.Context(), &agentv1.PushSecretsRequest{Name: "secret", Force: true})
				for _, one := range r.GetDeliveries() {
					if one.GetOutcome() != agentv1.SecretDelivery_OUTCOME_ACKNOWLEDGED {
						err = errors.Join(err, errors.New(one.GetMessage()))
					}
				}
				return err
			}))
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(milliseconds(took.at(50)), "p50-ms")
	})
}

// benchSecretStart starts two sandboxes in turn. Starts vary by more than what
// is looked for, and only ever upwards, so the figure is the difference of the
// quicker ones.
func (h *crashHost) benchSecretStart(b *testing.B, plain, secret string) {
	const pairs = 40
	took := map[string]samples{}
	for i := range 2 * pairs {
		name := plain
		if i%4 == 1 || i%4 == 2 { // whichever is second may find caches warm
			name = secret
		}
		if _, err := h.client().StopSandbox(b.Context(), &agentv1.StopSandboxRequest{Name: name}); err != nil {
			b.Fatal(err)
		}
		took[name] = append(took[name], timed(b, func() error {
			_, err := h.client().StartSandbox(b.Context(), &agentv1.StartSandboxRequest{Name: name})
			return err
		}))
	}
	for b.Loop() {
	}
	without, with := took[plain], took[secret]
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(milliseconds(without.at(50)), "without-p50-ms")
	b.ReportMetric(milliseconds(with.at(50)), "with-p50-ms")
	b.ReportMetric(milliseconds(with.at(25)-without.at(25)), "added-p25-ms")
	b.ReportMetric(float64(with.at(25))/float64(without.at(25)), "with/without")
}

// BenchmarkGuestdMemory is what guestd takes inside, after a start and after a
// thousand commands.
func BenchmarkGuestdMemory(b *testing.B) {
	h := newCrashHost(b, podmanBackend(b))
	h.start()
	h.createBench(b, "bench", &agentv1.SandboxSpec{Command: []string{"sleep"}})
	started := h.guestdMiB(b, "bench")
	for range 1000 {
		if err := h.exec(b.Context(), "bench", "/workload", "exit", "0"); err != nil {
			b.Fatal(err)
		}
	}
	used := h.guestdMiB(b, "bench")
	for b.Loop() {
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(started, "started-MiB")
	b.ReportMetric(used, "after-1000-execs-MiB")
}

// guestdMiB is the resident memory of a sandbox's guestd, by its own account.
func (h *crashHost) guestdMiB(b *testing.B, name string) float64 {
	b.Helper()
	call, err := agentv1.NewStatsServiceClient(h.conn).StreamStats(b.Context(), &agentv1.StreamStatsRequest{Name: name, Once: true})
	if err != nil {
		b.Fatal(err)
	}
	r, err := call.Recv()
	if err != nil || len(r.GetSamples()) != 1 || r.GetSamples()[0].GetGuestdMemoryBytes() == 0 {
		b.Fatalf("no sample of %s: %v, %v", name, r, err)
	}
	return float64(r.GetSamples()[0].GetGuestdMemoryBytes()) / (1 << 20)
}
