package image

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/choiros/agent/internal/sandbox"
)

// Bounds of what describes an image, far above what images have.
const (
	maxDocument = 4 << 20 // a manifest, an index, a configuration
	maxLayers   = 256
)

// parts is what an image consists of besides its layers.
type parts struct {
	manifest v1.Manifest
	config   v1.ConfigFile
}

// id is what the image is called by the world.
func (p *parts) id() string { return p.manifest.Config.Digest.String() }

// size is what its parts take, but for the manifest.
func (p *parts) size() uint64 {
	total := max(p.manifest.Config.Size, 0)
	for _, layer := range p.manifest.Layers {
		total += max(layer.Size, 0)
	}
	return uint64(total)
}

// read reads an image of the index. One whose manifest or configuration is
// not there whole gives an error that wraps ErrCorrupt. The caller has the lock.
func (s *Store) read(r *record) (*parts, error) {
	manifest, err := s.document(r.manifest)
	if err != nil {
		return nil, err
	}
	p, err := parseImage(manifest, s.document)
	if errors.Is(err, sandbox.ErrInvalid) || errors.Is(err, sandbox.ErrUnsupported) {
		err = fmt.Errorf("%w: image %s: %w", sandbox.ErrCorrupt, r.digest(), err) // such a one is not let in
	}
	return p, err
}

// configID returns the id of an image of the index; empty if it is damaged.
func (s *Store) configID(r *record) (string, error) {
	p, err := s.read(r)
	if errors.Is(err, sandbox.ErrCorrupt) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return p.id(), nil
}

// document reads a blob that is JSON, and sees that it is what it should be.
func (s *Store) document(d v1.Descriptor) ([]byte, error) {
	if err := checkDescriptor(d, maxDocument); err != nil {
		return nil, err
	}
	text, err := readDocument(s.blob(d.Digest.String()))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: blob %s is missing", sandbox.ErrCorrupt, d.Digest)
	}
	if err != nil {
		return nil, err
	}
	if digestOf(text) != d.Digest.String() {
		return nil, fmt.Errorf("%w: blob %s has another content", sandbox.ErrCorrupt, d.Digest)
	}
	return text, nil
}

// readDocument reads a file that was found to be small.
func readDocument(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxDocument))
}

func digestOf(content []byte) string {
	sum := sha256.Sum256(content)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// checkDescriptor refuses a descriptor that names no blob of ours.
func checkDescriptor(d v1.Descriptor, limit int64) error {
	if !digestPattern.MatchString(d.Digest.String()) {
		return fmt.Errorf("%w: digest %s is no sha256", sandbox.ErrUnsupported, clip(d.Digest.String()))
	}
	if d.Size < 0 || d.Size > limit {
		return fmt.Errorf("%w: blob %s is said to have %d bytes; at most %d are allowed", sandbox.ErrInvalid, d.Digest, d.Size, limit)
	}
	return nil
}

// parseImage reads a manifest and, with load, its configuration, and refuses
// what cannot be a container's image. What does not fit together gives an error that wraps ErrCorrupt.
func parseImage(manifest []byte, load func(v1.Descriptor) ([]byte, error)) (*parts, error) {
	p := new(parts)
	if err := json.Unmarshal(manifest, &p.manifest); err != nil {
		return nil, fmt.Errorf("%w: manifest: %w", sandbox.ErrCorrupt, err)
	}
	switch p.manifest.Config.MediaType {
	case types.OCIConfigJSON, types.DockerConfigJSON:
	default:
		return nil, fmt.Errorf("%w: it is not an image: its configuration is of type %s",
			sandbox.ErrUnsupported, clip(string(p.manifest.Config.MediaType)))
	}
	if len(p.manifest.Layers) > maxLayers {
		return nil, fmt.Errorf("%w: it has %d layers; at most %d are allowed", sandbox.ErrInvalid, len(p.manifest.Layers), maxLayers)
	}
	for _, layer := range p.manifest.Layers {
		if err := checkDescriptor(layer, DefaultMaxBytes); err != nil {
			return nil, err
		}
		if !isLayerType(string(layer.MediaType)) {
			return nil, fmt.Errorf("%w: layer %s is of type %s", sandbox.ErrUnsupported, layer.Digest, clip(string(layer.MediaType)))
		}
	}
	if err := checkDescriptor(p.manifest.Config, maxDocument); err != nil {
		return nil, err
	}
	config, err := load(p.manifest.Config)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(config, &p.config); err != nil {
		return nil, fmt.Errorf("%w: configuration: %w", sandbox.ErrCorrupt, err)
	}
	if len(p.config.RootFS.DiffIDs) != len(p.manifest.Layers) {
		return nil, fmt.Errorf("%w: it has %d layers, and its configuration names %d",
			sandbox.ErrCorrupt, len(p.manifest.Layers), len(p.config.RootFS.DiffIDs))
	}
	return p, nil
}

// isLayerType reports whether a media type is that of a tar archive, compressed
// or not. How it is compressed is seen from its content, as podman does.
func isLayerType(media string) bool {
	for _, prefix := range []string{
		"application/vnd.oci.image.layer.v1.tar",
		"application/vnd.oci.image.layer.nondistributable.v1.tar",
		"application/vnd.docker.image.rootfs.diff.tar",
		"application/vnd.docker.image.rootfs.foreign.diff.tar",
	} {
		if rest, ok := strings.CutPrefix(media, prefix); ok {
			switch rest {
			case "", "+gzip", "+zstd", ".gzip", ".zstd":
				return true
			}
		}
	}
	return false
}

// The first bytes of what is compressed.
var (
	gzipMagic = []byte{0x1f, 0x8b}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

// layerType returns the media type of a layer that begins so.
func layerType(head []byte) types.MediaType {
	switch {
	case bytes.HasPrefix(head, gzipMagic):
		return types.OCILayer
	case bytes.HasPrefix(head, zstdMagic):
		return types.OCILayerZStd
	}
	return types.OCIUncompressedLayer
}
