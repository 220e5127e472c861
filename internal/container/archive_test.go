package container

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/test/image"
)

// archiveOf is an image's archive with some file as its program.
func archiveOf(t testing.TB, format image.Format) []byte {
	t.Helper()
	var b bytes.Buffer
	program := bytes.Repeat([]byte("a program\n"), 1000)
	if err := image.Write(&b, program, image.Spec{Name: "localhost/test:latest", Format: format}); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zipped(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, err := w.Write(data)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// entries returns the files of a tar archive, in order.
func entries(t testing.TB, archive []byte) (files []tarFile) {
	t.Helper()
	r := tar.NewReader(bytes.NewReader(archive))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, tarFile{*h, content})
	}
}

type tarFile struct {
	header  tar.Header
	content []byte
}

func tarOf(t testing.TB, files []tarFile) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		f.header.Size = int64(len(f.content))
		if err := w.WriteHeader(&f.header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestVerifyArchiveAcceptsImages(t *testing.T) {
	t.Parallel()
	for _, format := range []image.Format{image.OCI, image.Docker} {
		archive := archiveOf(t, format)
		for name, data := range map[string][]byte{"plain": archive, "gzip": zipped(t, archive)} {
			if err := verifyArchive(bytes.NewReader(data)); err != nil {
				t.Errorf("%s, %s: %v", format, name, err)
			}
			if err := verifyArchive(iotest.OneByteReader(bytes.NewReader(data))); err != nil {
				t.Errorf("%s, %s, byte by byte: %v", format, name, err)
			}
		}
	}
	// docker save of old writes layers as links.
	docker := entries(t, archiveOf(t, image.Docker))
	for i, f := range docker {
		if strings.Contains(f.header.Name, ".tar") {
			link := tarFile{tar.Header{Typeflag: tar.TypeSymlink, Name: f.header.Name, Linkname: "dir/../real"}, nil}
			docker[i].header.Name = "real"
			docker = append(docker, link)
			break
		}
	}
	if err := verifyArchive(bytes.NewReader(tarOf(t, docker))); err != nil {
		t.Errorf("a layer behind a link: %v", err)
	}
}

func wantCorrupt(t *testing.T, what string, err error) {
	t.Helper()
	var wrong *sandbox.FieldError
	if !errors.As(err, &wrong) || wrong.Field != archiveField || !errors.Is(err, sandbox.ErrCorrupt) {
		t.Errorf("%s: %v, want corrupt", what, err)
	}
}

func TestVerifyArchiveNoticesEveryCut(t *testing.T) {
	t.Parallel()
	for _, format := range []image.Format{image.OCI, image.Docker} {
		archive := archiveOf(t, format)
		// Of the two blocks of zeros at the end, one will do.
		end := len(archive) - 512
		for cut := 0; cut < end; cut += 97 {
			wantCorrupt(t, fmt.Sprintf("%s cut at %d of %d", format, cut, len(archive)), verifyArchive(bytes.NewReader(archive[:cut])))
		}
		packed := zipped(t, archive)
		for cut := 0; cut < len(packed); cut += 97 {
			wantCorrupt(t, fmt.Sprintf("zipped %s cut at %d of %d", format, cut, len(packed)), verifyArchive(bytes.NewReader(packed[:cut])))
		}
	}
}

func TestVerifyArchiveNoticesChangedContent(t *testing.T) {
	t.Parallel()
	for _, format := range []image.Format{image.OCI, image.Docker} {
		files := entries(t, archiveOf(t, format))
		for i, f := range files {
			if len(f.content) == 0 || f.header.Name == "oci-layout" || f.header.Name == "repositories" {
				continue
			}
			for _, at := range []int{0, len(f.content) / 2, len(f.content) - 2} {
				changed := append([]tarFile(nil), files...)
				changed[i].content = bytes.Clone(f.content)
				changed[i].content[at] ^= 0x20
				err := verifyArchive(bytes.NewReader(tarOf(t, changed)))
				switch {
				case format == image.OCI && f.header.Name == "index.json", format == image.Docker && strings.HasSuffix(f.header.Name, ".json"),
					format == image.Docker && strings.HasPrefix(f.header.Name, "sha256:"):
					// Names and times may be anything, and nothing says what
					// the content was.
				default:
					wantCorrupt(t, fmt.Sprintf("%s: %s changed at %d", format, f.header.Name, at), err)
				}
			}
			missing := append(append([]tarFile(nil), files[:i]...), files[i+1:]...)
			if err := verifyArchive(bytes.NewReader(tarOf(t, missing))); err == nil {
				t.Errorf("%s: without %s it passes", format, f.header.Name)
			}
			twice := append(append([]tarFile(nil), files...), f)
			wantCorrupt(t, fmt.Sprintf("%s: %s twice", format, f.header.Name), verifyArchive(bytes.NewReader(tarOf(t, twice))))
		}
	}
}

func TestVerifyArchiveRefusesOtherThings(t *testing.T) {
	t.Parallel()
	file := func(name, content string) []tarFile {
		return []tarFile{{tar.Header{Typeflag: tar.TypeReg, Name: name}, []byte(content)}}
	}
	for name, data := range map[string][]byte{
		"nothing":                  nil,
		"text":                     []byte(strings.Repeat("no archive at all\n", 100)),
		"some tar":                 tarOf(t, file("README", "hello")),
		"no images":                tarOf(t, file("manifest.json", "[]")),
		"malformed manifest.json":  tarOf(t, file("manifest.json", "[{")),
		"manifest.json of nothing": tarOf(t, file("manifest.json", `[{"Config":"x.json","Layers":["a"]}]`)),
		"index of nothing":         tarOf(t, file("index.json", `{"manifests":[{"digest":"sha256:00","size":1}]}`)),
		"a blob's name":            tarOf(t, file("blobs/sha256/"+strings.Repeat("0", 64), "x")),
		"gzip of text":             zipped(t, []byte("text")),
	} {
		wantCorrupt(t, name, verifyArchive(bytes.NewReader(data)))
	}
	for magic, program := range map[string]string{"\xfd7zXZ\x00": "xz", "\x28\xb5\x2f\xfd": "zstd", "BZh9": "bzip2"} {
		err := verifyArchive(strings.NewReader(magic + "rest"))
		if !errors.Is(err, sandbox.ErrUnsupported) || !strings.Contains(err.Error(), program+" -dc") {
			t.Errorf("%s: %v", program, err)
		}
	}
}

func TestVerifiedBodyEndsOnlyIfWhole(t *testing.T) {
	t.Parallel()
	archive := archiveOf(t, image.OCI)
	body := newVerifiedBody(bytes.NewReader(archive))
	passed, err := io.ReadAll(body)
	if err != nil || !bytes.Equal(passed, archive) {
		t.Errorf("%d bytes of %d, %v", len(passed), len(archive), err)
	}
	if err := body.finish(); err != nil {
		t.Errorf("finish: %v", err)
	}

	body = newVerifiedBody(bytes.NewReader(archive[:len(archive)/2]))
	_, err = io.ReadAll(body)
	wantCorrupt(t, "half", err)
	wantCorrupt(t, "half, at the end", body.finish())

	broken := errors.New("the client is gone")
	body = newVerifiedBody(io.MultiReader(bytes.NewReader(archive[:1000]), iotest.ErrReader(broken)))
	if _, err := io.ReadAll(body); !errors.Is(err, broken) || errors.Is(err, sandbox.ErrCorrupt) {
		t.Errorf("%v, want the reader's error", err)
	}

	// One that nobody reads, or not to the end, leaves nothing running.
	body = newVerifiedBody(bytes.NewReader(archive))
	if _, err := body.Read(make([]byte, 10)); err != nil {
		t.Error(err)
	}
	if err := body.finish(); err != nil {
		t.Errorf("finish of one not read: %v", err)
	}
	if _, err := body.Read(make([]byte, 10)); err == nil {
		t.Error("it can be read after its end")
	}
}

func FuzzVerifyArchive(f *testing.F) {
	for _, format := range []image.Format{image.OCI, image.Docker} {
		archive := archiveOf(f, format)
		f.Add(archive)
		f.Add(zipped(f, archive))
	}
	f.Add([]byte("index.json"))
	f.Fuzz(func(t *testing.T, data []byte) {
		err := verifyArchive(bytes.NewReader(data))
		var wrong *sandbox.FieldError
		if err != nil && !errors.As(err, &wrong) {
			t.Fatalf("%v is no *FieldError", err)
		}
	})
}
