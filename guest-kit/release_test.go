package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestArchivesOfTheSameKitAreTheSame(t *testing.T) {
	t.Parallel()
	var archives [2][]byte
	for i := range archives {
		dir := t.TempDir()
		k := &kit{kernel: []byte("kernel"), initramfs: []byte("initramfs"), notice: []byte("notice")}
		k.manifest = manifest{Arch: "arm64", SHA256: map[string]string{kernelFile: "x", initramfsFile: "x", noticeFile: "x"}}
		if err := k.write(filepath.Join(dir, "kit")); err != nil {
			t.Fatal(err)
		}
		old := time.Unix(int64(i), 0)
		if err := os.Chtimes(filepath.Join(dir, "kit", kernelFile), old, old); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "kit", "other"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, "release", "kit.tar.gz")
		if err := writeArchive(filepath.Join(dir, "kit"), file); err != nil {
			t.Fatal(err)
		}
		var err error
		if archives[i], err = os.ReadFile(file); err != nil {
			t.Fatal(err)
		}
		if left, err := filepath.Glob(file + "?*"); err != nil || len(left) > 0 {
			t.Errorf("it left %q, %v", left, err)
		}
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("two archives of one kit differ")
	}
	plain, err := gzip.NewReader(bytes.NewReader(archives[0]))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for in := tar.NewReader(plain); ; {
		header, err := in.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, header.Name)
	}
	want := "guest-kit-arm64/guest.json guest-kit-arm64/NOTICE guest-kit-arm64/initramfs guest-kit-arm64/kernel"
	if got := strings.Join(names, " "); got != want {
		t.Errorf("it has %s", got)
	}
}

func TestArchiveOfAnIncompleteKitIsNotMade(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "kit.tar.gz")
	if err := writeArchive(dir, file); err == nil {
		t.Error("nothing was packed")
	}
	if err := os.WriteFile(filepath.Join(dir, manifestFile), []byte(`{"arch": "arm64", "sha256": {"kernel": "x"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeArchive(dir, file); err == nil {
		t.Error("a kit without its kernel was packed")
	}
	if left, err := filepath.Glob(file + "*"); err != nil || len(left) > 0 {
		t.Errorf("it left %q, %v", left, err)
	}
}

func TestSourcesOfPackages(t *testing.T) {
	t.Parallel()
	from := deb{Package: "linux-image-6.1-cloud-arm64", Version: "6.1-1"}
	for fields, want := range map[string]map[string]string{
		"":                {"linux-image-6.1-cloud-arm64": "6.1-1"},
		"Source: linux\n": {"linux": "6.1-1"},
		"Source: linux-signed-arm64 (6.1+1)\nBuilt-Using: linux (= 6.1-1), rust (= 2)\n": {"linux-signed-arm64": "6.1+1", "linux": "6.1-1", "rust": "2"},
	} {
		if got := sourcesOf(from, fields); !maps.Equal(got, want) {
			t.Errorf("%q: %v, not %v", fields, got, want)
		}
	}
}

func TestNoticeNamesTheSources(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat(licence); err != nil {
		t.Skipf("%v; try: a Debian, on which kits are built", err)
	}
	text, err := notice(deb{Package: "linux-image-x", Version: "6.1-1"}, "6.1-x", []byte("by Linus"), map[string]string{"linux": "6.1-1", "linux-signed": "6.1+1"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"linux-image-x 6.1-1", "\n    linux 6.1-1\n    linux-signed 6.1+1\n\n", "by Linus", "GNU GENERAL PUBLIC LICENSE"} {
		if !bytes.Contains(text, []byte(want)) {
			t.Errorf("%q is not in it:\n%.1500s", want, text)
		}
	}
}
