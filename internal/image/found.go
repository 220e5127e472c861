package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/choiros/agent/internal/sandbox"
)

// found is an image that is not in the store yet: where its parts are.
type found struct {
	manifest v1.Descriptor
	names    []string
	blobs    map[string]string // files by digest, the manifest's among them
}

// images returns the images of an archive; see choose for those that are there
// for several platforms. One that is not whole is an error.
func (a *archive) images(st *stage, archs []string) ([]found, error) {
	_, oci := a.files["index.json"]
	_, docker := a.files["manifest.json"]
	switch {
	case oci:
		if _, ok := a.files["oci-layout"]; !ok {
			return nil, corruptf("lacks the file oci-layout")
		}
		if docker { // for docker of old; it is to be right too
			if _, err := a.docker(st); err != nil {
				return nil, err
			}
		}
		return a.layout(archs)
	case docker:
		return a.docker(st)
	}
	return nil, corruptf("is neither an OCI nor a docker archive: it has no index.json and no manifest.json")
}

// layout returns the images of an OCI image layout.
func (a *archive) layout(archs []string) ([]found, error) {
	var index v1.IndexManifest
	if err := a.decode(a.files["index.json"], &index); err != nil {
		return nil, corruptf("has a malformed index: %v", err)
	}
	var images []found
	for _, d := range index.Manifests {
		choices, err := a.manifests(d, 0)
		if err != nil {
			return nil, err
		}
		if len(choices) == 0 {
			continue // an archive need not hold all that its index names
		}
		image := choose(choices, archs)
		name := d.Annotations["io.containerd.image.name"]
		if name == "" {
			name = d.Annotations[nameAnnotation]
		}
		if name != "" {
			full, err := normalizeLocal(name)
			if err != nil {
				return nil, corruptf("has an image of the impossible name %s: %v", clip(name), err)
			}
			image.names = []string{full}
		}
		images = append(images, image.found)
	}
	if len(images) == 0 {
		return nil, corruptf("has no manifest of those that its index.json names")
	}
	return images, nil
}

// choice is one platform's image of an index.
type choice struct {
	found
	os, arch string
}

// choose returns the choice that is for the first of these architectures that
// there is one for, or else the first choice, which then will be refused where
// it is used.
func choose(choices []choice, archs []string) choice {
	for _, arch := range archs {
		for _, c := range choices {
			if c.os == "linux" && c.arch == arch {
				return c
			}
		}
	}
	return choices[0]
}

// manifests returns the images that a descriptor of an archive leads to: those
// that are there. Attestations and the like are none.
func (a *archive) manifests(d v1.Descriptor, depth int) ([]choice, error) {
	if depth > maxIndexDepth {
		return nil, corruptf("has indexes in indexes, %d deep", depth)
	}
	f, ok := a.blob(d)
	if !ok || d.Platform != nil && d.Platform.OS == "unknown" {
		return nil, nil
	}
	var document struct {
		Manifests []v1.Descriptor `json:"manifests"`
		Config    *v1.Descriptor  `json:"config"`
	}
	if err := a.decode(f, &document); err != nil {
		return nil, corruptf("has a malformed manifest %s: %v", d.Digest, err)
	}
	if document.Config != nil {
		c, err := a.manifest(d, f)
		if err != nil {
			return nil, err
		}
		return []choice{c}, nil
	}
	if len(document.Manifests) > maxLayers {
		return nil, corruptf("has an index of %d manifests; at most %d are allowed", len(document.Manifests), maxLayers)
	}
	var choices []choice
	for _, inner := range document.Manifests {
		more, err := a.manifests(inner, depth+1)
		if err != nil {
			return nil, err
		}
		if choices = append(choices, more...); len(choices) > maxLayers {
			return nil, corruptf("has more than %d manifests for one image", maxLayers)
		}
	}
	return choices, nil
}

// manifest returns the image of a manifest, all of whose parts must be there.
func (a *archive) manifest(d v1.Descriptor, f file) (choice, error) {
	text, err := f.document()
	if err != nil {
		return choice{}, err
	}
	image := found{manifest: plain(d), blobs: map[string]string{d.Digest.String(): f.path}}
	take := func(part v1.Descriptor) (file, error) {
		blob, ok := a.blob(part)
		if !ok {
			return file{}, corruptf("lacks %s, or a part of it, which manifest %s names", part.Digest, d.Digest)
		}
		image.blobs[part.Digest.String()] = blob.path
		return blob, nil
	}
	p, err := parseImage(text, func(d v1.Descriptor) ([]byte, error) {
		blob, err := take(d)
		if err != nil {
			return nil, err
		}
		return blob.document()
	})
	if err != nil {
		return choice{}, archiveProblem(err)
	}
	for _, layer := range p.manifest.Layers {
		if _, err := take(layer); err != nil {
			return choice{}, err
		}
	}
	return choice{found: image, os: p.config.OS, arch: p.config.Architecture}, nil
}

// archiveProblem gives an error of what an archive holds the field that it is of.
func archiveProblem(err error) error {
	if _, ok := errors.AsType[*sandbox.FieldError](err); ok {
		return err
	}
	for _, sentinel := range []error{sandbox.ErrCorrupt, sandbox.ErrUnsupported, sandbox.ErrInvalid} {
		if errors.Is(err, sentinel) {
			problem := strings.TrimPrefix(err.Error(), sentinel.Error()+": ")
			return &sandbox.FieldError{Field: archiveField, Problem: "will not do: " + problem, Err: sentinel}
		}
	}
	return err
}

// plain is a descriptor as the store keeps it.
func plain(d v1.Descriptor) v1.Descriptor {
	return v1.Descriptor{MediaType: d.MediaType, Size: d.Size, Digest: d.Digest}
}

// blob returns the file that a descriptor means, if it is there whole. Whether
// its content is right was seen when it was read.
func (a *archive) blob(d v1.Descriptor) (file, bool) {
	f, ok := a.file("blobs/" + strings.Replace(d.Digest.String(), ":", "/", 1))
	return f, ok && f.size == d.Size && f.digest == d.Digest.String()
}

func (a *archive) decode(f file, into any) error {
	text, err := f.document()
	if err != nil {
		return err
	}
	return json.Unmarshal(text, into)
}

// docker returns the images of a docker archive. Such a one has no manifests
// of the kind that a store keeps, so they are made: the same archive gives the same.
func (a *archive) docker(st *stage) ([]found, error) {
	var manifests []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := a.decode(a.files["manifest.json"], &manifests); err != nil {
		return nil, corruptf("has a malformed manifest.json: %v", err)
	}
	if len(manifests) == 0 {
		return nil, corruptf("has no image in its manifest.json")
	}
	var images []found
	for i, m := range manifests {
		if len(m.Layers) > maxLayers {
			return nil, sandbox.Invalidf(archiveField, "has an image of %d layers; at most %d are allowed", len(m.Layers), maxLayers)
		}
		image, err := a.dockerImage(m.Config, m.Layers)
		if err != nil {
			return nil, err
		}
		for _, tag := range m.RepoTags {
			full, err := normalize(tag)
			if err != nil {
				return nil, corruptf("has an image of the impossible name %s: %v", clip(tag), err)
			}
			image.names = append(image.names, full)
		}
		if err := image.keepManifest(st, i); err != nil {
			return nil, err
		}
		images = append(images, image.found)
	}
	return images, nil
}

// dockerImage is an image whose manifest is being made.
type dockerImage struct {
	found
	made v1.Manifest
}

// dockerImage returns the image of a configuration and of layers, which must be
// what the configuration says.
func (a *archive) dockerImage(config string, layers []string) (*dockerImage, error) {
	var settings struct {
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
	}
	f, ok := a.file(config)
	if !ok {
		return nil, corruptf("lacks %s, which its manifest.json names", clip(config))
	}
	if err := a.decode(f, &settings); err != nil {
		return nil, corruptf("has a malformed configuration %s: %v", clip(config), err)
	}
	if len(settings.RootFS.DiffIDs) != len(layers) {
		return nil, corruptf("has %d layers for an image of %d", len(layers), len(settings.RootFS.DiffIDs))
	}
	image := &dockerImage{found: found{blobs: map[string]string{}}}
	image.made = v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Layers: []v1.Descriptor{}}
	image.made.Config = image.part(f, types.OCIConfigJSON)
	for i, name := range layers {
		layer, ok := a.file(name)
		switch {
		case !ok:
			return nil, corruptf("lacks %s, which its manifest.json names", clip(name))
		case layer.unpacked != settings.RootFS.DiffIDs[i] && !blobPattern.MatchString(name):
			// A blob's name is its digest, of the compressed layer perhaps.
			return nil, corruptf("is damaged: %s has another content", clip(name))
		}
		image.made.Layers = append(image.made.Layers, image.part(layer, layerType(layer.head)))
	}
	return image, nil
}

// part adds a file to an image.
func (i *dockerImage) part(f file, media types.MediaType) v1.Descriptor {
	i.blobs[f.digest] = f.path
	return v1.Descriptor{MediaType: media, Size: f.size, Digest: v1.Hash{Algorithm: "sha256", Hex: hexOf(f.digest)}}
}

// keepManifest puts the manifest with the other parts.
func (i *dockerImage) keepManifest(st *stage, number int) error {
	text, err := json.Marshal(i.made)
	if err != nil {
		return err
	}
	out, err := st.create(fmt.Sprintf("manifest-%d", number))
	if err != nil {
		return diskProblem(err)
	}
	_, err = out.Write(text)
	if err := errors.Join(err, out.Close()); err != nil {
		return diskProblem(err)
	}
	digest := digestOf(text)
	i.blobs[digest] = out.Name()
	i.manifest = v1.Descriptor{
		MediaType: i.made.MediaType, Size: int64(len(text)), Digest: v1.Hash{Algorithm: "sha256", Hex: hexOf(digest)},
	}
	// It is held to what is asked of others.
	_, err = parseImage(text, func(d v1.Descriptor) ([]byte, error) { return readDocument(i.blobs[d.Digest.String()]) })
	return archiveProblem(err)
}
