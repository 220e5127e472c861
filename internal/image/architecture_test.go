package image

import (
	"bytes"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/choiros/agent/internal/sandbox"
)

func TestArchitectureIsChosen(t *testing.T) {
	t.Parallel()
	blobs := map[string][]byte{}
	inner := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
	for _, arch := range []string{"s390x", "arm64", "amd64"} {
		own, d := spec{arch: arch, layers: [][]byte{layerOf(t, text("arch", arch))}}.blobsOf(t)
		maps.Copy(blobs, own)
		d.Platform = &v1.Platform{OS: "linux", Architecture: arch}
		inner.Manifests = append(inner.Manifests, d)
	}
	attestation := v1.Descriptor{MediaType: types.OCIManifestSchema1, Size: 2, Digest: v1.Hash{Algorithm: "sha256", Hex: hexOf(digestOf([]byte("{}")))}}
	attestation.Platform = &v1.Platform{OS: "unknown", Architecture: "unknown"}
	blobs[digestOf([]byte("{}"))] = []byte("{}")
	inner.Manifests = append([]v1.Descriptor{attestation}, inner.Manifests...)
	innerText := encode(t, inner)
	blobs[digestOf(innerText)] = innerText
	index := v1.IndexManifest{SchemaVersion: 2, Manifests: []v1.Descriptor{{
		MediaType: types.OCIImageIndex, Size: int64(len(innerText)), Digest: v1.Hash{Algorithm: "sha256", Hex: hexOf(digestOf(innerText))},
		Annotations: map[string]string{"io.containerd.image.name": "docker.io/library/multi:1", nameAnnotation: "1"},
	}}}
	archive := layoutOf(t, index, blobs)

	s := open(t)
	loaded := load(t, s, archive)
	if len(loaded) != 1 || !slices.Equal(loaded[0].Names, []string{"docker.io/library/multi:1"}) {
		t.Errorf("%+v", loaded)
	}
	if got, err := s.Resolve(t.Context(), "multi:1", "amd64"); err != nil || got.Architecture != "amd64" {
		t.Errorf("%+v, %v", got, err)
	}
	_, err := s.Resolve(t.Context(), "multi:1", "arm64")
	if wrong, ok := errors.AsType[*sandbox.FieldError](err); !ok || !strings.Contains(wrong.Problem, "amd64") || !strings.Contains(wrong.Problem, "arm64") {
		t.Errorf("%v, want one that names both", err)
	}
	s = open(t)
	s.Arch = "arm64"
	load(t, s, archive)
	if got, err := s.Resolve(t.Context(), "multi:1", "arm64"); err != nil || got.Architecture != "arm64" {
		t.Errorf("%+v, %v", got, err)
	}
	// Where there is none of the machine's own, that which can run in it is kept.
	s = open(t)
	s.Arch = "riscv64"
	isMissing := errors.New("the translator is missing; install it")
	var missing error
	other := Other{Arch: "amd64", Missing: func() error { return missing }}
	if _, err := s.LoadImage(t.Context(), bytes.NewReader(archive), other); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Resolve(t.Context(), "multi:1", "riscv64", other); err != nil || got.Architecture != "amd64" {
		t.Errorf("%+v, %v", got, err)
	}
	missing = isMissing
	_, err = s.Resolve(t.Context(), "multi:1", "riscv64", other)
	want := "image multi:1 is for linux/amd64, and machines here are linux/riscv64: the translator is missing; install it"
	if wrong, ok := errors.AsType[*sandbox.FieldError](err); !ok || wrong.Field != "spec.image" || wrong.Problem != want {
		t.Errorf("%v, want %s", err, want)
	}
	if _, err := s.Resolve(t.Context(), "multi:1", "riscv64"); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("where nothing else can run: %v", err)
	}
}
