package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path"
	"strings"
)

// contents is what a kernel's package has that is of use here.
type contents struct {
	kernel  []byte // as Debian packs it
	version string // as uname -r says it
	// copyright is the package's account of it.
	copyright []byte
	// modules are those that can be loaded, by their names with underscores,
	// compressed.
	modules map[string][]byte
}

// unpack reads a kernel's package.
func unpack(ctx context.Context, file string) (contents, error) {
	c := contents{modules: map[string][]byte{}}
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", file)
	stream, err := cmd.StdoutPipe()
	if err != nil {
		return c, err
	}
	if err := cmd.Start(); err != nil {
		return c, err
	}
	err = c.read(tar.NewReader(stream))
	if err != nil {
		_ = cmd.Process.Kill() // it may have more to say than is read
	}
	if waitErr := cmd.Wait(); err == nil {
		err = waitErr
	}
	if err == nil && c.kernel == nil {
		err = errors.New("there is no kernel in it")
	}
	if err != nil {
		return c, fmt.Errorf("unpack %s: %w", file, err)
	}
	return c, nil
}

func (c *contents) read(archive *tar.Reader) error {
	for {
		header, err := archive.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case header.Typeflag != tar.TypeReg:
			continue
		}
		name := path.Base(header.Name)
		if name == "copyright" {
			if c.copyright, err = io.ReadAll(archive); err != nil {
				return err
			}
		}
		if version, ok := strings.CutPrefix(name, "vmlinuz-"); ok {
			c.version = version
			if c.kernel, err = io.ReadAll(archive); err != nil {
				return err
			}
		}
		if module, ok := strings.CutSuffix(name, ".ko.xz"); ok {
			if c.modules[moduleName(module)], err = io.ReadAll(archive); err != nil {
				return err
			}
		}
	}
}

// moduleName is a module's name in the one way that the kernel writes it.
func moduleName(name string) string { return strings.ReplaceAll(name, "-", "_") }
