package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func archive(t *testing.T, spec Spec) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, []byte("binary"), spec); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// contents reads a tar to a map of names and contents.
func contents(t *testing.T, r io.Reader) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if !h.ModTime.IsZero() && h.ModTime.Unix() != 0 {
			t.Errorf("%s has the time %v", h.Name, h.ModTime)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name] = b
	}
}

func decode[T any](t *testing.T, b []byte) (v T) {
	t.Helper()
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatalf("%v in %q", err, b)
	}
	return v
}

func TestSameInputGivesSameBytes(t *testing.T) {
	t.Parallel()
	for _, format := range []Format{OCI, Docker} {
		spec := Spec{Name: RootName, Format: format}
		if !bytes.Equal(archive(t, spec), archive(t, spec)) {
			t.Errorf("%s: two archives of one image differ", format)
		}
	}
}

func TestOCIArchiveNamesImageAndUser(t *testing.T) {
	t.Parallel()
	files := contents(t, bytes.NewReader(archive(t, Spec{Name: UserName, User: "1000", Format: OCI})))
	blob := func(h v1.Hash) []byte { return files["blobs/"+h.Algorithm+"/"+h.Hex] }

	index := decode[v1.IndexManifest](t, files["index.json"])
	if len(index.Manifests) != 1 {
		t.Fatalf("%d manifests, want 1", len(index.Manifests))
	}
	if got := index.Manifests[0].Annotations["org.opencontainers.image.ref.name"]; got != UserName {
		t.Errorf("name %q, want %q", got, UserName)
	}
	manifest := decode[v1.Manifest](t, blob(index.Manifests[0].Digest))
	config := decode[v1.ConfigFile](t, blob(manifest.Config.Digest))
	want := v1.Config{
		User: "1000", Entrypoint: []string{"/workload"}, Cmd: []string{"sleep"},
		WorkingDir: "/", Env: []string{"PATH=/"},
	}
	if diff := cmp.Diff(want, config.Config); diff != "" {
		t.Errorf("config (-want +got):\n%s", diff)
	}
	if len(manifest.Layers) != 1 || blob(manifest.Layers[0].Digest) == nil {
		t.Errorf("layers %v, want one that is in the archive", manifest.Layers)
	}
}

func TestImageIsForItsArchitecture(t *testing.T) {
	t.Parallel()
	for arch, want := range map[string]string{"": runtime.GOARCH, "amd64": "amd64", "arm64": "arm64"} {
		files := contents(t, bytes.NewReader(archive(t, Spec{Name: RootName, Arch: arch, Format: OCI})))
		blob := func(h v1.Hash) []byte { return files["blobs/"+h.Algorithm+"/"+h.Hex] }
		manifest := decode[v1.Manifest](t, blob(decode[v1.IndexManifest](t, files["index.json"]).Manifests[0].Digest))
		config := decode[v1.ConfigFile](t, blob(manifest.Config.Digest))
		if config.OS != "linux" || config.Architecture != want {
			t.Errorf("for %q it is for %s/%s, want linux/%s", arch, config.OS, config.Architecture, want)
		}
	}
}

func TestKitOfAnotherArchitectureIsBesideTheHosts(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(KitEnv, filepath.Join(dir, "ours"))
	if got := KitDirFor(runtime.GOARCH); got != filepath.Join(dir, "ours") {
		t.Errorf("the host's is in %s", got)
	}
	if got := KitDirFor("other"); got != filepath.Join(dir, "other") {
		t.Errorf("the other is in %s", got)
	}
}

func TestDockerArchiveNamesImage(t *testing.T) {
	t.Parallel()
	files := contents(t, bytes.NewReader(archive(t, Spec{Name: RootName, Format: Docker})))
	manifest := decode[[]struct{ RepoTags []string }](t, files["manifest.json"])
	if len(manifest) != 1 || !slices.Equal(manifest[0].RepoTags, []string{RootName}) {
		t.Errorf("manifest %v, want the one name %s", manifest, RootName)
	}
}

func TestRootfsHoldsBinaryAndUsersFolders(t *testing.T) {
	t.Parallel()
	b, err := rootfs([]byte("binary"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for tr := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, h.FileInfo().Mode().String()+" "+h.Name)
		if owned := h.Uid == 1000 && h.Gid == 1000; owned != (h.Name == "data/") {
			t.Errorf("%s is owned by %d:%d", h.Name, h.Uid, h.Gid)
		}
	}
	want := []string{
		"drwxr-xr-x data/", "drwxr-xr-x etc/", "-rw-r--r-- etc/group", "-rw-r--r-- etc/passwd",
		"drwx------ root/", "dtrwxrwxrwx tmp/", "-rwxr-xr-x workload",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestUnknownFormatIsRefused(t *testing.T) {
	t.Parallel()
	err := Write(io.Discard, nil, Spec{Name: RootName, Format: "zip"})
	if err == nil || !strings.Contains(err.Error(), `"zip"`) {
		t.Errorf("got %v, want an error that names the format", err)
	}
}

func TestWriteFileLeavesNothingButTheFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "image.tar")
	for range 2 { // the second time over the first
		if err := WriteFile(path, []byte("binary"), Spec{Name: RootName, Format: OCI}); err != nil {
			t.Fatal(err)
		}
	}
	if err := WriteFile(filepath.Join(dir, "bad.tar"), nil, Spec{Name: RootName}); err == nil {
		t.Error("a spec without format: want an error")
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 || entries[0].Name() != "image.tar" {
		t.Errorf("left %v, want image.tar alone", entries)
	}
}

// A root that replaced /dev/null would break its machine.
func TestWriteFileDoesNotReplaceADevice(t *testing.T) {
	t.Parallel()
	// A FIFO stands for it: anyone may make one.
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	read := make(chan []byte, 1)
	go func() {
		b, _ := os.ReadFile(path)
		read <- b
	}()
	spec := Spec{Name: RootName, Format: OCI}
	if err := WriteFile(path, []byte("binary"), spec); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(<-read, archive(t, spec)) {
		t.Error("the archive did not come through the pipe")
	}
}

// TestPodmanLoadsAndRunsTheImages runs what it loaded under names of its own,
// so as not to disturb other tests' images.
func TestPodmanLoadsAndRunsTheImages(t *testing.T) {
	t.Parallel()
	if out, err := exec.CommandContext(t.Context(), "podman", "version").CombinedOutput(); err != nil || os.Getuid() == 0 {
		report := t.Skipf
		if slices.Contains(strings.Split(os.Getenv("AGENT_REQUIRE"), ","), "podman") {
			report = t.Fatalf
		}
		report("no rootless podman (%v: %s); try: test/env/podman-env up, then go test -exec 'test/env/podman-env exec'", err, out)
	}
	binary, err := Binary(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		spec Spec
		uid  string
	}{
		{"oci", Spec{Name: "localhost/choiros/image-test-oci:latest", Format: OCI}, "uid=0"},
		{"docker", Spec{Name: "localhost/choiros/image-test-docker:latest", Format: Docker, User: "1000"}, "uid=1000"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "image.tar")
			if err := WriteFile(file, binary, tc.spec); err != nil {
				t.Fatal(err)
			}
			podman(t, "load", "--quiet", "--input", file)
			out := podman(t, "run", "--rm", "--pull", "never", tc.spec.Name, "id")
			if got, _, _ := strings.Cut(out, "\n"); got != tc.uid {
				t.Errorf("ran as %s, want %s", got, tc.uid)
			}
			podman(t, "rmi", tc.spec.Name)
		})
	}
}

func podman(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "podman", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("podman %v: %v: %s", args, err, out)
	}
	return string(out)
}
