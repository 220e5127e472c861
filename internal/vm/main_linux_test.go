package vm_test

import (
	"os"
	"testing"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest"
	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/vmtest"
)

func TestMain(m *testing.M) {
	vmtest.Main()
	drivertest.VerbMain(func(root string) (sandbox.Driver, error) { return vmtest.Open(root) })
	os.Exit(m.Run())
}

func open(t *testing.T, root string) *vm.Driver {
	t.Helper()
	d, err := vmtest.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	return d
}
