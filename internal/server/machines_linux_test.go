package server_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/secrets"
	"github.com/choiros/agent/internal/vm/vmtest"
	"github.com/choiros/agent/test/image"
)

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

func openMachines(t *testing.T, root string) sandbox.Driver {
	t.Helper()
	d, err := vmtest.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	return d
}
