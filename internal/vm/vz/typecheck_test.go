package vz_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Packages that are checked to the last line; of others, what they declare.
const (
	thisPackage = "github.com/choiros/agent/internal/vm/vz"
	vzPackage   = "github.com/Code-Hex/vz/v3"
	vzVersion   = "v3.7.1" // what docs/mac.md and the comments here speak of
)

// knownError is what go/types, which knows no C, has against vz: one package
// calls a function of another's whose result is of a C type.
const knownError = "objc.GetUUID"

// TestBindingFitsVZ type-checks what a Mac compiles, and only a Mac can,
// against the real vz.
func TestBindingFitsVZ(t *testing.T) {
	t.Parallel()
	for _, arch := range []string{"arm64", "amd64"} {
		t.Run(arch, func(t *testing.T) {
			t.Parallel()
			c := load(t, arch)
			for _, problem := range c.problems {
				t.Error(problem)
			}
			if !c.knownSeen {
				t.Errorf("nothing is wrong with %s in vz any more: take the exception away", knownError)
			}
			c.wantSocketField(t)
			c.wantSourcePort(t)
			if arch == "arm64" {
				c.wantMistakesNoticed(t)
			}
		})
	}
}

// wantSocketField looks for the field of vz's that newSocket takes.
func (c *checker) wantSocketField(t *testing.T) {
	object := c.done[vzPackage].Scope().Lookup("VirtioSocketConnection")
	if object == nil {
		t.Fatal("vz has no VirtioSocketConnection")
	}
	connection, ok := object.Type().Underlying().(*types.Struct)
	if !ok {
		t.Fatalf("VirtioSocketConnection is a %s", object.Type().Underlying())
	}
	for field := range connection.Fields() {
		if field.Name() == "rawConn" && field.Type().String() == "net.Conn" {
			return
		}
	}
	t.Errorf("VirtioSocketConnection is %s, and newSocket looks for rawConn net.Conn", connection)
}

// wantSourcePort looks for the method of vz's that sourcePort calls.
func (c *checker) wantSourcePort(t *testing.T) {
	connection := types.NewPointer(c.done[vzPackage].Scope().Lookup("VirtioSocketConnection").Type())
	method, _, _ := types.LookupFieldOrMethod(connection, false, nil, "SourcePort")
	if method == nil || method.Type().String() != "func() uint32" {
		t.Errorf("VirtioSocketConnection has %v, and sourcePort looks for SourcePort() uint32", method)
	}
}

// wantMistakesNoticed makes mistakes in the binding, one at a time, which are
// to be found: a check that finds nothing proves nothing.
func (c *checker) wantMistakesNoticed(t *testing.T) {
	for _, mistake := range []struct{ file, from, to string }{
		{"vz_darwin.go", "vz.NewLinuxBootLoader(b.Kernel, options...)", "vz.NewLinuxBootLoader(options...)"},
		{"vz_darwin.go", "SetBlockDeviceIdentifier(disk.Identifier)", "SetBlockDeviceIdentity(disk.Identifier)"},
		{"vz_darwin.go", "stateStopped-vz.VirtualMachineStateStopped", "stateStopped-vz.VirtualMachineStateRunning"},
		{"vz_darwin.go", "func (m macMachine) Start() error", "func (m macMachine) Begin() error"},
		{"framework.go", "SaveMachineStateToPath(path string) error", "SaveMachineStateToPath(path string) (bool, error)"},
		{"framework.go", "StateChangedNotify() <-chan state", "StateChangedNotify() <-chan int"},
	} {
		again := c.again(t, mistake.file, mistake.from, mistake.to)
		if len(again.problems) == 0 {
			t.Errorf("%s with %q in the stead of %q passes", mistake.file, mistake.to, mistake.from)
		}
	}
}

// listed is what go list says of a package.
type listed struct {
	ImportPath, Dir   string
	GoFiles, CgoFiles []string
	ImportMap         map[string]string
	Module            *struct{ Version, GoVersion string }
}

// checker checks packages in the order of their dependence.
type checker struct {
	arch      string
	files     *token.FileSet
	done      map[string]*types.Package
	this      listed
	problems  []error
	knownSeen bool
}

// load checks this package, and all that it depends on, as GOOS=darwin has
// them. It needs the modules' sources, from go mod download.
func load(t *testing.T, arch string) *checker {
	list := exec.CommandContext(t.Context(), "go", "list", "-deps", "-json=ImportPath,Dir,GoFiles,CgoFiles,ImportMap,Module", thisPackage)
	list.Env = append(os.Environ(), "GOOS=darwin", "GOARCH="+arch, "CGO_ENABLED=1")
	var said bytes.Buffer
	list.Stderr = &said
	out, err := list.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s; run go mod download, which gets what is missing", err, said.String())
	}
	c := &checker{arch: arch, files: token.NewFileSet(), done: map[string]*types.Package{"unsafe": types.Unsafe}}
	for decoder := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		switch p.ImportPath {
		case "unsafe":
			continue
		case vzPackage:
			if p.Module == nil || p.Module.Version != vzVersion {
				t.Fatalf("vz is %+v, not %s: read it anew", p.Module, vzVersion)
			}
		case thisPackage:
			c.this = p
			if !slices.Contains(p.GoFiles, "vz_darwin.go") {
				t.Fatalf("go list has no vz_darwin.go for a Mac: %v", p.GoFiles)
			}
		}
		c.check(p, nil)
	}
	if c.done[vzPackage] == nil || c.this.ImportPath == "" {
		t.Fatal("what was checked has no vz in it")
	}
	return c
}

// again checks this package alone, with something else in one file.
func (c *checker) again(t *testing.T, file, from, to string) *checker {
	source, err := os.ReadFile(filepath.Join(c.this.Dir, file))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(source, []byte(from)) {
		t.Fatalf("%s has no %q", file, from)
	}
	other := &checker{arch: c.arch, files: c.files, done: c.done}
	other.check(c.this, map[string][]byte{file: bytes.Replace(source, []byte(from), []byte(to), 1)})
	return other
}

// check checks one package. changed are files to be taken as they are there.
func (c *checker) check(p listed, changed map[string][]byte) {
	var files []*ast.File
	for _, name := range slices.Concat(p.GoFiles, p.CgoFiles) {
		var source any
		if text, ok := changed[name]; ok {
			source = text
		}
		file, err := parser.ParseFile(c.files, filepath.Join(p.Dir, name), source, parser.SkipObjectResolution)
		if err != nil {
			c.problems = append(c.problems, err)
			return
		}
		files = append(files, file)
	}
	config := types.Config{
		FakeImportC: true, Sizes: types.SizesFor("gc", c.arch), Importer: c.importer(p),
		IgnoreFuncBodies: p.ImportPath != thisPackage && p.ImportPath != vzPackage,
		Error: func(err error) {
			if p.ImportPath == vzPackage && strings.Contains(err.Error(), knownError) && !c.knownSeen {
				c.knownSeen = true
				return
			}
			c.problems = append(c.problems, err)
		},
	}
	if p.Module != nil && p.Module.GoVersion != "" {
		config.GoVersion = "go" + p.Module.GoVersion
	}
	checked, _ := config.Check(p.ImportPath, c.files, files, nil) // its errors went to Error
	if changed == nil {
		c.done[p.ImportPath] = checked
	}
}

type importerFunc func(path string) (*types.Package, error)

func (f importerFunc) Import(path string) (*types.Package, error) { return f(path) }

func (c *checker) importer(p listed) types.Importer {
	return importerFunc(func(path string) (*types.Package, error) {
		if mapped, ok := p.ImportMap[path]; ok {
			path = mapped
		}
		found, ok := c.done[path]
		if !ok {
			return nil, fmt.Errorf("%s imports %s, which go list has not listed before", p.ImportPath, path)
		}
		return found, nil
	})
}
