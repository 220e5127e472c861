package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"text/template"
)

// licence is the kernel's, on every Debian.
const licence = "/usr/share/common-licenses/GPL-2"

// sources returns the source packages that a package was built from, and their
// versions.
func sources(ctx context.Context, from deb) (map[string]string, error) {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--field", from.file, "Source", "Built-Using")
	cmd.Stderr = os.Stderr
	fields, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("dpkg-deb --field %s: %w", from.file, err)
	}
	return sourcesOf(from, string(fields)), nil
}

// sourcesOf reads the fields Source and Built-Using, each of which may be absent:
// deb-control(5). A package of Debian's signed kernel is built from a source
// package with the signatures, and uses the one with the kernel.
func sourcesOf(from deb, fields string) map[string]string {
	found := map[string]string{}
	source := from.Package
	for line := range strings.Lines(fields) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch key {
		case "Source":
			source = value
		case "Built-Using":
			for item := range strings.SplitSeq(value, ",") {
				name, version, _ := strings.Cut(strings.TrimSpace(item), " (= ")
				found[name] = strings.TrimSuffix(version, ")")
			}
		}
	}
	name, version, differs := strings.Cut(source, " (")
	if found[name] = from.Version; differs {
		found[name] = strings.TrimSuffix(version, ")")
	}
	return found
}

const noticeText = `What choiros-agent boots images with in virtual machines.

kernel and what was unpacked from it, and the modules in initramfs, are Linux {{.Kernel}} of
Debian's package {{.Package}} {{.Version}}. They are as Debian built them,
but for being unpacked, and for the signatures that were taken off the modules.
Linux is under the GNU General Public License, version 2. Debian's account of its
copyrights, and that licence, are below. The source code, with Debian's changes and
how it is built, is in Debian's source packages:
{{range .Sources}}
    {{.}}{{end}}

"apt-get source --only-source NAME=VERSION" gets them, and snapshot.debian.org keeps
those that Debian's archive no longer has.

init in initramfs is guestd, of choiros-agent.

--- copyright, of {{.Package}}

{{.Copyright}}
--- {{.LicenceFile}}

{{.Licence}}`

// notice says what is in a kit, under which licences, and where its source code
// is.
func notice(from deb, version string, copyright []byte, sources map[string]string) ([]byte, error) {
	licenceText, err := os.ReadFile(licence)
	if err != nil {
		return nil, fmt.Errorf("the kernel's licence: %w", err)
	}
	var list []string
	for _, name := range slices.Sorted(maps.Keys(sources)) {
		list = append(list, name+" "+sources[name])
	}
	var text bytes.Buffer
	err = template.Must(template.New("").Parse(noticeText)).Execute(&text, map[string]any{
		"Kernel": version, "Package": from.Package, "Version": from.Version, "Sources": list,
		"Copyright": string(copyright), "LicenceFile": licence, "Licence": string(licenceText),
	})
	return text.Bytes(), err
}
