package kit_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/kit"
	"github.com/choiros/agent/internal/sandbox"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func sumOf(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}

// files of a kit, by their names.
type files map[string]string

// whole is a kit for arm64 that nothing is wrong with.
func whole(version string) files {
	f := files{"kernel": "kernel " + version, "initramfs": strings.Repeat("initramfs ", 1000), "NOTICE": "sources"}
	f.describe("arm64", version, slices.Sorted(maps.Keys(f))...)
	return f
}

// describe writes guest.json about some of the files.
func (f files) describe(arch, version string, names ...string) {
	sums := map[string]string{}
	for _, name := range names {
		sums[name] = sumOf([]byte(f[name]))
	}
	text, err := json.Marshal(map[string]any{
		"arch": arch, "kernel": "kernel", "initrd": "initramfs", "kernel_version": version, "sha256": sums,
		"packages": map[string]string{"linux-image": version},
	})
	if err != nil {
		panic(err)
	}
	f["guest.json"] = string(text)
}

// headers are the files as an archive has them, in order.
func (f files) headers() []*tar.Header {
	var all []*tar.Header
	for _, name := range slices.Sorted(maps.Keys(f)) {
		all = append(all, &tar.Header{Typeflag: tar.TypeReg, Name: "guest-kit-arm64/" + name, Size: int64(len(f[name])), Mode: 0o600})
	}
	return all
}

// archive packs entries, with what files have for those of their name.
func (f files) archive(t *testing.T, headers ...*tar.Header) []byte {
	t.Helper()
	var out bytes.Buffer
	packed := gzip.NewWriter(&out)
	w := tar.NewWriter(packed)
	for _, header := range headers {
		check(t, w.WriteHeader(header))
		if header.Typeflag == tar.TypeReg {
			_, err := w.Write([]byte(f[filepath.Base(header.Name)]))
			check(t, err)
		}
	}
	check(t, errors.Join(w.Close(), packed.Close()))
	return out.Bytes()
}

// save writes an archive and its checksum as a release has them, and returns
// its path.
func save(t *testing.T, archive []byte) string {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "guest-kit-arm64.tar.gz")
	check(t, os.WriteFile(path, archive, 0o600))
	sums := fmt.Sprintf("%s  agentctl-linux-arm64\n%s *guest-kit-arm64.tar.gz\n", sumOf(nil), sumOf(archive))
	check(t, os.WriteFile(filepath.Join(dir, "SHA256SUMS"), []byte(sums), 0o600))
	return path
}

// kits is a folder of kits that there is not yet.
func kits(t *testing.T) string { return filepath.Join(t.TempDir(), "state", "guest-kit") }

// tree lists what is below a folder; nil if there is none.
func tree(t *testing.T, dir string) []string {
	t.Helper()
	var all []string
	check(t, filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) && path == dir {
			return nil
		}
		if err == nil && path != dir {
			all = append(all, strings.TrimPrefix(path, dir+"/")+" "+entry.Type().String())
		}
		return err
	}))
	return all
}

// installed reads what is at the place where an agent looks.
func installed(t *testing.T, dir string) files {
	t.Helper()
	got := files{}
	entries, err := os.ReadDir(filepath.Join(dir, "arm64") + "/")
	check(t, err)
	for _, entry := range entries {
		content, err := os.ReadFile(filepath.Join(dir, "arm64", entry.Name()))
		check(t, err)
		info, err := entry.Info()
		check(t, err)
		// A memory that was hibernated with another kit tells by the time.
		if info.Mode() != 0o644 || time.Since(info.ModTime()) > time.Hour {
			t.Errorf("%s has the mode %s and is of %s", entry.Name(), info.Mode(), info.ModTime())
		}
		got[entry.Name()] = string(content)
	}
	return got
}

func TestInstallPutsAKitWhereTheAgentLooks(t *testing.T) {
	t.Parallel()
	dir, f := kits(t), whole("6.12.1")
	archive := f.archive(t, f.headers()...)
	var done, of int64
	got, err := kit.Install(t.Context(), kit.Options{
		Source: save(t, archive), Dir: dir, Arch: "arm64", Progress: func(d, o int64) { done, of = d, o },
	})
	check(t, err)
	want := &kit.Installed{
		Path: filepath.Join(dir, "arm64"), Arch: "arm64", KernelVersion: "6.12.1", SHA256: sumOf(archive),
		Packages: map[string]string{"linux-image": "6.12.1"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(f, installed(t, dir)); diff != "" {
		t.Error(diff)
	}
	if length := int64(len(archive)); done != length || of != length {
		t.Errorf("progress ended with %d of %d, not %d", done, of, length)
	}
}

func TestInstallReplacesAKitAndLeavesNothingOfIt(t *testing.T) {
	t.Parallel()
	dir := kits(t)
	for _, version := range []string{"6.12.1", "6.12.2", "6.12.2"} {
		f := whole(version)
		_, err := kit.Install(t.Context(), kit.Options{Source: save(t, f.archive(t, f.headers()...)), Dir: dir, Arch: "arm64"})
		check(t, err)
		if diff := cmp.Diff(f, installed(t, dir)); diff != "" {
			t.Error(diff)
		}
		// What one that was killed leaves goes with the next.
		check(t, os.MkdirAll(filepath.Join(dir, "arm64-1234", "kernel"), 0o700))
		check(t, os.Symlink("arm64-1234", filepath.Join(dir, ".arm64-1234")))
		check(t, os.WriteFile(filepath.Join(dir, "arm64-archive-1"), nil, 0o600))
	}
	f := whole("6.12.3")
	_, err := kit.Install(t.Context(), kit.Options{Source: save(t, f.archive(t, f.headers()...)), Dir: dir, Arch: "arm64"})
	check(t, err)
	if got := tree(t, dir); len(got) != 2+len(f) {
		t.Errorf("there are %q", got)
	}
}

func TestInstallRefusesWhatIsNotAKit(t *testing.T) {
	t.Parallel()
	link := func(name, to string, kind byte) *tar.Header {
		return &tar.Header{Typeflag: kind, Name: "guest-kit-arm64/" + name, Linkname: to, Mode: 0o777}
	}
	reg := func(f files, name, content string) *tar.Header {
		f[filepath.Base(name)] = content
		return &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(content)), Mode: 0o644}
	}
	packed := func(change func(f files) []*tar.Header) func(*testing.T) []byte {
		return func(t *testing.T) []byte { f := whole("6.12.1"); return f.archive(t, change(f)...) }
	}
	for name, test := range map[string]struct {
		archive func(t *testing.T) []byte
		want    string
		is      error
	}{
		"empty": {func(*testing.T) []byte { return nil }, "it is not compressed with gzip", sandbox.ErrCorrupt},
		"text":  {func(*testing.T) []byte { return []byte("hello") }, "it is not compressed with gzip", sandbox.ErrCorrupt},
		"half": {func(t *testing.T) []byte {
			f := whole("1")
			f["kernel"] = strings.Join(strings.Split(fmt.Sprint(os.Environ()), ""), " ") // does not compress to nothing
			f.describe("arm64", "1", "kernel", "initramfs", "NOTICE")
			whole := f.archive(t, f.headers()...)
			return whole[:len(whole)/2]
		}, "unexpected EOF", sandbox.ErrCorrupt},
		"no tar": {func(t *testing.T) []byte {
			var out bytes.Buffer
			w := gzip.NewWriter(&out)
			_, err := w.Write(bytes.Repeat([]byte("hello"), 1000))
			check(t, errors.Join(err, w.Close()))
			return out.Bytes()
		}, "invalid tar header", sandbox.ErrCorrupt},
		"nothing in it": {packed(func(files) []*tar.Header { return nil }), "it has no guest.json", sandbox.ErrCorrupt},
		"no manifest": {packed(func(f files) []*tar.Header {
			delete(f, "guest.json")
			return f.headers()
		}), "it has no guest.json", sandbox.ErrCorrupt},
		"no JSON": {packed(func(f files) []*tar.Header {
			f["guest.json"] = "{"
			return f.headers()
		}), "guest.json: unexpected end of JSON input", sandbox.ErrCorrupt},
		"another architecture's": {packed(func(f files) []*tar.Header {
			f.describe("amd64", "1", "kernel", "initramfs", "NOTICE")
			return f.headers()
		}), `it is for "amd64", and machines here are arm64`, sandbox.ErrUnsupported},
		"no checksums": {packed(func(f files) []*tar.Header {
			f.describe("arm64", "1")
			return f.headers()
		}), "names no kernel and initrd with checksums", sandbox.ErrCorrupt},
		"a file too many": {packed(func(f files) []*tar.Header {
			f["profile"] = "hello"
			return f.headers()
		}), `it has "profile", which guest.json does not name`, sandbox.ErrCorrupt},
		"a file too few": {packed(func(f files) []*tar.Header {
			delete(f, "NOTICE")
			return f.headers()
		}), `guest.json names "NOTICE", which it lacks`, sandbox.ErrCorrupt},
		"a changed file": {packed(func(f files) []*tar.Header {
			f["kernel"] = "another"
			return f.headers()
		}), `the SHA-256 of "kernel" is `, sandbox.ErrCorrupt},
		"a name that leads out": {packed(func(f files) []*tar.Header {
			return append(f.headers(), reg(f, "guest-kit-arm64/../../outside", "x"))
		}), "leads out", sandbox.ErrCorrupt},
		"an absolute name": {packed(func(f files) []*tar.Header {
			return append(f.headers(), reg(f, "/tmp/outside", "x"))
		}), "is absolute", sandbox.ErrCorrupt},
		"a checksum for what is elsewhere": {packed(func(f files) []*tar.Header {
			f["../kernel"] = "x"
			f.describe("arm64", "1", "kernel", "initramfs", "NOTICE", "../kernel")
			delete(f, "../kernel")
			return f.headers()
		}), "which is no file of the folder", sandbox.ErrCorrupt},
		"a link": {packed(func(f files) []*tar.Header {
			delete(f, "NOTICE")
			return append(f.headers(), link("NOTICE", "kernel", tar.TypeSymlink))
		}), `"NOTICE" is not a regular file`, sandbox.ErrCorrupt},
		"a link for guest.json": {packed(func(f files) []*tar.Header {
			delete(f, "guest.json")
			return append(f.headers(), link("guest.json", "kernel", tar.TypeSymlink))
		}), "guest.json is not a regular file", sandbox.ErrCorrupt},
		"a link that leads out": {packed(func(f files) []*tar.Header {
			return append(f.headers(), link("out", "/etc/passwd", tar.TypeSymlink))
		}), "outside of what is unpacked", sandbox.ErrCorrupt},
		"a device": {packed(func(f files) []*tar.Header {
			return append(f.headers(), link("null", "", tar.TypeChar))
		}), "no file, folder or link", sandbox.ErrCorrupt},
		"a folder": {packed(func(f files) []*tar.Header {
			return append(f.headers(), reg(f, "guest-kit-arm64/sub/x", "x"))
		}), `"sub" is not a regular file`, sandbox.ErrCorrupt},
		"too many files": {packed(func(f files) []*tar.Header {
			headers := f.headers()
			for i := range 40 {
				headers = append(headers, reg(f, fmt.Sprintf("guest-kit-arm64/%d", i), "x"))
			}
			return headers
		}), "more than 32 files", sandbox.ErrCorrupt},
		"a bomb": {func(t *testing.T) []byte {
			var out bytes.Buffer
			packed := gzip.NewWriter(&out)
			check(t, tar.NewWriter(packed).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "guest-kit-arm64/kernel", Size: 1 << 40}))
			check(t, packed.Close())
			return out.Bytes()
		}, "more than 536870912 bytes", sandbox.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := kits(t)
			got, err := kit.Install(t.Context(), kit.Options{Source: save(t, test.archive(t)), Dir: dir, Arch: "arm64"})
			if err == nil || !errors.Is(err, test.is) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, error %v\nwant one with %q", got, err, test.want)
			}
			if left := tree(t, dir); left != nil {
				t.Errorf("it left %q", left)
			}
		})
	}
}

func TestInstallTakesNothingWithoutItsChecksum(t *testing.T) {
	t.Parallel()
	f := whole("6.12.1")
	archive := f.archive(t, f.headers()...)
	right, other := sumOf(archive), sumOf([]byte("another"))
	for name, test := range map[string]struct {
		sums, given string // sums is what is in SHA256SUMS; "-": there is none
		want        string // empty: it is installed
		is          error
	}{
		"given":              {"-", right, "", nil},
		"given in capitals":  {"-", strings.ToUpper(right), "", nil},
		"given, wrong":       {right + "  guest-kit-arm64.tar.gz", other, "should be " + other, sandbox.ErrCorrupt},
		"given, no checksum": {"-", "abc", `--sha256: "abc" is not 64 hexadecimal digits`, sandbox.ErrInvalid},
		"beside":             {"# sums\n\n" + other + "  x\n" + right + "  guest-kit-arm64.tar.gz\n", "", "", nil},
		"beside, wrong":      {other + "  guest-kit-arm64.tar.gz\n", "", "truncated, or another", sandbox.ErrCorrupt},
		"beside, no file":    {"-", "", "SHA256SUMS beside it cannot be had", sandbox.ErrNotFound},
		"beside, not in it":  {right + "  ./guest-kit-arm64.tar.gz\n" + right + " guest-kit-arm64.tar.gz", "", "no checksum for guest-kit-arm64.tar.gz", sandbox.ErrCorrupt},
		"beside, two":        {right + "  guest-kit-arm64.tar.gz\n" + other + "  guest-kit-arm64.tar.gz\n", "", "two checksums", sandbox.ErrCorrupt},
		"beside, garbage":    {strings.Repeat("x", 1<<20), "", "read SHA256SUMS", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path, dir := save(t, archive), kits(t)
			sums := filepath.Join(filepath.Dir(path), "SHA256SUMS")
			check(t, os.Remove(sums))
			if test.sums != "-" {
				check(t, os.WriteFile(sums, []byte(test.sums), 0o600))
			}
			_, err := kit.Install(t.Context(), kit.Options{Source: path, SHA256: test.given, Dir: dir, Arch: "arm64"})
			switch {
			case test.want == "" && err != nil:
				t.Error(err)
			case test.want == "":
				installed(t, dir)
			case err == nil || !strings.Contains(err.Error(), test.want) || test.is != nil && !errors.Is(err, test.is):
				t.Errorf("error %v\nwant one with %q", err, test.want)
			default:
				if left := tree(t, dir); left != nil {
					t.Errorf("it left %q", left)
				}
			}
		})
	}
}

func TestInstallKeepsTheKitThatIsThereIfItFails(t *testing.T) {
	t.Parallel()
	dir, f := kits(t), whole("6.12.1")
	_, err := kit.Install(t.Context(), kit.Options{Source: save(t, f.archive(t, f.headers()...)), Dir: dir, Arch: "arm64"})
	check(t, err)
	before := tree(t, dir)
	bad := whole("6.12.2")
	bad["kernel"] = "changed"
	if _, err := kit.Install(t.Context(), kit.Options{Source: save(t, bad.archive(t, bad.headers()...)), Dir: dir, Arch: "arm64"}); err == nil {
		t.Error("a bad kit was installed")
	}
	if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(f, installed(t, dir)); diff != "" {
		t.Error(diff)
	}
}

func TestInstallRefusesPlacesAndSources(t *testing.T) {
	t.Parallel()
	f := whole("6.12.1")
	good := save(t, f.archive(t, f.headers()...))
	taken := kits(t)
	check(t, os.MkdirAll(filepath.Join(taken, "arm64"), 0o700))
	for name, test := range map[string]struct {
		source, dir string
		want        string
		is          error
	}{
		"a folder of somebody's": {good, taken, "already exists and is no kit that was installed", sandbox.ErrExists},
		"no file":                {filepath.Join(filepath.Dir(good), "none"), kits(t), "no such file", nil},
		"a folder":               {filepath.Dir(good), kits(t), "SHA256SUMS beside it cannot be had", sandbox.ErrNotFound},
		"nothing":                {"", kits(t), "FILE: is empty", sandbox.ErrInvalid},
		"plain http":             {"http://127.0.0.1/x.tar.gz", kits(t), "URL: begins with http://; it must be https://", sandbox.ErrInvalid},
		"ftp":                    {"ftp://127.0.0.1/x.tar.gz", kits(t), "URL: begins with ftp://", sandbox.ErrInvalid},
		"no path":                {"https://127.0.0.1", kits(t), "URL: names no file", sandbox.ErrInvalid},
		"no host":                {"https:///x", kits(t), "URL: names no file", sandbox.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := kit.Install(t.Context(), kit.Options{Source: test.source, Dir: test.dir, Arch: "arm64"})
			if err == nil || !strings.Contains(err.Error(), test.want) || test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("error %v\nwant one with %q", err, test.want)
			}
		})
	}
	if _, err := kit.Install(t.Context(), kit.Options{Source: t.TempDir(), SHA256: sumOf(nil), Dir: kits(t), Arch: "arm64"}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("a folder for an archive: %v", err)
	}
}
