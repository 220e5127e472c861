package image

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
)

// writeLayout writes a tar of an OCI image layout that holds img.
func writeLayout(w io.Writer, img v1.Image, name string) (err error) {
	dir, err := os.MkdirTemp("", "oci-layout")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	// The specification wants a bare tag here; podman, which is what this is
	// for, takes a full reference and names the loaded image so.
	err = path.AppendImage(img, layout.WithAnnotations(map[string]string{
		"org.opencontainers.image.ref.name": name,
	}))
	if err != nil {
		return err
	}
	return writeTree(w, os.DirFS(dir))
}

// writeTree writes a tar of the files in tree, in the order of their names, and
// with nothing of this machine in it.
func writeTree(w io.Writer, tree fs.FS) error {
	tw := tar.NewWriter(w)
	err := fs.WalkDir(tree, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == "." {
			return err
		}
		if d.IsDir() {
			return tw.WriteHeader(&tar.Header{
				Typeflag: tar.TypeDir, Name: path + "/", Mode: 0o755, ModTime: epoch(), Format: tar.FormatUSTAR,
			})
		}
		content, err := fs.ReadFile(tree, path)
		if err != nil {
			return err
		}
		if err := tw.WriteHeader(&tar.Header{
			Typeflag: tar.TypeReg, Name: path, Mode: 0o644, Size: int64(len(content)),
			ModTime: epoch(), Format: tar.FormatUSTAR,
		}); err != nil {
			return err
		}
		_, err = tw.Write(content)
		return err
	})
	if err != nil {
		return fmt.Errorf("write layout: %w", err)
	}
	return tw.Close()
}
