package vm_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/vm"
	"github.com/choiros/agent/internal/vm/vmtest"
	"github.com/choiros/agent/test/image"
)

// kitWith makes a guest kit that is like the real one, but for some files.
func kitWith(t *testing.T, files map[string][]byte) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"guest.json", "kernel", "vmlinux", "initramfs"} {
		path := filepath.Join(dir, name)
		content, other := files[name]
		var err error
		switch {
		case !other:
			err = os.Symlink(filepath.Join(image.KitDir(), name), path)
		case content != nil:
			err = os.WriteFile(path, content, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// ofKit reads a file of the real guest kit.
func ofKit(t *testing.T, name string) []byte {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(image.KitDir(), name))
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// withKit is a driver like d with another guest kit.
func withKit(t *testing.T, root, kit string) *vm.Driver {
	t.Helper()
	config, err := vmtest.Config(root, runtime.GOARCH)
	if err != nil {
		t.Fatal(err)
	}
	config.Kit = kit
	d, err := vm.New(config)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// cpioFile is an archive (newc, Documentation/driver-api/early-userspace/
// buffer-format.rst) with one file, which takes the place of one of the same
// name in an archive before it.
func cpioFile(name, content string) []byte {
	var out bytes.Buffer
	add := func(name, content string) {
		fmt.Fprintf(&out, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			0, 0o100644, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
		out.Write(make([]byte, -out.Len()&3))
		out.WriteString(content)
		out.Write(make([]byte, -out.Len()&3))
	}
	add(name, content)
	add("TRAILER!!!", "")
	return out.Bytes()
}

// badKernels boots one machine with one guest kit after another, each of which
// has something wrong.
func badKernels(t *testing.T, d *vm.Driver, root string) {
	if runtime.GOARCH != "amd64" {
		t.Skip("of an arm64 kernel there is less to see before it boots")
	}
	v := newVictim(t, d, root, "kernels", nil, "sleep")
	initramfs, vmlinux, kernel := ofKit(t, "initramfs"), ofKit(t, "vmlinux"), ofKit(t, "kernel")
	order := string(initramfs[bytes.Index(initramfs, []byte("channel ")):])
	order = order[:strings.IndexByte(order, 0)]
	var rest strings.Builder // all but what vsock needs
	for line := range strings.Lines(order) {
		if !strings.HasPrefix(line, "channel ") {
			rest.WriteString(line)
		}
	}
	withoutVmlinux := func(guest map[string]any) { delete(guest, "vmlinux") }
	for _, bad := range []struct {
		what   string
		files  map[string][]byte
		change func(guest map[string]any)
		// refusal is in Start's error; else the machine runs and ends, and
		// words are in the reason.
		refusal string
		words   []string
	}{
		{"missing", map[string][]byte{"kernel": nil}, nil, "kernel: no such file", nil},
		{"garbage", map[string][]byte{"vmlinux": bytes.Repeat([]byte("garbage "), 1<<10)}, nil, "is not an ELF file for amd64", nil},
		{"truncated", map[string][]byte{"vmlinux": vmlinux[:len(vmlinux)/2]}, nil, "is not all there; make it anew", nil},
		{"bzImage garbage", map[string][]byte{"kernel": make([]byte, 1<<20)}, withoutVmlinux, "is not a bzImage for amd64", nil},
		{"bzImage truncated", map[string][]byte{"kernel": kernel[:len(kernel)-4096]}, withoutVmlinux, "is not all there; make it anew", nil},
		{"bzImage of nothing", map[string][]byte{"kernel": kernel[:0x210]}, withoutVmlinux, "is not all there; make it anew", nil},
		{
			"no modules for vsock",
			map[string][]byte{"initramfs": slices.Concat(initramfs, cpioFile("modules/order", rest.String()))},
			nil,
			"",
			[]string{"the guest switched itself off before its guestd had called", "vsock", "make guest-kit"},
		},
		{
			"initramfs truncated",
			map[string][]byte{"initramfs": initramfs[:1<<20]},
			nil,
			"",
			[]string{"the guest ended with guest-reset before its guestd had called", "Kernel panic", "make guest-kit"},
		},
	} {
		t.Run(bad.what, func(t *testing.T) {
			v.T = t
			if bad.change != nil {
				guest := map[string]any{}
				if err := json.Unmarshal(ofKit(t, "guest.json"), &guest); err != nil {
					t.Fatal(err)
				}
				bad.change(guest)
				text, err := json.Marshal(guest)
				if err != nil {
					t.Fatal(err)
				}
				bad.files["guest.json"] = text
			}
			before := v.inspect()
			err := withKit(t, root, kitWith(t, bad.files)).Start(t.Context(), v.ref)
			if bad.refusal == "" {
				if err != nil {
					t.Fatal(err)
				}
				v.exited(137, bad.words...)
				return
			}
			if err == nil || !strings.Contains(err.Error(), bad.refusal) {
				t.Errorf("Start: %v; want %q in it", err, bad.refusal)
			}
			unavailable, ok := errors.AsType[*sandbox.UnavailableError](err)
			if bad.what == "missing" && (!ok || !strings.Contains(unavailable.Cure, "make guest-kit")) {
				t.Errorf("Start: %#v; want a cure in it", err)
			}
			if now := v.inspect(); now != before {
				t.Errorf("it was %+v, and is %+v", before, now)
			}
			vmtest.CheckNoProcess(t, v.box(""))
		})
	}
	v.T = t
	v.up()
	v.answers()
}
