package kit

import (
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/choiros/agent/internal/archive"
	"github.com/choiros/agent/internal/sandbox"
)

const (
	// manifestFile says what the other files of a kit are.
	manifestFile = "guest.json"
	// maxManifest bounds what is read of it, in bytes.
	maxManifest = 1 << 20
)

// manifest is of guest.json what is looked at here. What boots is looked at
// again when it is to boot.
type manifest struct {
	Arch          string            `json:"arch"`
	Kernel        string            `json:"kernel"`
	Initrd        string            `json:"initrd"`
	KernelVersion string            `json:"kernel_version"`
	SHA256        map[string]string `json:"sha256"`
	Packages      map[string]string `json:"packages"`
}

// unpack puts what an archive has below its one folder into another.
func unpack(ctx context.Context, from io.Reader, dir string) error {
	plain, err := gzip.NewReader(from)
	if err != nil {
		return notAKit("it is not compressed with gzip: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	_, err = archive.Unpack(ctx, plain, root, archive.UnpackOptions{Rename: ".", MaxBytes: maxKit, MaxFiles: maxFiles})
	if err == nil || ctx.Err() != nil || !fromArchive(err) {
		return err
	}
	return notAKit("%w", err)
}

// fromArchive reports whether it is the archive that is at fault, and not the
// disk that it is unpacked on.
func fromArchive(err error) bool {
	_, disk := errors.AsType[*os.PathError](err)
	return !disk || errors.Is(err, archive.ErrRefused)
}

func notAKit(format string, args ...any) error {
	return fmt.Errorf("%w: not a guest kit: %w", sandbox.ErrCorrupt, fmt.Errorf(format, args...))
}

// verify sees that a folder has a kit for an architecture, whole, and nothing
// else, and that all of it is on the disk.
func verify(dir, arch string) (manifest, error) {
	m, err := readManifest(filepath.Join(dir, manifestFile))
	if err != nil {
		return m, err
	}
	switch {
	case m.Arch != arch:
		return m, fmt.Errorf("it is for %q, and machines here are %s: %w", m.Arch, arch, sandbox.ErrUnsupported)
	case m.SHA256[m.Kernel] == "" || m.SHA256[m.Initrd] == "":
		return m, notAKit("%s names no kernel and initrd with checksums", manifestFile)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return m, err
	}
	for _, entry := range entries {
		name := entry.Name()
		switch {
		case !entry.Type().IsRegular():
			return m, notAKit("%q is not a regular file", name)
		case name != manifestFile && m.SHA256[name] == "":
			return m, notAKit("it has %q, which %s does not name", name, manifestFile)
		}
	}
	for name, want := range m.SHA256 {
		if filepath.Base(name) != name || !filepath.IsLocal(name) {
			return m, notAKit("%s names %q, which is no file of the folder", manifestFile, name)
		}
		sum, err := settle(filepath.Join(dir, name))
		if errors.Is(err, os.ErrNotExist) {
			return m, notAKit("%s names %q, which it lacks", manifestFile, name)
		}
		if err != nil {
			return m, err
		}
		if sum != want {
			return m, notAKit("the SHA-256 of %q is %s and should be %s", name, sum, want)
		}
	}
	if _, err := settle(filepath.Join(dir, manifestFile)); err != nil {
		return m, err
	}
	return m, errors.Join(os.Chmod(dir, 0o755), syncDir(dir))
}

func readManifest(path string) (manifest, error) {
	var m manifest
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return m, notAKit("it has no %s", manifestFile)
	}
	if err != nil {
		return m, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxManifest {
		return m, notAKit("%s is not a regular file of at most %d bytes", manifestFile, maxManifest)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		return m, err
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return m, notAKit("%s: %w", manifestFile, err)
	}
	return m, nil
}

// settle gives a file its mode, sees that it is on the disk, and returns its
// checksum. Its time becomes that of the installation, and not the archive's: a
// memory that was hibernated knows by it that there is another kernel now.
func settle(path string) (string, error) {
	now := time.Now()
	if err := errors.Join(os.Chmod(path, 0o644), os.Chtimes(path, now, now)); err != nil {
		return "", err
	}
	content, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer content.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, content); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), content.Sync()
}
