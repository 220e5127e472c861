package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// suite is Debian's stable release at the time of writing. Its kernel is one
// that upstream maintains for years.
const suite = "trixie"

const (
	defaultMirror = "http://deb.debian.org/debian"
	keyring       = "/usr/share/keyrings/debian-archive-keyring.gpg"
)

// debian gets packages of Debian's for any architecture, with an apt that has
// lists, keys and a cache of its own.
type debian struct {
	cache    string // absolute
	arch     string
	progress io.Writer
}

// deb is a package that was authenticated when it was downloaded.
type deb struct {
	Package string `json:"package"`
	Version string `json:"version"`
	SHA256  string `json:"sha256"`

	file string
}

// kernel returns the package with the kernel for virtual machines: the one in
// the cache if there is one and no newer is asked for.
func (d *debian) kernel(ctx context.Context, refresh bool) (deb, error) {
	dir := filepath.Join(d.cache, d.arch)
	record := filepath.Join(dir, "kernel.json")
	if !refresh {
		if found, err := d.cached(record); err == nil {
			return found, nil
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return deb{}, err
	}
	if err := d.configure(); err != nil {
		return deb{}, err
	}
	fmt.Fprintf(d.progress, "guest-kit: getting Debian %s's list of packages\n", suite)
	if err := d.run(ctx, dir, "apt-get", "update", "-q"); err != nil {
		return deb{}, err
	}
	found, err := d.find(ctx, dir)
	if err != nil {
		return deb{}, err
	}
	fmt.Fprintf(d.progress, "guest-kit: getting %s %s\n", found.Package, found.Version)
	if err := d.run(ctx, dir, "apt-get", "download", "-q", found.Package+":"+d.arch+"="+found.Version); err != nil {
		return deb{}, err
	}
	found.file = d.fileOf(found)
	if found.SHA256, err = sumOf(found.file); err != nil {
		return deb{}, err
	}
	text, err := json.Marshal(found)
	if err != nil {
		return deb{}, err
	}
	return found, os.WriteFile(record, text, 0o644)
}

// fileOf is where apt puts a package. It writes a version's colon in its own way.
func (d *debian) fileOf(p deb) string {
	return filepath.Join(d.cache, d.arch, p.Package+"_"+strings.ReplaceAll(p.Version, ":", "%3a")+"_"+d.arch+".deb")
}

// cached reads what is known of a package in the cache. That it is as apt left
// it is checked.
func (d *debian) cached(path string) (deb, error) {
	var found deb
	text, err := os.ReadFile(path)
	if err != nil {
		return found, err
	}
	if err := json.Unmarshal(text, &found); err != nil {
		return found, err
	}
	found.file = d.fileOf(found)
	sum, err := sumOf(found.file)
	if err == nil && sum != found.SHA256 {
		err = fmt.Errorf("%s was changed", found.file)
	}
	return found, err
}

func sumOf(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, file); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// configure writes apt's configuration. A mirror of one's own is named by
// DEBIAN_MIRROR, as for the test environment.
func (d *debian) configure() error {
	if _, err := os.Stat(keyring); err != nil {
		return fmt.Errorf("Debian's keys: %w; install debian-archive-keyring", err) //nolint:staticcheck // A name.
	}
	mirror := strings.TrimSuffix(os.Getenv("DEBIAN_MIRROR"), "/")
	if mirror == "" {
		mirror = defaultMirror
	}
	apt := filepath.Join(d.cache, "apt")
	for _, folder := range []string{"sources", "lists/partial", "cache/archives/partial", "state"} {
		if err := os.MkdirAll(filepath.Join(apt, folder), 0o755); err != nil {
			return err
		}
	}
	sources := fmt.Sprintf("Types: deb\nURIs: %s\nSuites: %s %s-updates\nComponents: main\nSigned-By: %s\n\n"+
		"Types: deb\nURIs: %s-security\nSuites: %s-security\nComponents: main\nSigned-By: %s\n",
		mirror, suite, suite, keyring, mirror, suite, keyring)
	var config strings.Builder
	for _, setting := range [][2]string{
		{"Dir::Etc::SourceList", "/dev/null"},
		{"Dir::Etc::SourceParts", filepath.Join(apt, "sources")},
		{"Dir::State", filepath.Join(apt, "state")},
		{"Dir::State::Lists", filepath.Join(apt, "lists")},
		{"Dir::State::Status", filepath.Join(apt, "status")},
		{"Dir::Cache", filepath.Join(apt, "cache")},
		{"APT::Architecture", d.arch},
		{"APT::Architectures", d.arch},
		{"APT::Sandbox::User", "root"}, // who else may not see the cache
		{"Acquire::Languages", "none"},
		{"Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", "false"},
	} {
		fmt.Fprintf(&config, "%s %q;\n", setting[0], setting[1])
	}
	return errors.Join(
		os.WriteFile(filepath.Join(apt, "sources", "debian.sources"), []byte(sources), 0o644),
		os.WriteFile(filepath.Join(apt, "status"), nil, 0o644),
		os.WriteFile(filepath.Join(apt, "conf"), []byte(config.String()), 0o644),
	)
}

// find asks which package the cloud kernel is at present.
func (d *debian) find(ctx context.Context, dir string) (deb, error) {
	meta, err := d.show(ctx, dir, "linux-image-cloud-"+d.arch)
	if err != nil {
		return deb{}, err
	}
	for dependency := range strings.SplitSeq(meta["Depends"], ",") {
		name, _, _ := strings.Cut(strings.TrimSpace(dependency), " ")
		if strings.HasPrefix(name, "linux-image-") {
			fields, err := d.show(ctx, dir, name)
			return deb{Package: name, Version: fields["Version"]}, err
		}
	}
	return deb{}, fmt.Errorf("linux-image-cloud-%s depends on no linux-image", d.arch)
}

// show returns the fields of a package's newest version that are one line each.
func (d *debian) show(ctx context.Context, dir, name string) (map[string]string, error) {
	var text bytes.Buffer
	cmd := d.command(ctx, dir, "apt-cache", "show", "--no-all-versions", name)
	cmd.Stdout = &text
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("apt-cache show %s: %w", name, err)
	}
	fields := map[string]string{}
	for line := range strings.Lines(text.String()) {
		if key, value, ok := strings.Cut(line, ": "); ok {
			fields[key] = strings.TrimSpace(value)
		}
	}
	return fields, nil
}

func (d *debian) run(ctx context.Context, dir string, args ...string) error {
	cmd := d.command(ctx, dir, args...)
	cmd.Stdout = d.progress
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", strings.Join(args, " "), err)
	}
	return nil
}

func (d *debian) command(ctx context.Context, dir string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir, cmd.Stderr = dir, d.progress
	cmd.Env = append(os.Environ(), "APT_CONFIG="+filepath.Join(d.cache, "apt", "conf"), "LC_ALL=C")
	return cmd
}
