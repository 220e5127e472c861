package server_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest"
	"github.com/choiros/agent/internal/secrets"
	"github.com/choiros/agent/internal/server/servertest"
	"github.com/choiros/agent/internal/vm/vmtest"
	"github.com/choiros/agent/test/image"
)

// TestContractOnMachines is the driver contract on virtual machines, reached the
// way that callers reach them.
func TestContractOnMachines(t *testing.T) {
	if testing.Short() {
		t.Skip("it boots machines")
	}
	root := vmtest.Backend(t)
	agent := startAgent(t, agentOptions{
		Drivers: func(string) map[string]sandbox.Driver { return map[string]sandbox.Driver{"vm": openMachines(t, root)} },
		Manager: manager.Config{MaxConcurrentBoots: 10},
	})
	conn := agent.Dial(t)
	drivertest.Run(t, drivertest.Harness{
		Open: func(*testing.T) sandbox.Driver { return servertest.NewExtended(conn, "vm") },
		Spec: func(_ *testing.T, w drivertest.Workload) sandbox.Spec {
			return sandbox.Spec{
				Driver: "vm", Image: image.RootName, Command: w.Args, Mounts: w.Mounts, Env: w.Env,
				Resources: vmtest.Resources(), DriverOptions: json.RawMessage(`{"disk_mib": 64}`),
				Readiness: sandbox.Readiness{Timeout: 5 * time.Minute},
			}
		},
		Leaks: func(t *testing.T, ref sandbox.Ref) {
			t.Helper()
			vmtest.CheckNoProcess(t, filepath.Join(root, "boxes", ref.ID))
		},
		Patience: 5 * time.Minute,
		Samples:  2, // the driver's own suite has more
		Without:  drivertest.Without{Dial: true, Configure: true},
	})
}

// TestSameImageGivesTheSameInContainerAndMachine runs one image with both
// drivers of one agent, and compares what its workload finds and what a
// client sees of it.
func TestSameImageGivesTheSameInContainerAndMachine(t *testing.T) {
	if testing.Short() {
		t.Skip("it boots machines")
	}
	root := vmtest.Backend(t)
	resolver, err := secrets.New(secrets.Config{})
	if err != nil {
		t.Fatal(err)
	}
	agent := startAgent(t, agentOptions{
		Drivers: func(owner string) map[string]sandbox.Driver {
			return map[string]sandbox.Driver{"podman": openPodman(t, owner, image.RootOCI, image.UserDocker), "vm": openMachines(t, root)}
		},
		Manager: manager.Config{Secrets: resolver},
	})
	conn := agent.Dial(t)
	client := agentv1.NewSandboxServiceClient(conn)
	type found struct {
		Code           map[string]codes.Code
		Stdout, Stderr map[string]string
		Exit           map[string]int32
	}
	commands := map[string][]string{
		"args": {"/workload", "args", "a b", "", "'"}, "environment": {"/workload", "env"}, "exit": {"/workload", "exit", "7"},
		"nothing": {"/absent"}, "user": {"/workload", "test-file", "/data/mine"}, "workspace": {"/workload", "touch", "/workspace/x"},
	}
	for _, name := range []string{image.RootName, image.UserName} {
		results := map[string]found{}
		for _, driver := range []string{"podman", "vm"} {
			data, workspace := t.TempDir(), t.TempDir()
			spec := &agentv1.SandboxSpec{
				Driver: driver, Source: &agentv1.SandboxSpec_Image{Image: name}, Command: []string{"write", "/data/mine", "here"},
				Env: map[string]string{"GIVEN": "one two"},
				Mounts: []*agentv1.Mount{
					{Kind: agentv1.Mount_KIND_DATA, Source: data}, {Kind: agentv1.Mount_KIND_WORKSPACE, Source: workspace},
				},
				Secrets: []*agentv1.SecretRef{{Name: "TOKEN", Source: "inline:t"}},
			}
			if driver == "vm" {
				spec.Resources = &agentv1.Resources{CpuMillis: 1000, MemoryMib: 192}
				spec.Readiness = &agentv1.Readiness{Timeout: durationpb.New(5 * time.Minute)}
			}
			if _, err := client.CreateSandbox(t.Context(), &agentv1.CreateSandboxRequest{
				Sandbox: &agentv1.Sandbox{Name: "same", Spec: spec}, Start: true,
				SecretValues: map[string][]byte{"t": []byte("hush")},
			}); err != nil {
				t.Fatalf("%s with %s: %v", name, driver, err)
			}
			// It runs once it has been started; it may be slow to do its work.
			for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
				if text, err := os.ReadFile(filepath.Join(data, "mine")); err == nil && string(text) == "here\n" {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("%s with %s did not write what it was told to", name, driver)
				}
			}
			f := found{map[string]codes.Code{}, map[string]string{}, map[string]string{}, map[string]int32{}}
			for what, command := range commands {
				r, err := exec(t, conn, &agentv1.ExecStart{Name: "same", Command: command, NoStdin: true}, nil)
				stdout := strings.ReplaceAll(r.stdout, "container=podman\n", "") // podman says who it is
				f.Code[what], f.Stdout[what], f.Stderr[what], f.Exit[what] = status.Code(err), stdout, r.stderr, r.exit.GetCode()
			}
			if _, err := client.DeleteSandbox(t.Context(), &agentv1.DeleteSandboxRequest{Name: "same"}); err != nil {
				t.Fatal(err)
			}
			results[driver] = f
		}
		if diff := cmp.Diff(results["podman"], results["vm"]); diff != "" {
			t.Errorf("%s in a container and in a machine:\n%s", name, diff)
		}
	}
}

// TestMachineHibernatesAndAConnectionWakesIt has what is in a machine's memory,
// and on its data disk, outlive its sleep, and its secret be nowhere on disk.
func TestMachineHibernatesAndAConnectionWakesIt(t *testing.T) {
	if testing.Short() {
		t.Skip("it boots machines")
	}
	root := vmtest.Backend(t)
	resolver, err := secrets.New(secrets.Config{})
	if err != nil {
		t.Fatal(err)
	}
	agent := startAgent(t, agentOptions{
		Drivers: func(string) map[string]sandbox.Driver { return map[string]sandbox.Driver{"vm": openMachines(t, root)} },
		Manager: manager.Config{Secrets: resolver},
	})
	conn := agent.Dial(t)
	client := agentv1.NewSandboxServiceClient(conn)
	options, err := structpb.NewStruct(map[string]any{"disk_mib": 64}) // for it is searched
	if err != nil {
		t.Fatal(err)
	}
	const canary = "canary-of-a-memory-that-was-saved"
	disks := t.TempDir()
	watch, err := client.WatchSandboxes(t.Context(), &agentv1.WatchSandboxesRequest{Name: "sleeper"})
	if err != nil {
		t.Fatal(err)
	}
	created, err := client.CreateSandbox(t.Context(), &agentv1.CreateSandboxRequest{
		Sandbox: &agentv1.Sandbox{Name: "sleeper", Spec: &agentv1.SandboxSpec{
			Driver: "vm", Source: &agentv1.SandboxSpec_Image{Image: image.RootName}, Command: []string{"listen", "127.0.0.1:8080"},
			Mounts:        []*agentv1.Mount{{Kind: agentv1.Mount_KIND_DISK, Source: filepath.Join(disks, "data.img"), Target: "/data", SizeMib: 64}},
			DriverOptions: options, SecretRotation: &agentv1.SecretRotation{Action: agentv1.SecretRotation_ACTION_RESTART},
			Secrets:   []*agentv1.SecretRef{{Name: "TOKEN", Source: "inline:t"}},
			Ports:     []*agentv1.Port{{GuestPort: 8080}},
			Resources: &agentv1.Resources{CpuMillis: 1000, MemoryMib: 192},
			Readiness: &agentv1.Readiness{
				Probe: &agentv1.Readiness_Tcp{Tcp: &agentv1.TcpProbe{Port: 8080}}, Timeout: durationpb.New(5 * time.Minute),
			},
		}},
		Start: true, SecretValues: map[string][]byte{"t": []byte(canary)},
	})
	if err != nil {
		t.Fatal(err)
	}
	// How far its boot was, people were told.
	said := map[string]bool{}
	for phase := agentv1.Phase_PHASE_UNSPECIFIED; phase != agentv1.Phase_PHASE_READY; {
		event, err := watch.Recv()
		if err != nil {
			t.Fatal(err)
		}
		phase = event.GetChanged().GetStatus().GetPhase()
		said[event.GetChanged().GetStatus().GetMessage()] = true
	}
	if !said["booting the kernel"] {
		t.Errorf("of its boot was said only %v", said)
	}
	address := created.GetSandbox().GetStatus().GetEndpoints()[0].GetAddress()
	say := func(what string) {
		t.Helper()
		// One that sleeps is woken, which may take longer than a client waits.
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(4 * time.Minute))
		heard := make([]byte, len(what))
		_, err = conn.Write([]byte(what))
		if err == nil {
			_, err = io.ReadFull(conn, heard)
		}
		if err != nil || string(heard) != what {
			t.Fatalf("said %q, heard %q, %v", what, heard, err)
		}
	}
	run := func(command ...string) string {
		t.Helper()
		r, err := exec(t, conn, &agentv1.ExecStart{Name: "sleeper", Command: command, NoStdin: true}, nil)
		if err != nil || r.exit.GetCode() != 0 {
			t.Fatalf("%q: %+v, %v", command, r, err)
		}
		return r.stdout
	}
	say("awake")
	run("/workload", "touch", "/dev/shm/memory")
	run("/workload", "touch", "/data/disk")

	hibernated, err := client.HibernateSandbox(t.Context(), &agentv1.HibernateSandboxRequest{Name: "sleeper", RequestId: "once"})
	if err != nil {
		t.Fatal(err)
	}
	if s := hibernated.GetSandbox().GetStatus(); s.GetPhase() != agentv1.Phase_PHASE_HIBERNATED || s.GetGeneration() != 1 {
		t.Errorf("hibernated: %v", s)
	}
	vmtest.CheckNoProcess(t, root)
	for _, dir := range []string{agent.Store.Dir(), filepath.Dir(root), disks} {
		if found := search(t, dir, canary); len(found) > 0 {
			t.Errorf("the secret is in %v", found)
		}
	}

	snapshot := func() (*agentv1.DiskSnapshot, error) {
		answer, err := client.CreateDiskSnapshot(t.Context(), &agentv1.CreateDiskSnapshotRequest{Name: "sleeper", Target: "/data"})
		return answer.GetSnapshot(), err
	}
	made, err := snapshot()
	if err != nil || made.GetSizeBytes() != 64<<20 {
		t.Errorf("a snapshot of the disk of one that sleeps: %v, %v", made, err)
	}

	say("woken")
	got, err := client.GetSandbox(t.Context(), &agentv1.GetSandboxRequest{Name: "sleeper"})
	if s := got.GetSandbox().GetStatus(); err != nil || s.GetPhase() != agentv1.Phase_PHASE_READY || s.GetGeneration() != 2 {
		t.Errorf("woken: %v, %v", s, err)
	}
	run("/workload", "test-file", "/dev/shm/memory")
	run("/workload", "test-file", "/data/disk")
	if env := run("/workload", "env", "TOKEN"); env != "TOKEN="+canary+"\n" {
		t.Errorf("its environment has %q", env)
	}
	// A retry is the request that was answered.
	if _, err := client.HibernateSandbox(t.Context(), &agentv1.HibernateSandboxRequest{Name: "sleeper", RequestId: "once"}); err != nil {
		t.Error(err)
	}
	say("not put to sleep again")

	// With other secrets, which are a reason to start it again, it does not go on.
	if _, err := client.HibernateSandbox(t.Context(), &agentv1.HibernateSandboxRequest{Name: "sleeper"}); err != nil {
		t.Fatal(err)
	}
	if _, err := agentv1.NewSecretServiceClient(conn).SetSecrets(t.Context(), &agentv1.SetSecretsRequest{
		Name: "sleeper", Values: map[string][]byte{"t": []byte("another")},
	}); err != nil {
		t.Fatal(err)
	}
	say("afresh")
	if env := run("/workload", "env", "TOKEN"); env != "TOKEN=another\n" {
		t.Errorf("its environment has %q", env)
	}
	if r, err := exec(t, conn, &agentv1.ExecStart{Name: "sleeper", Command: []string{"/workload", "test-file", "/dev/shm/memory"}, NoStdin: true}, nil); err != nil || r.exit.GetCode() != 1 {
		t.Errorf("its memory is as it was: %+v, %v", r, err)
	}
	run("/workload", "test-file", "/data/disk")
	if _, err := snapshot(); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a snapshot of a disk that is mounted: %v", err)
	}
	restore := func(id string) error {
		_, err := client.RestoreDiskSnapshot(t.Context(), &agentv1.RestoreDiskSnapshotRequest{Name: "sleeper", Snapshot: id})
		return err
	}
	if err := restore(made.GetId()); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a disk that is mounted was restored: %v", err)
	}
	if _, err := client.StopSandbox(t.Context(), &agentv1.StopSandboxRequest{Name: "sleeper"}); err != nil {
		t.Fatal(err)
	}
	listed, err := client.ListDiskSnapshots(t.Context(), &agentv1.ListDiskSnapshotsRequest{Name: "sleeper"})
	if diff := cmp.Diff([]*agentv1.DiskSnapshot{made}, listed.GetSnapshots(), protocmp.Transform()); err != nil || diff != "" {
		t.Errorf("snapshots, %v (-want +got):\n%s", err, diff)
	}
	for id, want := range map[string]codes.Code{made.GetId(): codes.OK, "": codes.InvalidArgument, "another": codes.InvalidArgument} {
		if err := restore(id); status.Code(err) != want {
			t.Errorf("restore %q: %v; want %v", id, err, want)
		}
	}
	if _, err := client.DeleteSandbox(t.Context(), &agentv1.DeleteSandboxRequest{Name: "sleeper"}); err != nil {
		t.Fatal(err)
	}
}

// search returns the files below dir in which text is.
func search(t *testing.T, dir, text string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		file, err := os.Open(path)
		if err != nil {
			return err
		}
		defer file.Close()
		// Blocks that overlap, so that it is found wherever it is.
		block, kept := make([]byte, 1<<20), 0
		for {
			n, err := file.Read(block[kept:])
			if bytes.Contains(block[:kept+n], []byte(text)) {
				found = append(found, path)
				return nil
			}
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			kept = copy(block, block[max(0, kept+n-len(text)):kept+n])
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func openMachines(t *testing.T, root string) sandbox.Driver {
	t.Helper()
	d, err := vmtest.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	return d
}
