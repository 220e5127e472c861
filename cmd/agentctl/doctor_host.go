package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/choiros/agent/internal/location"
)

// host is what doctor looks at of the machine it runs on.
type host struct {
	root     fs.FS // of /
	getenv   func(string) string
	uid      int
	user     string // its name; empty if not known
	lookPath func(string) (string, error)
	// podman asks the service at a socket for its version.
	podman func(ctx context.Context, socket string) (string, error)
	// free returns how many bytes a user may still write below a folder.
	free func(dir string) (uint64, error)
}

// examineLinux checks what rootless containers need of Linux. Root needs none
// of it, and has no rootless containers.
func (h *host) examineLinux(ctx context.Context) []finding {
	if h.uid == 0 {
		return []finding{
			h.cgroup(),
			{
				"user", warn, "you are root: what rootless containers need was not checked",
				"run doctor as the user that the agent runs as: sudo -u USER agentctl doctor",
			},
		}
	}
	findings := []finding{h.cgroup(), h.controllers(), h.userNamespaces()}
	findings = append(findings, h.idMaps()...)
	findings = append(findings, h.subIDs("/etc/subuid"), h.subIDs("/etc/subgid"), h.runtimeDir(), h.podmanSocket(ctx))
	if h.is("/run/systemd/system") {
		findings = append(findings, h.linger())
	}
	return findings
}

// is reports whether a path is there.
func (h *host) is(path string) bool {
	_, err := fs.Stat(h.root, strings.TrimPrefix(path, "/"))
	return err == nil
}

func (h *host) read(path string) (string, error) {
	data, err := fs.ReadFile(h.root, strings.TrimPrefix(path, "/"))
	return strings.TrimSpace(string(data)), err
}

// cgroup checks for cgroup v2, which limits and rootless containers need.
func (h *host) cgroup() finding {
	if h.is("/sys/fs/cgroup/cgroup.controllers") {
		return finding{"cgroup", fine, "version 2", ""}
	}
	return finding{
		"cgroup", warn, "version 1: rootless containers run, but without limits on memory, CPU and processes",
		"boot with the kernel option systemd.unified_cgroup_hierarchy=1",
	}
}

// controllers checks which limits the user may set: those of the controllers
// delegated to their part of the tree, see cgroups(7) and systemd.resource-control(5).
func (h *host) controllers() finding {
	const check = "limits"
	path := fmt.Sprintf("/sys/fs/cgroup/user.slice/user-%d.slice/user@%d.service/cgroup.controllers", h.uid, h.uid)
	text, err := h.read(path)
	if err != nil {
		return finding{
			check, warn, "systemd runs nothing for this user, so limits may not be enforced",
			"log in as this user (not with su or sudo), or: sudo loginctl enable-linger " + h.user,
		}
	}
	var missing []string
	for _, name := range []string{"cpu", "memory", "pids"} {
		if !slices.Contains(strings.Fields(text), name) {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return finding{
			check, warn, "not delegated to this user: " + strings.Join(missing, ", "),
			`sudo mkdir -p /etc/systemd/system/user@.service.d && printf '[Service]\nDelegate=cpu cpuset io memory pids\n' | ` +
				`sudo tee /etc/systemd/system/user@.service.d/delegate.conf && sudo systemctl daemon-reload, and log in again`,
		}
	}
	return finding{check, fine, "cpu, memory and processes can be limited", ""}
}

// userNamespaces checks that an ordinary user may make user namespaces.
func (h *host) userNamespaces() finding {
	const check = "user namespaces"
	if n, err := h.read("/proc/sys/user/max_user_namespaces"); err == nil && n == "0" {
		return finding{check, failed, "none are allowed", "sudo sysctl -w user.max_user_namespaces=28633"}
	}
	if n, err := h.read("/proc/sys/kernel/unprivileged_userns_clone"); err == nil && n == "0" {
		return finding{check, failed, "not allowed to ordinary users", "sudo sysctl -w kernel.unprivileged_userns_clone=1"}
	}
	return finding{check, fine, "allowed", ""}
}

// idMaps checks for the two programs that give a namespace its ids.
func (h *host) idMaps() []finding {
	for _, program := range []string{"newuidmap", "newgidmap"} {
		if _, err := h.lookPath(program); err != nil {
			return []finding{{"id maps", failed, program + " is not installed", h.install(map[string]string{
				"debian": "uidmap", "fedora": "shadow-utils", "arch": "shadow", "suse": "shadow",
				"nixos": "virtualisation.podman.enable = true;",
			})}}
		}
	}
	return []finding{{"id maps", fine, "newuidmap and newgidmap are installed", ""}}
}

// minSubIDs is what an image with ids up to 65535 needs.
const minSubIDs = 65536

// subIDs checks the user's entries in /etc/subuid or /etc/subgid, see subuid(5).
func (h *host) subIDs(path string) finding {
	check := filepath.Base(path)
	if conf, err := h.read("/etc/nsswitch.conf"); err == nil {
		for line := range strings.SplitSeq(conf, "\n") {
			if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "subid:"); ok && !strings.Contains(rest, "files") {
				return finding{check, fine, "given by" + strings.TrimRight(rest, " ") + " (see nsswitch.conf); not checked", ""}
			}
		}
	}
	text, err := h.read(path)
	total := 0
	if err == nil {
		total = countSubIDs(text, h.user, h.uid)
	}
	if total >= minSubIDs {
		return finding{check, fine, fmt.Sprintf("%d ids for %s", total, h.user), ""}
	}
	first, flag := 100000, "--add-subuids"
	if check == "subgid" {
		flag = "--add-subgids"
	}
	if end := lastSubID(text); end >= first {
		first = end + 1
	}
	detail := fmt.Sprintf("%s has %d ids; images need %d", h.user, total, minSubIDs)
	if total == 0 {
		detail = "has no entry for " + h.user
	}
	return finding{check, failed, detail, fmt.Sprintf(
		"sudo usermod %s %d-%d %s && podman system migrate", flag, first, first+minSubIDs-1, h.user)}
}

// countSubIDs adds up the ids of the user's lines: NAME-OR-UID:FIRST:COUNT.
func countSubIDs(text, name string, uid int) int {
	total := 0
	for line := range strings.SplitSeq(text, "\n") {
		parts := strings.Split(strings.TrimSpace(line), ":")
		if len(parts) != 3 || parts[0] != name && parts[0] != strconv.Itoa(uid) {
			continue
		}
		if n, err := strconv.Atoi(parts[2]); err == nil && n > 0 {
			total += n
		}
	}
	return total
}

// lastSubID is the highest id that anybody has, or -1.
func lastSubID(text string) int {
	last := -1
	for line := range strings.SplitSeq(text, "\n") {
		parts := strings.Split(strings.TrimSpace(line), ":")
		if len(parts) != 3 {
			continue
		}
		first, err1 := strconv.Atoi(parts[1])
		n, err2 := strconv.Atoi(parts[2])
		if err1 == nil && err2 == nil {
			last = max(last, first+n-1)
		}
	}
	return last
}

func (h *host) runtimeDir() finding {
	const check = "runtime folder"
	dir := h.getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		return finding{
			check, failed, "XDG_RUNTIME_DIR is not set, so podman's socket and the agent's cannot be found",
			fmt.Sprintf("log in as this user (not with su or sudo), or: export XDG_RUNTIME_DIR=/run/user/%d", h.uid),
		}
	}
	if !h.is(dir) {
		return finding{
			check, failed, "XDG_RUNTIME_DIR is " + dir + ", which does not exist",
			"log in as this user (not with su or sudo), or: sudo loginctl enable-linger " + h.user,
		}
	}
	return finding{check, fine, dir, ""}
}

// minPodman is the first major version whose API the driver speaks.
const minPodman = 5

func (h *host) podmanSocket(ctx context.Context) finding {
	const check = "podman"
	install := h.install(map[string]string{
		"debian": "podman", "fedora": "podman", "arch": "podman", "suse": "podman",
		"nixos": "virtualisation.podman.enable = true;",
	})
	socket, given := strings.CutPrefix(h.getenv("CONTAINER_HOST"), "unix://")
	if !given {
		socket = filepath.Join(orElse(h.getenv("XDG_RUNTIME_DIR"), fmt.Sprintf("/run/user/%d", h.uid)), "podman", "podman.sock")
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	found, err := h.podman(ctx, socket)
	if err != nil {
		if _, missing := h.lookPath("podman"); missing != nil {
			return finding{check, failed, "is not installed", install}
		}
		cure := fmt.Sprintf("podman system service --time 0 unix://%s &", socket)
		if h.is("/run/systemd/system") {
			cure = "systemctl --user enable --now podman.socket"
		}
		return finding{check, failed, "its service does not answer at " + socket + ": " + err.Error(), cure}
	}
	major, _, _ := strings.Cut(found, ".")
	if n, err := strconv.Atoi(major); err != nil || n < minPodman {
		return finding{check, failed, fmt.Sprintf("%s is too old; %d or newer is needed", found, minPodman), install}
	}
	return finding{check, fine, found + " at " + socket, ""}
}

// linger checks that the user's services, the agent and podman among them,
// outlive their last login: see loginctl(1).
func (h *host) linger() finding {
	if h.is("/var/lib/systemd/linger/" + h.user) {
		return finding{"linger", fine, "this user's services run without a login", ""}
	}
	return finding{
		"linger", warn, "this user's services, and sandboxes with them, end with the last logout",
		"sudo loginctl enable-linger " + h.user,
	}
}

// disk checks the space where the agent, and podman beside it, keep things.
func (h *host) disk() finding {
	const check = "disk"
	dir := location.Here(h.getenv, h.uid).State
	for dir != "/" && dir != "." && !h.is(dir) {
		dir = filepath.Dir(dir)
	}
	if dir == "." {
		dir = "/"
	}
	free, err := h.free(dir)
	if err != nil {
		return finding{check, warn, "cannot tell how much is free: " + err.Error(), ""}
	}
	detail := fmt.Sprintf("%s free at %s", size(free), dir)
	switch {
	case free < 1<<30:
		return finding{check, failed, detail, "make room: agentctl image list shows what can go (agentctl image remove)"}
	case free < 5<<30:
		return finding{check, warn, detail, "make room: agentctl image list shows what can go (agentctl image remove)"}
	}
	return finding{check, fine, detail, ""}
}

// install is the command that installs a package, by kind of distribution, or
// what to set on NixOS.
func (h *host) install(packages map[string]string) string {
	text, _ := h.read("/etc/os-release")
	var ids []string
	for line := range strings.SplitSeq(text, "\n") {
		for _, key := range []string{"ID=", "ID_LIKE="} {
			if value, ok := strings.CutPrefix(line, key); ok {
				ids = append(ids, strings.Fields(strings.Trim(value, `"'`))...)
			}
		}
	}
	for _, id := range ids {
		switch id {
		case "debian", "ubuntu":
			return "sudo apt install " + packages["debian"]
		case "fedora", "rhel", "centos":
			return "sudo dnf install " + packages["fedora"]
		case "arch":
			return "sudo pacman -S " + packages["arch"]
		case "suse", "opensuse":
			return "sudo zypper install " + packages["suse"]
		case "nixos":
			return "set " + packages["nixos"] + " and rebuild"
		}
	}
	return "install " + packages["debian"] + " with your system's package manager"
}

// podmanVersion asks podman's service: GET /libpod/version,
// https://docs.podman.io/en/latest/_static/api.html.
func podmanVersion(ctx context.Context, socket string) (string, error) {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://d/v4.0.0/libpod/version", nil)
	if err != nil {
		return "", err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return "", unwrapAll(err)
	}
	defer func() { _ = resp.Body.Close() }() // only read from
	var answer struct{ Version string }
	body := bufio.NewReader(io.LimitReader(resp.Body, 1<<20))
	if err := json.NewDecoder(body).Decode(&answer); err != nil || answer.Version == "" {
		return "", fmt.Errorf("it answers with %s, and not as podman does", resp.Status)
	}
	return answer.Version, nil
}

// unwrapAll returns the innermost cause, which is all that there is to say
// about a socket whose path was said already.
func unwrapAll(err error) error {
	for {
		inner, ok := err.(interface{ Unwrap() error })
		if !ok || inner.Unwrap() == nil {
			return err
		}
		err = inner.Unwrap()
	}
}

// freeBytes is what statfs(2) says an ordinary user may still write.
func freeBytes(dir string) (uint64, error) {
	var stat syscall.Statfs_t
	if err := syscall.Statfs(dir, &stat); err != nil {
		return 0, err
	}
	return stat.Bavail * uint64(stat.Bsize), nil //nolint:unconvert // the type differs between systems
}
