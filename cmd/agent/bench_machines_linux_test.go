package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest"
	"github.com/choiros/agent/test/image"
)

// Figures of virtual machines, with KVM where it works and emulated elsewhere:
// the rival is accelerated, or not, as ours is. A boot takes seconds, so each
// benchmark does its work a few times and no more.

const (
	// benchMachineMiB is the memory of a machine here, which has one processor.
	benchMachineMiB = 192
	// bootLimit is how long a machine may take to boot among nine others.
	bootLimit = 5 * time.Minute
)

// openMachines opens the driver of machines on an agent's state, as the agent
// itself does. When the benchmark ends its machines are deleted.
func openMachines(b *testing.B, state string) sandbox.Driver {
	b.Helper()
	all := map[string]sandbox.Driver{}
	cfg := Config{StateDir: state, VM: VMConfig{GuestKit: image.Kit(b), Accelerator: "auto"}}
	if err := addMachines(all, cfg, "bench", shimCommand); err != nil {
		b.Fatal(err)
	}
	drv := all["vm"]
	_, err := drv.Probe(b.Context())
	drivertest.Require(b, "qemu", err)
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		names, err := drv.List(ctx)
		for _, name := range names {
			err = errors.Join(err, drv.Delete(ctx, sandbox.Ref{ID: name, Dir: filepath.Join(state, "sandboxes", name)}))
		}
		if err != nil {
			b.Errorf("clean up: %v", err)
		}
	})
	return drv
}

// newMachineHost starts an agent that has the test image for containers and
// for machines. The driver is that of its machines, opened a second time.
func newMachineHost(b *testing.B) (*crashHost, sandbox.Driver) {
	b.Helper()
	h := newCrashHost(b, podmanBackend(b))
	h.flags = []string{"--vm-guest-kit", image.Kit(b)}
	h.start()
	drv := openMachines(b, h.state)
	archive, err := os.ReadFile(filepath.Join(image.Dir(b), image.RootOCI))
	if err != nil {
		b.Fatal(err)
	}
	h.loadMachineImage(b, archive)
	return h, drv
}

func (h *crashHost) loadMachineImage(b *testing.B, archive []byte) {
	b.Helper()
	call, err := agentv1.NewImageServiceClient(h.conn).LoadImage(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	header := &agentv1.LoadImageRequest_Header{Driver: "vm", SizeBytes: uint64(len(archive))}
	_ = call.Send(&agentv1.LoadImageRequest{Part: &agentv1.LoadImageRequest_Header_{Header: header}}) // CloseAndRecv has the error
	for data := range slices.Chunk(archive, 1<<20) {
		_ = call.Send(&agentv1.LoadImageRequest{Part: &agentv1.LoadImageRequest_Data{Data: data}})
	}
	if _, err := call.CloseAndRecv(); err != nil {
		b.Fatal(err)
	}
}

// createMachine makes and starts a machine, of the test image unless the spec
// names another, and waits until it is ready.
func (h *crashHost) createMachine(ctx context.Context, name string, spec *agentv1.SandboxSpec) (*agentv1.Sandbox, error) {
	spec.Driver = "vm"
	if spec.Source == nil {
		spec.Source = &agentv1.SandboxSpec_Image{Image: image.RootName}
	}
	spec.Resources = &agentv1.Resources{CpuMillis: 1000, MemoryMib: benchMachineMiB}
	if spec.Readiness == nil {
		spec.Readiness = &agentv1.Readiness{}
	}
	spec.Readiness.Timeout = durationpb.New(bootLimit)
	made, err := h.client().CreateSandbox(ctx, &agentv1.CreateSandboxRequest{
		Sandbox: &agentv1.Sandbox{Name: name, Spec: spec}, Start: true,
	})
	return made.GetSandbox(), err
}

// BenchmarkMachineHandshake is a machine from its start until its guestd has
// answered, against QEMU alone with the same kernel, initramfs, processor and
// memory, from its start until process 1 runs.
func BenchmarkMachineHandshake(b *testing.B) {
	state, err := os.MkdirTemp("", "crash")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := os.RemoveAll(state); err != nil {
			b.Error(err)
		}
	})
	drv := openMachines(b, state)
	archive, err := os.Open(filepath.Join(image.Dir(b), image.RootOCI))
	if err != nil {
		b.Fatal(err)
	}
	defer archive.Close()
	if _, err := drv.(sandbox.ImageStore).LoadImage(b.Context(), archive); err != nil {
		b.Fatal(err)
	}
	ref := sandbox.Ref{ID: "bench", Dir: b.TempDir()}
	spec := sandbox.Spec{
		Driver: "vm", Image: image.RootName, Command: []string{"sleep"},
		Resources: sandbox.Resources{CPUMillis: 1000, MemoryMiB: benchMachineMiB},
	}
	if err := drv.Create(b.Context(), ref, spec); err != nil {
		b.Fatal(err)
	}
	var bare *bareQEMU
	var ours, theirs samples
	for range 5 {
		ours = append(ours, timed(b, func() error {
			if err := drv.Start(b.Context(), ref); err != nil {
				return err
			}
			return greet(b.Context(), drv, ref)
		}))
		if bare == nil {
			bare = bareLike(b, qemuOf(b, state, ref.ID))
		}
		if err := drv.Stop(b.Context(), ref, 0); err != nil {
			b.Fatal(err)
		}
		theirs = append(theirs, timed(b, func() error { return bare.boot(b) }))
		bare.kill(b)
	}
	for b.Loop() {
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(milliseconds(ours.at(50)), "handshake-p50-ms")
	b.ReportMetric(milliseconds(theirs.at(50)), "bare-qemu-p50-ms")
	b.ReportMetric(float64(ours.at(50))/float64(theirs.at(50)), "handshake/bare")
}

// greet returns once a machine's guestd has answered.
func greet(ctx context.Context, drv sandbox.Driver, ref sandbox.Ref) error {
	guestd := guest.New(ref.ID, func(ctx context.Context) (net.Conn, error) { return drv.Dial(ctx, ref, guest.Port) })
	for deadline := time.Now().Add(bootLimit); ; time.Sleep(2 * time.Millisecond) {
		_, err := guestd.Hello(ctx)
		if err == nil || ctx.Err() != nil || time.Now().After(deadline) {
			return err
		}
	}
}

// BenchmarkMachineSecondStart is a machine of an image that was never used,
// from asking for it until it is ready, against the second one of that image,
// whose root disk is there already.
func BenchmarkMachineSecondStart(b *testing.B) {
	h, _ := newMachineHost(b)
	const name, size = "localhost/choiros/large:latest", 128 << 20
	large, err := image.Binary(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	noise := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise) // never fails
	var archive bytes.Buffer
	// What comes behind a program is no part of it.
	if err := image.Write(&archive, append(large, noise...), image.Spec{Name: name, Format: image.OCI}); err != nil {
		b.Fatal(err)
	}
	start := func() time.Duration {
		took := timed(b, func() error {
			_, err := h.createMachine(b.Context(), "bench", &agentv1.SandboxSpec{Source: &agentv1.SandboxSpec_Image{Image: name}})
			return err
		})
		h.delete("bench")
		return took
	}
	var first, second samples
	for range 3 {
		h.loadMachineImage(b, archive.Bytes())
		first, second = append(first, start()), append(second, start())
		_, err := agentv1.NewImageServiceClient(h.conn).RemoveImage(b.Context(), &agentv1.RemoveImageRequest{Driver: "vm", Reference: name})
		if err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(milliseconds(first.at(50)), "first-p50-ms")
	b.ReportMetric(milliseconds(second.at(50)), "second-p50-ms")
	b.ReportMetric(float64(second.at(50))/float64(first.at(50)), "second/first")
}

// BenchmarkTenMachinesAtOnce is ten creations at once until all are ready,
// against ten times one of them alone.
func BenchmarkTenMachinesAtOnce(b *testing.B) {
	h, _ := newMachineHost(b)
	const n = 10
	create := func(name string) error {
		_, err := h.createMachine(b.Context(), name, &agentv1.SandboxSpec{})
		return err
	}
	var alone samples
	for range 3 {
		alone = append(alone, timed(b, func() error { return create("alone") }))
		h.delete("alone")
	}
	began := time.Now()
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			if err := create(fmt.Sprint("box-", i)); err != nil {
				b.Error(err)
			}
		})
	}
	all.Wait()
	together := time.Since(began)
	for b.Loop() {
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(milliseconds(alone.at(50)), "alone-p50-ms")
	b.ReportMetric(milliseconds(together), "ten-ms")
	b.ReportMetric(float64(together)/float64(n*alone.at(50)), "ten/ten-times-one")
}

// BenchmarkMachineExec is a command in a machine, over vsock, against the same
// in a container of the same agent.
func BenchmarkMachineExec(b *testing.B) {
	file := filepath.Join(b.TempDir(), "true")
	if !writeTrue(b, file) {
		b.Skip("no program for " + runtime.GOARCH)
	}
	content, err := os.ReadFile(file)
	if err != nil {
		b.Fatal(err)
	}
	h, _ := newMachineHost(b)
	if _, err := h.createMachine(b.Context(), "machine", &agentv1.SandboxSpec{}); err != nil {
		b.Fatal(err)
	}
	h.createBench(b, "container", &agentv1.SandboxSpec{Command: []string{"sleep"}})
	names := []string{"machine", "container"}
	for _, name := range names {
		h.writeProgram(b, name, "/tmp/true", content)
	}
	took := map[string]samples{}
	for b.Loop() {
		for _, name := range names {
			took[name] = append(took[name], timed(b, func() error { return h.exec(b.Context(), name, "/tmp/true") }))
		}
	}
	b.ReportMetric(0, "ns/op")
	for _, name := range names {
		b.ReportMetric(milliseconds(took[name].at(50)), name+"-p50-ms")
	}
	b.ReportMetric(float64(took["machine"].at(50))/float64(took["container"].at(50)), "machine/container")
}

// writeProgram makes an executable file inside.
func (h *crashHost) writeProgram(b *testing.B, name, path string, content []byte) {
	b.Helper()
	call, err := agentv1.NewFileServiceClient(h.conn).WriteFile(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	header := &agentv1.WriteFileHeader{Name: name, Path: path, Mode: new(uint32(0o755))}
	_ = call.Send(&agentv1.WriteFileRequest{Message: &agentv1.WriteFileRequest_Header{Header: header}}) // CloseAndRecv has the error
	_ = call.Send(&agentv1.WriteFileRequest{Message: &agentv1.WriteFileRequest_Data{Data: content}})
	if _, err := call.CloseAndRecv(); err != nil {
		b.Fatal(err)
	}
}

// machineWays are the ways to an echoing program: in a machine through the
// agent's forward, in the same machine over vsock through its shim and nothing
// else, and in a container through the same agent's forward.
func machineWays(b *testing.B) (names []string, dial map[string]func() (net.Conn, error)) {
	b.Helper()
	const vsockPort = 7001
	h, drv := newMachineHost(b)
	made, err := h.createMachine(b.Context(), "machine", &agentv1.SandboxSpec{
		Command:   []string{"listen", "127.0.0.1:7000"},
		Ports:     []*agentv1.Port{{GuestPort: 7000}},
		Readiness: &agentv1.Readiness{Probe: &agentv1.Readiness_Tcp{Tcp: &agentv1.TcpProbe{Port: 7000}}},
	})
	if err != nil {
		b.Fatal(err)
	}
	h.startDetached(b, "machine", "/workload", "guest-echo", "vsock", fmt.Sprint(vsockPort))
	ref := sandbox.Ref{ID: "machine", Dir: filepath.Join(h.state, "sandboxes", "machine")}
	container := h.createEcho(b)
	dial = map[string]func() (net.Conn, error){
		"forward": func() (net.Conn, error) { return dialEcho(b.Context(), endpoint(made, 7000)) },
		"vsock": func() (net.Conn, error) {
			conn, err := drv.Dial(b.Context(), ref, vsockPort)
			if err != nil {
				return nil, err
			}
			return conn, conn.SetDeadline(time.Now().Add(time.Minute))
		},
		"container": func() (net.Conn, error) { return dialEcho(b.Context(), container) },
	}
	names = []string{"forward", "vsock", "container"}
	for _, name := range names {
		h.eventually(name+" echoes", func() error { return connectOnce(dial[name]) })
	}
	return names, dial
}

// startDetached starts a command inside and leaves it running.
func (h *crashHost) startDetached(b *testing.B, name string, command ...string) {
	b.Helper()
	call, err := agentv1.NewExecServiceClient(h.conn).Exec(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	start := &agentv1.ExecStart{Name: name, Command: command, NoStdin: true, Detached: true}
	_ = call.Send(&agentv1.ExecRequest{Message: &agentv1.ExecRequest_Start{Start: start}}) // Recv has the error
	if _, err := call.Recv(); err != nil {
		b.Fatal(err)
	}
}

// connectOnce makes a connection, has a byte echoed and ends it.
func connectOnce(dial func() (net.Conn, error)) error {
	conn, err := dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	return echoed(conn, make([]byte, 1))
}

// BenchmarkMachineConnect is a new connection into a machine, a byte there and
// back, and its end.
func BenchmarkMachineConnect(b *testing.B) {
	names, dial := machineWays(b)
	took := map[string]samples{}
	for b.Loop() {
		for _, name := range names {
			took[name] = append(took[name], timed(b, func() error { return connectOnce(dial[name]) }))
		}
	}
	b.ReportMetric(0, "ns/op")
	median := map[string]float64{}
	for name, s := range took {
		median[name] = milliseconds(s.at(50))
		b.ReportMetric(median[name], name+"-p50-ms")
	}
	b.ReportMetric(median["forward"]/median["vsock"], "forward/vsock")
	b.ReportMetric(median["forward"]/median["container"], "machine/container")
}

// BenchmarkMachineBulk is data into a machine and back over one connection; its
// rate is that of one direction, with the other one as busy.
func BenchmarkMachineBulk(b *testing.B) {
	names, dial := machineWays(b)
	conns := map[string]net.Conn{}
	for _, name := range names {
		conn, err := dial[name]()
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		conns[name] = conn
	}
	const size = 4 << 20
	took := map[string]samples{}
	for b.Loop() {
		for _, name := range names {
			took[name] = append(took[name], timed(b, func() error { return bulk(conns[name], size) }))
		}
	}
	b.ReportMetric(0, "ns/op")
	rate := map[string]float64{}
	for name, s := range took {
		rate[name] = size / 1e6 / s.at(50).Seconds()
		b.ReportMetric(rate[name], name+"-MB/s")
	}
	b.ReportMetric(rate["forward"]/rate["vsock"], "forward/vsock")
	b.ReportMetric(rate["forward"]/rate["container"], "machine/container")
}
