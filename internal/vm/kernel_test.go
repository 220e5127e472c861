package vm

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"

	"github.com/choiros/agent/internal/sandbox"
)

// marked is a file of zeros with marks at their offsets.
func marked(marks map[int]string) []byte {
	file := make([]byte, 4096)
	for offset, mark := range marks {
		copy(file[offset:], mark)
	}
	return file
}

// efiKernel is an EFI program that has 4096 bytes packed in it from byte 65536 on.
func efiKernel(how string) []byte {
	file := marked(map[int]string{0: "MZ", 4: "zimg", 24: how, 56: "\xcd\x23\x82\x81"})
	binary.LittleEndian.PutUint32(file[8:], 65536)
	binary.LittleEndian.PutUint32(file[12:], 4096)
	return file
}

func TestKernelThatDoesNotBootIsNamedWithItsCure(t *testing.T) {
	t.Parallel()
	const takeOut = "; take that out with tail -c +65537 | head -c 4096 | "
	type want struct{ arm64, amd64 string } // empty: it boots
	for name, tc := range map[string]struct {
		file []byte
		want want
	}{
		"Image":               {marked(map[int]string{56: "ARM\x64"}), want{"", "is not a bzImage for amd64: it is an Image for arm64"}},
		"Image for EFI too":   {marked(map[int]string{0: "MZ", 56: "ARM\x64"}), want{"", "is not a bzImage for amd64: it is an Image for arm64"}},
		"bzImage":             {marked(map[int]string{0: "MZ", 0x202: "HdrS"}), want{"is a bzImage for amd64", ""}},
		"gzip":                {marked(map[int]string{0: "\x1f\x8b\x08"}), want{"is not an uncompressed Image for arm64: it is compressed with gzip; unpack it with gzip -dc", "is compressed with gzip"}},
		"zstd":                {marked(map[int]string{0: "\x28\xb5\x2f\xfd"}), want{"; unpack it with zstd -dc", "zstd"}},
		"xz":                  {marked(map[int]string{0: "\xfd7zXZ\x00"}), want{"; unpack it with xz -dc", "xz"}},
		"lz4 of the kernel's": {marked(map[int]string{0: "\x02\x21\x4c\x18"}), want{"; unpack it with lz4 -dc", "lz4"}},
		"lz4 frames":          {marked(map[int]string{0: "\x04\x22\x4d\x18"}), want{"; unpack it with lz4 -dc", "lz4"}},
		"lzma":                {marked(map[int]string{0: "\x5d\x00\x00\x80"}), want{"; unpack it with xz -dc --format=lzma", "lzma"}},
		"bzip2":               {marked(map[int]string{0: "BZh9"}), want{"; unpack it with bzip2 -dc", "bzip2"}},
		"lzo":                 {marked(map[int]string{0: "\x89LZO\x00\r\n\x1a\n"}), want{"; unpack it with lzop -dc", "lzo"}},
		"EFI with gzip":       {efiKernel("gzip"), want{"is not an uncompressed Image for arm64: it is an EFI program with the Image packed in it with gzip" + takeOut + "gzip -dc", "is an EFI program"}},
		"EFI with zstd":       {efiKernel("zstd22"), want{takeOut + "zstd -dc", "is an EFI program"}},
		"EFI with xz":         {efiKernel("xzkern"), want{takeOut + "xz -dc", "is an EFI program"}},
		"EFI with lz4":        {efiKernel("lz4"), want{takeOut + "lz4 -dc", "is an EFI program"}},
		"EFI with lzma":       {efiKernel("lzma"), want{takeOut + "xz -dc --format=lzma", "is an EFI program"}},
		"EFI with no name":    {efiKernel("\x1b[2J"), want{"is an EFI program with the Image packed in it", "is an EFI program"}},
		"EFI, truncated":      {efiKernel("gzip")[:30], want{"is an EFI program that is no kernel's", "is an EFI program"}},
		"another EFI program": {marked(map[int]string{0: "MZ"}), want{"is an EFI program that is no kernel's", "is an EFI program"}},
		"ELF":                 {marked(map[int]string{0: "\x7fELF"}), want{"; take arch/arm64/boot/Image of the same build", "; take arch/x86/boot/bzImage of the same build"}},
		"script":              {[]byte("#!/bin/sh\n"), want{"is no kernel in a format that is known here", "is no kernel"}},
		"mark cut short":      {marked(map[int]string{56: "ARM\x64"})[:59], want{"is no kernel in a format that is known here", "is no kernel"}},
		"nothing":             {nil, want{"is empty", "is empty"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "kernel")
			if err := os.WriteFile(path, tc.file, 0o600); err != nil {
				t.Fatal(err)
			}
			for arch, want := range map[string]string{"arm64": tc.want.arm64, "amd64": tc.want.amd64} {
				_, err := ReadKernel(path, arch)
				if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "kernel "+path+" is not ")) {
					t.Errorf("for %s: %v, want %q", arch, err, want)
				}
			}
		})
	}
	if _, err := ReadKernel(filepath.Join(t.TempDir(), "absent"), "arm64"); err == nil {
		t.Error("a kernel that is not there boots")
	}
}

func TestKernelSaysHowLargeItsPagesAre(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "kernel")
	for flags, want := range map[string]int{"\x00": 0, "\x0a": 4, "\x0c": 16, "\x0e": 64, "\xf9\xff": 0} {
		if err := os.WriteFile(path, marked(map[int]string{24: flags, 56: "ARM\x64"}), 0o600); err != nil {
			t.Fatal(err)
		}
		if kernel, err := ReadKernel(path, "arm64"); err != nil || kernel.PageKiB != want {
			t.Errorf("flags %q: %d KiB, %v; want %d", flags, kernel.PageKiB, err, want)
		}
	}
}

func TestKernelThatIsNotAllThereIsRefused(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "kernel")
	check := func(file []byte, read func() error, want string) {
		t.Helper()
		if err := os.WriteFile(path, file, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := read(); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	bzImage := func() error {
		_, err := ReadKernel(path, "amd64")
		return err
	}
	const cut = "is not all there; make it anew"
	head := map[int]string{0x1f1: "\x02", 0x1f4: "\xa0\x00\x00\x00", 0x202: "HdrS"} // 3 sectors and 160 times 16 bytes
	check(marked(head), bzImage, "")
	check(marked(head)[:4095], bzImage, cut)
	head[0x1f4] = "\xff\xff\xff\xff"
	check(marked(head), bzImage, cut)

	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	vmlinux := func() error { return CheckVmlinux(path, "amd64") }
	check(program, vmlinux, "")
	check(program[:64], vmlinux, cut)
	check(marked(map[int]string{0x202: "HdrS"}), vmlinux, "is not an ELF file for amd64: it is a bzImage")
}

// TestBundleWithACompressedKernelIsRefused does so before anything is made.
func TestBundleWithACompressedKernelIsRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	manifest, err := json.Marshal(bundle{Arch: "arm64", Kernel: "Image.gz"})
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{bundleFile: manifest, "Image.gz": marked(map[int]string{0: "\x1f\x8b\x08"})} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d, err := New(DriverConfig{Root: filepath.Join(t.TempDir(), "vm"), Arch: "arm64", Bundles: filepath.Dir(dir)})
	if err != nil {
		t.Fatal(err)
	}
	ref := sandbox.Ref{ID: "packed", Dir: filepath.Join(t.TempDir(), "packed")}
	err = d.Create(t.Context(), ref, sandbox.Spec{Driver: "vm", Machine: filepath.Base(dir)})
	const problem = "is not an uncompressed Image for arm64: it is compressed with gzip; unpack it with gzip -dc"
	if field, ok := errors.AsType[*sandbox.FieldError](err); !ok || field.Field != "spec.machine" || !strings.Contains(field.Problem, problem) {
		t.Errorf("created: %v; want the field spec.machine, whose kernel %s", err, problem)
	}
	if _, err := os.Lstat(filepath.Join(d.cfg.Root, "boxes", ref.ID)); err == nil {
		t.Error("there is a box of what was refused")
	}
}

// FuzzKernel looks at heads of files of a stranger's. One boots or is refused,
// and what is said of it is one short line.
func FuzzKernel(f *testing.F) {
	f.Add(marked(map[int]string{56: "ARM\x64", 0x202: "HdrS"}))
	f.Add(efiKernel("gzip"))
	f.Add(efiKernel("zstd22\xff\x00\n"))
	f.Add([]byte("\x5d\x00\x00"))
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, head []byte) {
		found := kernelOf(head[:min(len(head), kernelHead)])
		if boots := len(head) >= 60 && bytes.Equal(head[56:60], []byte("ARM\x64")); boots != (found.form == kernelImage) {
			t.Errorf("%q is said to be %s", head, found.what)
		}
		for _, arch := range []string{"arm64", "amd64"} {
			said := found.what + found.cure(arch)
			if found.what == "" || len(said) > 200 || strings.ContainsFunc(said, func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("it says %q", said)
			}
		}
	})
}
