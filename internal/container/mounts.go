package container

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/sandbox"
)

// bind is a mount whose source was looked at.
type bind struct {
	source   string // without symbolic links
	target   string
	writable bool
}

// resolveMounts looks at the sources of a spec's mounts. socket is Podman's.
func resolveMounts(mounts []sandbox.Mount, socket string) ([]bind, error) {
	if resolved, err := filepath.EvalSymlinks(socket); err == nil {
		socket = resolved
	}
	binds := make([]bind, 0, len(mounts))
	for i, m := range mounts {
		field := fmt.Sprintf("spec.mounts[%d]", i)
		if m.Kind != sandbox.MountWorkspace && m.Kind != sandbox.MountData {
			return nil, sandbox.Unsupportedf(field+".kind", "containers have no %s; give workspace or data, or a driver of virtual machines", m.Kind)
		}
		if err := checkTarget(field+".target", m.Target); err != nil {
			return nil, err
		}
		source, err := resolveSource(field+".source", m.Source, m.Writable())
		if err != nil {
			return nil, err
		}
		if err := checkReadOnly(field+".source", source, m); err != nil {
			return nil, err
		}
		if source == "/" || strings.HasPrefix(socket, source+"/") {
			return nil, sandbox.Invalidf(field+".source",
				"%s holds podman's socket, and with it every container of this user; choose a folder below it", m.Source)
		}
		binds = append(binds, bind{source: source, target: m.Target, writable: m.Writable()})
	}
	for i := range binds {
		if err := checkNesting(fmt.Sprintf("spec.mounts[%d].target", i), binds[i], binds); err != nil {
			return nil, err
		}
	}
	return binds, nil
}

// checkTarget refuses what would hide the files that Podman and this driver
// put into every container, or be filled with them.
func checkTarget(field, target string) error {
	for _, own := range []string{
		guestTarget, guestdTarget, secretsTarget, "/run/.containerenv",
		"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/passwd", "/etc/group",
	} {
		if target == own || strings.HasPrefix(own, target+"/") || strings.HasPrefix(target, own+"/") {
			return sandbox.Invalidf(field, "%s would hide %s, which every sandbox has; choose another place", target, own)
		}
	}
	return nil
}

// resolveSource returns the folder that a source is, without symbolic links.
func resolveSource(field, source string, writable bool) (string, error) {
	resolved, err := filepath.EvalSymlinks(source)
	if err == nil {
		var info fs.FileInfo
		if info, err = os.Stat(resolved); err == nil && !info.IsDir() {
			return "", sandbox.Invalidf(field, "%s is not a folder", source)
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", sandbox.Invalidf(field, "%s does not exist; mkdir -p makes it", source)
	case errors.Is(err, fs.ErrPermission):
		return "", sandbox.Invalidf(field, "%s is not accessible to the agent's user", source)
	case err != nil:
		return "", sandbox.Invalidf(field, "%s cannot be used: %v", source, err)
	}
	// Who has no access outside has none inside either.
	if unix.Access(resolved, unix.R_OK|unix.X_OK) != nil {
		return "", sandbox.Invalidf(field, "%s cannot be read by the agent's user, and so not by the sandbox", source)
	}
	if writable && unix.Access(resolved, unix.W_OK) != nil {
		return "", sandbox.Invalidf(field, "%s cannot be written by the agent's user, and so not by the sandbox", source)
	}
	return resolved, nil
}

// checkReadOnly refuses a read-only mount of what has other file systems mounted
// below it: those would stay writable. Podman has no word for the runtime's
// recursively read-only mounts ("rro").
func checkReadOnly(field, source string, m sandbox.Mount) error {
	if m.Writable() {
		return nil
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil // no Linux
	}
	if below := mountBelow(string(table), source); below != "" {
		return sandbox.Unsupportedf(field, "%s has another file system mounted at %s, which would not be read-only; "+
			"choose a folder without one, or set read_write", m.Source, below)
	}
	return nil
}

// mountBelow finds a mount below dir in the text of proc_pid_mountinfo(5).
func mountBelow(mountinfo, dir string) string {
	for line := range strings.Lines(mountinfo) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		if point := unescape(fields[4]); strings.HasPrefix(point, strings.TrimSuffix(dir, "/")+"/") && point != dir {
			return point
		}
	}
	return ""
}

// unescape undoes the octal escapes of proc_pid_mountinfo(5).
func unescape(field string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(field)
}

// checkNesting refuses a mount that lies in another that has no folder for it:
// a read-only one, in which nobody can make it.
func checkNesting(field string, inner bind, binds []bind) error {
	var outer *bind
	for i := range binds {
		if strings.HasPrefix(inner.target, binds[i].target+"/") && (outer == nil || len(binds[i].target) > len(outer.target)) {
			outer = &binds[i]
		}
	}
	if outer == nil || outer.writable {
		return nil
	}
	relative := strings.TrimPrefix(inner.target, outer.target+"/")
	if info, err := os.Stat(path.Join(outer.source, relative)); err != nil || !info.IsDir() {
		return sandbox.Invalidf(field, "%s lies in %s, which is read-only; make the folder %s there first",
			inner.target, outer.target, relative)
	}
	return nil
}

// checkUnmoved refuses a source that has since become, or come to lie behind, a
// symbolic link: a sandbox that can write to a folder above it could point it
// anywhere.
func checkUnmoved(source string) error {
	resolved, err := filepath.EvalSymlinks(source)
	if err != nil {
		return sandbox.Invalidf("spec.mounts", "source %s is gone: %v", source, err)
	}
	if resolved != source {
		return sandbox.Invalidf("spec.mounts",
			"source %s has become a symbolic link to %s since the sandbox was made; create the sandbox anew", source, resolved)
	}
	return nil
}

// guestDir is the folder of the guest channel's sockets, and hostsPath the
// file that is the sandbox's /etc/hosts.
func guestDir(ref sandbox.Ref) string  { return filepath.Join(ref.Dir, "guest") }
func hostsPath(ref sandbox.Ref) string { return filepath.Join(ref.Dir, "hosts") }

// makeDir makes what Ref.Dir holds for the container, or mends it.
func makeDir(ref sandbox.Ref) error {
	if err := os.Mkdir(guestDir(ref), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	// Whoever the workload runs as binds its sockets there. Outside, Ref.Dir
	// keeps everybody else out.
	if err := os.Chmod(guestDir(ref), 0o777); err != nil {
		return err
	}
	return writeFile(hostsPath(ref), hostsFile(ref.ID))
}

// writeFile replaces a file whole, unless it has the content already: a
// container may have it mounted.
func writeFile(name, content string) error {
	if had, err := os.ReadFile(name); err == nil && string(had) == content {
		return nil
	}
	temporary := name + ".new"
	if err := os.WriteFile(temporary, []byte(content), 0o644); err != nil { // any user inside reads it
		return err
	}
	return os.Rename(temporary, name)
}

// emptyDir removes what the guest put into its folder. The folder itself goes
// with Ref.Dir: somebody may be creating the sandbox anew at this moment.
func emptyDir(ref sandbox.Ref) error {
	root, err := os.OpenRoot(guestDir(ref))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer root.Close()
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return err
	}
	var failed error
	for _, entry := range entries {
		err := root.RemoveAll(entry.Name())
		if errors.Is(err, fs.ErrPermission) {
			// A guest can take permissions away from what is ours, but not
			// keep us from giving them back.
			openUp(root, entry.Name())
			err = root.RemoveAll(entry.Name())
		}
		failed = errors.Join(failed, err)
	}
	if failed != nil {
		failed = fmt.Errorf("%w; podman unshare rm -rf %s removes what another user inside has left there", failed, guestDir(ref))
	}
	return failed
}

// openUp makes the folders from name on accessible to their owner, following
// no link.
func openUp(root *os.Root, name string) {
	info, err := root.Lstat(name)
	if err != nil || !info.IsDir() {
		return
	}
	// Errors show when the folders are removed.
	_ = root.Chmod(name, 0o700)
	_ = fs.WalkDir(root.FS(), name, func(name string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			_ = root.Chmod(name, 0o700)
		}
		return nil
	})
}
