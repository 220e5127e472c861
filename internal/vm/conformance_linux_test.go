package vm_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest"
	"github.com/choiros/agent/internal/vm/vmtest"
	"github.com/choiros/agent/test/image"
)

func TestConformance(t *testing.T) {
	root := vmtest.Backend(t)
	drivertest.Run(t, drivertest.Harness{
		Open: func(t *testing.T) sandbox.Driver { return open(t, root) },
		OpenAs: func(t *testing.T, owner string) sandbox.Driver {
			return open(t, filepath.Join(filepath.Dir(root), owner))
		},
		Spec: func(_ *testing.T, w drivertest.Workload) sandbox.Spec {
			return sandbox.Spec{
				Driver: "vm", Image: image.RootName, Command: w.Args, Mounts: w.Mounts, Env: w.Env,
				Resources: vmtest.Resources(), DriverOptions: json.RawMessage(`{"disk_mib": 64}`),
			}
		},
		GuestDir: "vsock",
		Root:     "/tmp",
		Kill:     drivertest.VerbProcess(root),
		Leaks: func(t *testing.T, ref sandbox.Ref) {
			t.Helper()
			box := filepath.Join(root, "boxes", ref.ID)
			if _, err := os.Lstat(box); err == nil {
				t.Errorf("left: %s", box)
			}
			vmtest.CheckNoProcess(t, box)
		},
		Patience: 5 * time.Minute,
		Samples:  3,
	})
}
