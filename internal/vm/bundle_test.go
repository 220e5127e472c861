package vm

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/shim"
)

// bundleDir makes the folder of a bundle with a kernel, an initrd and two
// disks, and with this as its description.
func bundleDir(t *testing.T, description string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string]string{
		bundleFile: description, "kernel": string(marked(map[int]string{0x202: "HdrS"})),
		"initrd": "i", "root.img": "r", "sub/log": "l",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestBundleIsReadWithAbsolutePaths(t *testing.T) {
	t.Parallel()
	dir := bundleDir(t, `{"arch": "amd64", "kernel": "kernel", "initrd": "./initrd", "cmdline": "quiet", "later": 1, "disks": [
		{"file": "root.img", "serial": "root"}, {"file": "sub/log", "serial": "state", "writable": true}]}`)
	// As in a store of packages.
	link := filepath.Join(dir, "kernel")
	if err := errors.Join(os.Remove(link), os.Symlink(bundleDir(t, "")+"/kernel", link)); err != nil {
		t.Fatal(err)
	}
	got, err := readBundle(dir, "amd64")
	if err != nil {
		t.Fatal(err)
	}
	want := bundle{
		Arch: "amd64", Kernel: dir + "/kernel", Initrd: dir + "/initrd", Cmdline: "quiet",
		Disks: []bundleDisk{{File: dir + "/root.img", Serial: "root"}, {File: dir + "/sub/log", Serial: "state", Writable: true}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	// A copy is never in the place of something else that a box has.
	box := shim.Box{Dir: "/box"}
	if got := got.Disks[1].path(box); got != "/box/disk-state.img" {
		t.Errorf("the copy of sub/log is at %s", got)
	}
	if got := got.Disks[0].path(box); got != dir+"/root.img" {
		t.Errorf("what is read is at %s", got)
	}
}

func TestBundleThatIsNoneIsRefused(t *testing.T) {
	t.Parallel()
	const fine = `"arch": "amd64", "kernel": "kernel"`
	disks := func(list string) string { return `{` + fine + `, "disks": [` + list + `]}` }
	for name, tc := range map[string]struct{ description, want string }{
		"nothing":              {``, "unexpected end of JSON input"},
		"no JSON":              {`kernel=kernel`, "invalid character 'k'"},
		"half of it":           {`{` + fine, "unexpected end of JSON input"},
		"more behind it":       {`{` + fine + `} {}`, "after top-level value"},
		"another type":         {`{"kernel": 5}`, "kernel of type string"},
		"too long":             {`{` + fine + `}` + strings.Repeat(" ", maxBundleFile), "is longer than 1048576 bytes"},
		"no architecture":      {`{"kernel": "kernel"}`, `arch: it is for "", and guests here are amd64`},
		"another architecture": {`{"arch": "arm64", "kernel": "kernel"}`, `arch: it is for "arm64", and guests here are amd64`},
		"no kernel, nor disks": {`{"arch": "amd64"}`, "kernel: it names none, and no disks that a firmware could boot"},
		"an initrd alone":      {`{"arch": "amd64", "initrd": "initrd", "disks": [{"file": "root.img", "serial": "a"}]}`, "kernel: it names none, to which"},
		"a command line alone": {`{"arch": "amd64", "cmdline": "quiet", "disks": [{"file": "root.img", "serial": "a"}]}`, "kernel: it names none, to which"},
		"an absent kernel":     {`{"arch": "amd64", "kernel": "vmlinuz"}`, "kernel: stat "},
		"a folder":             {`{"arch": "amd64", "kernel": "sub"}`, "sub is not a regular file"},
		"what is no kernel":    {`{"arch": "amd64", "kernel": "initrd"}`, "no kernel in a format that is known here"},
		"a kernel outside":     {`{"arch": "amd64", "kernel": "../kernel"}`, `kernel: "../kernel" leads out of its folder`},
		"a way out and in":     {`{"arch": "amd64", "kernel": "sub/../../x/kernel"}`, "leads out of its folder"},
		"an absolute path":     {`{` + fine + `, "initrd": "/etc/passwd"}`, `initrd: "/etc/passwd" leads out of its folder`},
		"a vmlinux outside":    {`{` + fine + `, "vmlinux": ".."}`, `vmlinux: ".." leads out of its folder`},
		"an absent initrd":     {`{` + fine + `, "initrd": "x"}`, "initrd: stat "},
		"a zero byte":          {`{` + fine + `, "cmdline": "a\u0000b"}`, "cmdline: it has control characters"},
		"two lines":            {`{` + fine + `, "cmdline": "a\nb"}`, "cmdline: it has control characters"},
		"a long command line":  {`{` + fine + `, "cmdline": "` + strings.Repeat("x", maxCmdline+1) + `"}`, "cmdline: it is longer than 1920 bytes"},
		"a disk outside":       {disks(`{"file": "../root.img", "serial": "a"}`), `disks[0].file: "../root.img" leads out of its folder`},
		"no file of a disk":    {disks(`{"serial": "a"}`), "disks[0].file: it names none"},
		"an absent disk":       {disks(`{"file": "root.img", "serial": "a"}, {"file": "x", "serial": "b"}`), "disks[1].file: stat "},
		"a folder as a disk":   {disks(`{"file": "sub", "serial": "a"}`), "sub is not a regular file"},
		"no serial":            {disks(`{"file": "root.img"}`), `disks[0].serial: "" is not 1 to 20 of a-z, 0-9 and -`},
		"a serial of QEMU's":   {disks(`{"file": "root.img", "serial": "a,bootindex=1"}`), "is not 1 to 20"},
		"a path as a serial":   {disks(`{"file": "root.img", "serial": "../a", "writable": true}`), "is not 1 to 20"},
		"a long serial":        {disks(`{"file": "root.img", "serial": "` + strings.Repeat("a", 21) + `"}`), "is not 1 to 20"},
		"a serial twice":       {disks(`{"file": "root.img", "serial": "a"}, {"file": "root.img", "serial": "a"}`), "disks[1].serial: a is another disk's, too"},
		"a data disk's serial": {disks(`{"file": "root.img", "serial": "data0"}`), "disks[0].serial: data0 is one of the sandbox's own disks"},
		"too many disks":       {disks(strings.TrimSuffix(strings.Repeat(`{"file": "root.img", "serial": "a"},`, maxBundleDisks+1), ",")), "disks: 17 are more than 16"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := bundleDir(t, tc.description)
			if _, err := readBundle(dir, "amd64"); err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), dir) {
				t.Errorf("%v; want %q, and where", err, tc.want)
			}
		})
	}
}

// TestBundleThatItsFirmwareBoots is a machine where there is such a firmware,
// and refused before anything is made where there is none.
func TestBundleThatItsFirmwareBoots(t *testing.T) {
	t.Parallel()
	dir := bundleDir(t, `{"arch": "amd64", "disks": [{"file": "root.img", "serial": "root", "writable": true}]}`)
	ref := sandbox.Ref{ID: "efi", Dir: filepath.Join(t.TempDir(), "efi")}
	spec := sandbox.Spec{Driver: "vm", Machine: filepath.Base(dir), Resources: sandbox.Resources{CPUMillis: 1000}}
	for _, firmware := range []bool{false, true} {
		d, err := New(DriverConfig{Root: filepath.Join(t.TempDir(), "vm"), Arch: "amd64", Bundles: filepath.Dir(dir), Firmware: firmware})
		if err != nil {
			t.Fatal(err)
		}
		err = d.Create(t.Context(), ref, spec)
		if !firmware {
			field, ok := errors.AsType[*sandbox.FieldError](err)
			if !ok || field.Field != "spec.machine" || !strings.Contains(field.Problem, bundleFile+" names no kernel") {
				t.Errorf("created: %v; want the field spec.machine", err)
			}
			if _, err := os.Lstat(filepath.Join(d.cfg.Root, "boxes", ref.ID)); err == nil {
				t.Error("there is a box of what was refused")
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		box, err := d.boxes().Box(ref.ID)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.prepare(box); err != nil {
			t.Fatal(err)
		}
		var boot bundle
		if found, err := box.Load(bootRecord, &boot); !found || err != nil || boot.Kernel+boot.Initrd+boot.Cmdline != "" {
			t.Errorf("it boots %+v, %v", boot, err)
		}
		if copied, err := os.ReadFile(boot.Disks[0].path(box)); err != nil || string(copied) != "r" {
			t.Errorf("its disk is %q, %v", copied, err)
		}
	}
}

func TestKitWithoutAKernelIsNone(t *testing.T) {
	t.Parallel()
	d := &Driver{cfg: DriverConfig{
		Arch: "amd64", Firmware: true,
		Kit: bundleDir(t, `{"arch": "amd64", "disks": [{"file": "root.img", "serial": "a"}]}`),
	}}
	if kit, err := d.kit(); err == nil || !strings.Contains(err.Error(), "it has no kernel or no initrd") {
		t.Errorf("%+v, %v", kit, err)
	}
}

func TestBundleWithSomethingElseInItsPlace(t *testing.T) {
	t.Parallel()
	dir := bundleDir(t, "")
	file := filepath.Join(dir, bundleFile)
	for what, put := range map[string]func() error{
		"a folder":           func() error { return os.Mkdir(file, 0o700) },
		"nobody's FIFO":      func() error { return syscall.Mkfifo(file, 0o600) },
		"a device":           func() error { return os.Symlink("/dev/zero", file) },
		"a link in a circle": func() error { return os.Symlink(bundleFile, file) },
		"nothing":            func() error { return nil },
	} {
		if err := errors.Join(os.RemoveAll(file), put()); err != nil {
			t.Fatal(err)
		}
		_, err := readBundle(dir, "amd64")
		if err == nil || what == "nothing" && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", what, err)
		}
	}
	d := &Driver{cfg: DriverConfig{Arch: "amd64", Bundles: filepath.Dir(dir)}}
	for name, want := range map[string]string{
		filepath.Base(dir): bundleFile, "absent": "absent is no bundle in " + d.cfg.Bundles, dir: "is not of the form", "..": "is not of the form",
	} {
		err := d.Validate(t.Context(), sandbox.Spec{Machine: name})
		if field, ok := errors.AsType[*sandbox.FieldError](err); !ok || field.Field != "spec.machine" || !strings.Contains(err.Error(), want) {
			t.Errorf("machine %q: %v; want spec.machine: %s", name, err, want)
		}
	}
}
