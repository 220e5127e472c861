//go:build linux

package machine_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
	"github.com/choiros/agent/internal/image"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest"
	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/qemu"
	testimage "github.com/choiros/agent/test/image"
)

// limit is for a boot where the processor is emulated, on a machine that does
// other things, too.
const limit = 3 * time.Minute

// kit is the guest kit, and what it is run with.
type kit struct {
	kernel, vmlinux, initrd, cmdline string
	options                          qemu.Options
	workload                         []byte // test/workload
}

var prepare = sync.OnceValues(func() (*kit, error) {
	report, err := qemu.Probe(context.Background(), qemu.Options{})
	if err != nil {
		return nil, &sandbox.UnavailableError{Err: err}
	}
	for _, missing := range report.Missing {
		return nil, &sandbox.UnavailableError{Err: missing, Cure: missing.Cure}
	}
	dir, err := filepath.Abs(testimage.KitDir())
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(dir, "guest.json"))
	if err != nil {
		return nil, &sandbox.UnavailableError{Err: err, Cure: "make guest-kit"}
	}
	var manifest struct{ Kernel, Vmlinux, Initrd, Cmdline string }
	if err := json.Unmarshal(text, &manifest); err != nil {
		return nil, err
	}
	binary, err := testimage.Binary(context.Background())
	return &kit{
		kernel: filepath.Join(dir, manifest.Kernel), vmlinux: filepath.Join(dir, manifest.Vmlinux), initrd: filepath.Join(dir, manifest.Initrd),
		cmdline: manifest.Cmdline, options: qemu.Options{Accelerator: report.Accelerator}, workload: binary,
	}, err
})

func require(t testing.TB) *kit {
	t.Helper()
	k, err := prepare()
	if _, ok := errors.AsType[*sandbox.UnavailableError](err); ok {
		drivertest.Require(t, "qemu", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// Serials of the disks that tests give machines.
const (
	imageSerial = "image"
	layerSerial = "layer"
	dataSerial  = "data"
)

// setup is a machine that is yet to be switched on.
type setup struct {
	testing.TB
	dir    string
	config vm.Config
	plan   *guestv1.Machine
}

// newSetup is a machine of an image of these files beside the workload, which
// runs with args. What is written stays in its memory.
func newSetup(t testing.TB, files map[string]string, args ...string) *setup {
	t.Helper()
	k := require(t)
	dir, err := os.MkdirTemp("", "m-") // short: sockets are in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &setup{TB: t, dir: dir}
	s.config = vm.Config{
		Arch: runtime.GOARCH, CPUs: 1, MemoryMiB: 256,
		Kernel: k.kernel, Vmlinux: k.vmlinux, Initrd: k.initrd, Cmdline: k.cmdline,
		Disks: []vm.Disk{{Serial: imageSerial, Path: erofs(t, dir, k.workload, files), ReadOnly: true}},
	}
	s.plan = &guestv1.Machine{
		Protocol: wire.Protocol,
		Root:     &guestv1.Root{ImageSerial: imageSerial, ImageType: "erofs"},
		Workload: &guestv1.Workload{Command: append([]string{"/workload"}, args...)},
	}
	return s
}

// erofs writes an image's root file system. Files named with a slash at their
// end are folders.
func erofs(t testing.TB, dir string, workload []byte, files map[string]string) string {
	t.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	add := func(name string, mode int64, content string) {
		header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content))}
		if target, ok := strings.CutPrefix(content, "-> "); ok {
			header.Typeflag, header.Linkname, header.Size, content = tar.TypeSymlink, target, 0, ""
		}
		if strings.HasSuffix(name, "/") {
			header.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	add("workload", 0o755, string(workload))
	for _, name := range slices.Sorted(maps.Keys(files)) {
		add(name, 0o755, files[name])
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	packed, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	made, err := mutate.AppendLayers(empty.Image, packed)
	if err == nil {
		made, err = mutate.ConfigFile(made, &v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH, RootFS: rootFS(t, made)})
	}
	if err != nil {
		t.Fatal(err)
	}
	const reference = "localhost/test:latest"
	tag, err := name.NewTag(reference, name.WeakValidation)
	if err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := tarball.Write(tag, made, &archive); err != nil {
		t.Fatal(err)
	}
	store, err := image.Open(filepath.Join(dir, "images"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.LoadImage(t.Context(), &archive); err != nil {
		t.Fatal(err)
	}
	resolved, err := store.Resolve(t.Context(), reference, runtime.GOARCH)
	if err != nil {
		t.Fatal(err)
	}
	root, err := store.Root(t.Context(), resolved.Digest, nil)
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func rootFS(t testing.TB, made v1.Image) v1.RootFS {
	t.Helper()
	config, err := made.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	return config.RootFS
}

// disk gives the machine a blank disk, unless there is one of that serial from
// a boot before, and returns its path.
func (s *setup) disk(serial string, sizeMiB int64) string {
	s.Helper()
	path := filepath.Join(s.dir, serial+".img")
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		err = errors.Join(file.Truncate(sizeMiB<<20), file.Close())
	}
	if err != nil {
		s.Fatal(err)
	}
	disk := vm.Disk{Serial: serial, Path: path}
	if !slices.Contains(s.config.Disks, disk) {
		s.config.Disks = append(s.config.Disks, disk)
	}
	return path
}

// share gives the machine a folder of the host's, and returns its path.
func (s *setup) share(tag, target string, readOnly bool) string {
	s.Helper()
	path := filepath.Join(s.dir, tag)
	if err := os.Mkdir(path, 0o777); err != nil {
		s.Fatal(err)
	}
	s.config.Shares = append(s.config.Shares, vm.Share{Tag: tag, Path: path, ReadOnly: readOnly})
	s.plan.Shares = append(s.plan.Shares, &guestv1.Share{Tag: tag, Target: target, ReadOnly: readOnly})
	return path
}
