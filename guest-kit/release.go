package main

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// writeArchive packs the kit in a folder into a file, in one step, for
// agentctl guest-kit install. The same kit gives the same bytes.
func writeArchive(dir, file string) (err error) {
	text, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if err != nil {
		return err
	}
	var m manifest
	if err := json.Unmarshal(text, &m); err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(dir, manifestFile), err)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	out, err := os.Create(file + ".new")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(out.Name()))
		}
	}()
	packed := gzip.NewWriter(out)
	w := tar.NewWriter(packed)
	for _, name := range append([]string{manifestFile}, slices.Sorted(maps.Keys(m.SHA256))...) {
		if err := addFile(w, filepath.Join(dir, name), "guest-kit-"+m.Arch+"/"+name); err != nil {
			return errors.Join(err, out.Close())
		}
	}
	if err := errors.Join(w.Close(), packed.Close(), out.Close()); err != nil {
		return err
	}
	return os.Rename(out.Name(), file)
}

func addFile(w *tar.Writer, path, name string) error {
	content, err := os.Open(path)
	if err != nil {
		return err
	}
	defer content.Close()
	info, err := content.Stat()
	if err != nil {
		return err
	}
	err = w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: info.Size(), Mode: 0o644, ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR})
	if err != nil {
		return err
	}
	_, err = io.Copy(w, content)
	return err
}
