package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Names of the kit's files.
const (
	kernelFile    = "kernel"
	vmlinuxFile   = "vmlinux"
	initramfsFile = "initramfs"
	noticeFile    = "NOTICE"
	manifestFile  = "guest.json"
)

// cmdline is for every machine that boots the kit: see docs/guest-kit.md.
const cmdline = "console=hvc0 quiet panic=-1 cryptomgr.notests"

// manifest is guest.json, as docs/guest-kit.md describes it.
type manifest struct {
	Arch          string            `json:"arch"`
	Kernel        string            `json:"kernel"`
	Vmlinux       string            `json:"vmlinux,omitempty"`
	Initrd        string            `json:"initrd"`
	Cmdline       string            `json:"cmdline"`
	KernelVersion string            `json:"kernel_version"`
	SHA256        map[string]string `json:"sha256"`
	Packages      map[string]string `json:"packages"`
	Sources       map[string]string `json:"sources"`
	Modules       []string          `json:"modules"`
	Contents      map[string]int    `json:"contents"`
	Inputs        string            `json:"inputs"`
}

// kit is what is built.
type kit struct {
	kernel, initramfs []byte
	vmlinux           []byte // nil: there is none
	notice            []byte
	manifest          manifest
}

// assemble makes a kit.
func assemble(ctx context.Context, arch string, from deb, guestd []byte) (*kit, error) {
	found, err := unpack(ctx, from.file)
	if err != nil {
		return nil, err
	}
	kernel, err := bootable(arch, found.kernel)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from.Package, err)
	}
	modules, err := selectModules(ctx, found.modules)
	if err != nil {
		return nil, err
	}
	entries := map[string]entry{
		"dev": {mode: folder | 0o755},
		// What guestd has as its standard streams before there is a devtmpfs.
		"dev/console": {mode: device | 0o600, major: 5, minor: 1},
		"dev/null":    {mode: device | 0o666, major: 1, minor: 3},
		"init":        {mode: regular | 0o755, content: guestd},
		"modules":     {mode: folder | 0o755},
	}
	var order strings.Builder
	for _, m := range modules {
		file := "modules/" + m.name + ".ko"
		entries[file] = entry{mode: regular | 0o644, content: m.object}
		fmt.Fprintf(&order, "%s %s\n", m.stage, file)
	}
	entries["modules/order"] = entry{mode: regular | 0o644, content: []byte(order.String())}
	made, err := sources(ctx, from)
	if err != nil {
		return nil, err
	}
	text, err := notice(from, found.version, found.copyright, made)
	if err != nil {
		return nil, err
	}
	k := &kit{kernel: kernel, initramfs: archive(entries), notice: text}
	k.manifest = manifest{
		Arch: arch, Kernel: kernelFile, Initrd: initramfsFile, Cmdline: cmdline, KernelVersion: found.version,
		SHA256:   map[string]string{kernelFile: sumBytes(k.kernel), initramfsFile: sumBytes(k.initramfs), noticeFile: sumBytes(k.notice)},
		Packages: map[string]string{from.Package: from.Version},
		Sources:  made,
		Contents: map[string]int{},
	}
	if arch == "amd64" {
		if k.vmlinux, err = vmlinux(kernel); err != nil {
			return nil, fmt.Errorf("%s: %w", from.Package, err)
		}
		k.manifest.Vmlinux, k.manifest.SHA256[vmlinuxFile] = vmlinuxFile, sumBytes(k.vmlinux)
	}
	for _, m := range modules {
		k.manifest.Modules = append(k.manifest.Modules, m.name)
	}
	for name, e := range entries {
		if len(e.content) > 0 {
			k.manifest.Contents[name] = len(e.content)
		}
	}
	return k, nil
}

// write puts the kit in a folder, each file in one step and guest.json last.
func (k *kit) write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text, err := json.MarshalIndent(k.manifest, "", "  ")
	if err != nil {
		return err
	}
	for _, file := range []struct {
		name    string
		content []byte
	}{{kernelFile, k.kernel}, {vmlinuxFile, k.vmlinux}, {initramfsFile, k.initramfs}, {noticeFile, k.notice}, {manifestFile, append(text, '\n')}} {
		if file.content == nil {
			continue
		}
		path := filepath.Join(dir, file.name)
		if err := os.WriteFile(path+".new", file.content, 0o644); err != nil {
			return err
		}
		if err := os.Rename(path+".new", path); err != nil {
			return err
		}
	}
	return nil
}

// fingerprint tells apart all that a kit is made from, this program included.
func fingerprint(from deb, guestd []byte) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	program, err := sumOf(self)
	if err != nil {
		return "", err
	}
	return sumBytes(fmt.Appendf(nil, "%s %s %s", from.SHA256, sumBytes(guestd), program)), nil
}

// upToDate reports whether a folder has the kit that is made from inputs.
func upToDate(dir, inputs string) bool {
	text, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if err != nil {
		return false
	}
	var m manifest
	if err := json.NewDecoder(bytes.NewReader(text)).Decode(&m); err != nil || m.Inputs != inputs || len(m.SHA256) == 0 {
		return false
	}
	for name, want := range m.SHA256 {
		if sum, err := sumOf(filepath.Join(dir, name)); err != nil || sum != want {
			return false
		}
	}
	return true
}

func sumBytes(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}
