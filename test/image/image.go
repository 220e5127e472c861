// Package image makes the project's own test images: the static binary of
// test/workload and next to nothing else, as archives for `podman load`. There
// is no registry in it and no container engine: it pulls nothing and runs
// nothing but the Go toolchain.
//
// The same sources give the same bytes, so an image's digest changes only with
// its content.
package image

import (
	"archive/tar"
	"bytes"
	"cmp"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// The names of the two images for the host's architecture: one runs as root,
// one as USER 1000.
const (
	RootName = "localhost/choiros/workload:latest"
	UserName = "localhost/choiros/workload-user:latest"
)

// ArchName is the name of the image for an architecture, which runs as root.
func ArchName(arch string) string { return "localhost/choiros/workload-" + arch + ":latest" }

// Format is how an archive is laid out.
type Format string

// The formats that `podman load` and `docker load` read.
const (
	OCI    Format = "oci"    // a tar of an OCI image layout
	Docker Format = "docker" // what `docker save` writes
)

// Spec says which image to make.
type Spec struct {
	Name   string // full reference, with registry and tag
	User   string // the image's USER; "" is root
	Arch   string // GOARCH; "" is the host's
	Format Format
}

// Write writes the archive of the image in which binary, a static Linux
// executable of the image's architecture, is /workload and the entrypoint.
func Write(w io.Writer, binary []byte, spec Spec) error {
	img, err := build(binary, spec)
	if err != nil {
		return fmt.Errorf("image %s: %w", spec.Name, err)
	}
	switch spec.Format {
	case OCI:
		err = writeLayout(w, img, spec.Name)
	case Docker:
		err = writeDocker(w, img, spec.Name)
	default:
		err = fmt.Errorf("unknown format %q (%s or %s)", spec.Format, OCI, Docker)
	}
	if err != nil {
		return fmt.Errorf("image %s: %w", spec.Name, err)
	}
	return nil
}

func writeDocker(w io.Writer, img v1.Image, reference string) error {
	// Not strictly: the parser takes "localhost", with neither dot nor port, for
	// a part of a Docker Hub name. The archive gets the reference as it is.
	tag, err := name.NewTag(reference, name.WeakValidation)
	if err != nil {
		return err
	}
	return tarball.Write(tag, img, w)
}

func build(binary []byte, spec Spec) (v1.Image, error) {
	files, err := rootfs(binary)
	if err != nil {
		return nil, err
	}
	// Docker archives hold layers uncompressed or gzipped alike; OCI ones name
	// the compression in the media type.
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(files)), nil
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err = mutate.Append(img, mutate.Addendum{
		Layer:   layer,
		History: v1.History{Created: v1.Time{Time: epoch()}, CreatedBy: "test/image"},
	})
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.Created = v1.Time{Time: epoch()}
	config.OS, config.Architecture = "linux", cmp.Or(spec.Arch, runtime.GOARCH)
	config.Config = v1.Config{
		Entrypoint: []string{"/workload"},
		Cmd:        []string{"sleep"},
		User:       spec.User,
		WorkingDir: "/",
		Env:        []string{"PATH=/"},
	}
	return mutate.ConfigFile(img, config)
}

// rootfs is the one layer, uncompressed.
func rootfs(binary []byte) ([]byte, error) {
	const app = 1000
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range []struct {
		name    string
		mode    int64
		owner   int
		content []byte // nil for a folder
	}{
		{"data/", 0o755, app, nil},
		{"etc/", 0o755, 0, nil},
		{"etc/group", 0o644, 0, []byte("root:x:0:\napp:x:1000:\n")},
		{"etc/passwd", 0o644, 0, []byte("root:x:0:0:root:/root:/workload\napp:x:1000:1000:app:/data:/workload\n")},
		{"root/", 0o700, 0, nil},
		{"tmp/", 0o1777, 0, nil},
		{"workload", 0o755, 0, binary},
	} {
		h := &tar.Header{
			Typeflag: tar.TypeReg, Name: f.name, Mode: f.mode, Uid: f.owner, Gid: f.owner,
			Size: int64(len(f.content)), ModTime: epoch(), Format: tar.FormatUSTAR,
		}
		if f.content == nil {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.content); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// epoch is the time of everything in an image.
func epoch() time.Time { return time.Unix(0, 0).UTC() }
