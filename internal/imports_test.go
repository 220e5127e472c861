// Package internal_test keeps the house in order: which folder may import
// which, as docs/architecture.md says.
package internal_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/choiros/agent"

// rules say what of this project each folder may import; "std" also that it
// may import nothing else but what is named with it. What is not here may import nothing of the project.
var rules = map[string][]string{
	"api/choiros/agent/v1":                {},
	"internal/sandbox":                    {"std"},
	"internal/sandbox/drivertest":         {"internal/guest", "internal/sandbox"},
	"internal/sandbox/drivertest/process": {"internal/guest/guestd", "internal/guest/wire", "internal/sandbox", "internal/shim"},
	"internal/secrets":                    {"internal/sandbox"},
	"internal/shim":                       {"std", "github.com/coreos/go-systemd/v22/dbus", "github.com/godbus/dbus/v5", "golang.org/x/sys/unix", "internal/sandbox"},
	"internal/store":                      {"std", "internal/sandbox"},
	"internal/account":                    {"std"},
	"internal/archive":                    {"std", "golang.org/x/sys/unix"},
	"api/choiros/guest/v1":                {},
	"internal/exposure":                   {"std"},
	"internal/hostclock":                  {"std", "golang.org/x/sys/unix"},
	"internal/guest":                      {"api/choiros/guest/v1", "internal/guest/wire", "internal/sandbox"},
	"internal/guest/wire":                 {"api/choiros/guest/v1"},
	"internal/guest/guestd":               {"api/choiros/guest/v1", "internal/guest/files", "internal/guest/machine", "internal/guest/reach", "internal/guest/usage", "internal/guest/wire", "internal/version"},
	"guest-kit":                           {"std", "github.com/klauspost/compress/zstd"},
	"cmd/guestd":                          {"internal/guest/guestd"},
	"internal/guest/files":                {"api/choiros/guest/v1", "internal/archive", "internal/guest/wire"},
	"internal/guest/lease":                {},
	"internal/guest/machine":              {"api/choiros/guest/v1", "internal/guest/lease"},
	"internal/guest/reach":                {"api/choiros/guest/v1", "internal/guest/wire"},
	"internal/guest/usage":                {"api/choiros/guest/v1", "internal/guest/wire"},
	"internal/manager":                    {"api/choiros/guest/v1", "internal/exposure", "internal/forward", "internal/guest", "internal/hostclock", "internal/sandbox", "internal/secrets", "internal/store"},
	"internal/server":                     {"api/choiros/agent/v1", "api/choiros/guest/v1", "internal/exposure", "internal/guest", "internal/manager", "internal/sandbox"},
	"internal/server/servertest":          {"api/choiros/agent/v1", "internal/sandbox"},
	"internal/container":                  {"internal/account", "internal/guest/wire", "internal/sandbox"},
	"internal/forward":                    {"internal/sandbox"},
	"internal/image":                      {"internal/sandbox"},
	"internal/kit":                        {"std", "internal/archive", "internal/sandbox"},
	"internal/location":                   {"std"},
	"internal/telemetry":                  {"internal/manager", "internal/sandbox"},
	"internal/version":                    {"std"},
	"internal/vm":                         {"api/choiros/guest/v1", "internal/account", "internal/guest/wire", "internal/image", "internal/sandbox", "internal/shim", "internal/vm/network"},
	"internal/vm/network":                 {"internal/sandbox"},
	"internal/vm/qemu":                    {"internal/vm", "internal/vm/qemu/vhost"},
	"internal/vm/qemu/vhost":              {"std", "golang.org/x/sys/unix"},
	"internal/vm/vz":                      {"internal/vm"},
	"internal/vm/vmtest":                  {"internal/image", "internal/sandbox", "internal/sandbox/drivertest", "internal/vm", "internal/vm/qemu", "internal/vm/qemu/vhost", "test/image"},
	"cmd/agent":                           {"*"},
	"cmd/agentctl":                        {"api/choiros/agent/v1", "internal/archive", "internal/kit", "internal/sandbox", "internal/location", "internal/version"},
	"test/image":                          {"*"},
	"test/image/cmd/mkimage":              {"*"},
	"test/workload":                       {"internal/guest/wire"},
}

func TestImports(t *testing.T) {
	t.Parallel()
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	err = filepath.WalkDir(root, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() && (strings.HasPrefix(entry.Name(), ".") || entry.Name() == "testdata" || entry.Name() == "tools") && file != root {
			return fs.SkipDir
		}
		if !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
			return nil
		}
		rel, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		seen[path.Dir(filepath.ToSlash(rel))] = true
		checkImports(t, file, filepath.ToSlash(rel))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(seen) < 8 {
		t.Fatalf("found only %v; is this still the project's folder?", seen)
	}
}

func checkImports(t *testing.T, file, rel string) {
	t.Helper()
	source, err := os.ReadFile(file)
	if err != nil {
		t.Error(err)
		return
	}
	parsed, err := parser.ParseFile(token.NewFileSet(), rel, source, parser.ImportsOnly)
	if err != nil {
		t.Error(err)
		return
	}
	allowed, known := rules[path.Dir(rel)]
	if !known {
		t.Errorf("%s: folder %s has no rule here", rel, path.Dir(rel))
		return
	}
	for _, spec := range parsed.Imports {
		name, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			t.Error(err)
			continue
		}
		if name == "C" && path.Dir(rel) != "internal/vm/vz" {
			t.Errorf("%s: cgo belongs in internal/vm/vz alone", rel)
		}
		ours, isOurs := strings.CutPrefix(name, module+"/")
		switch {
		case slices.Contains(allowed, "*"):
		case isOurs && !slices.Contains(allowed, ours):
			t.Errorf("%s may not import %s", rel, ours)
		case !isOurs && slices.Contains(allowed, "std") && strings.Contains(strings.Split(name, "/")[0], ".") && !slices.Contains(allowed, name):
			t.Errorf("%s may import the standard library alone, not %s", rel, name)
		}
	}
}
