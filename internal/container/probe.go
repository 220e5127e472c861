package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/containers/podman/v5/libpod/define"
	"github.com/containers/podman/v5/pkg/bindings/containers"
	"github.com/containers/podman/v5/pkg/bindings/system"
	"github.com/containers/podman/v5/pkg/specgen"
	"go.podman.io/storage/pkg/idtools"

	"github.com/choiros/agent/internal/sandbox"
)

// hostFacts is what is known of the host and its Podman that does not change
// while both run.
type hostFacts struct {
	version string
	limits  sandbox.Limits
	// whyUnlimited says why not all limits can be enforced, and its cure.
	whyUnlimited, limitsCure string
	// uids and gids are how many ids a container may have.
	uids, gids int64
	// pastaDate is of the form 20240814, or 0 if unknown.
	pastaDate int
	// noEvents: Podman does not write down what happens.
	noEvents bool
	warnings []string
}

// Probe implements sandbox.Driver.
func (d *Driver) Probe(ctx context.Context) (sandbox.Report, error) {
	// What was found once may be gone or another by now.
	d.conn.Store(nil)
	facts, err := d.inquire(ctx)
	if err != nil {
		return sandbox.Report{}, err
	}
	if err := checkGuestd(d.cfg.GuestdDir); err != nil {
		return sandbox.Report{}, err
	}
	return sandbox.Report{Version: facts.version, Limits: facts.limits, Warnings: facts.warnings}, nil
}

// facts returns what was last found out about the host, finding it out first
// if need be. To ask Podman takes it 0.1 s to 3 s.
func (d *Driver) facts(ctx context.Context) (*hostFacts, error) {
	if facts := d.host.Load(); facts != nil {
		return facts, nil
	}
	return d.inquire(ctx)
}

// inquire finds out about the host.
func (d *Driver) inquire(ctx context.Context) (*hostFacts, error) {
	var info *define.Info
	err := d.call(ctx, readLimit, func(ctx context.Context) (err error) {
		info, err = system.Info(ctx, nil)
		return err
	})
	if err != nil {
		return nil, err
	}
	if info.Host == nil {
		return nil, &sandbox.UnavailableError{Err: errors.New("podman says nothing of its host"), Cure: upgradeCure}
	}
	if !info.Host.Security.Rootless {
		return nil, &sandbox.UnavailableError{
			Err:  errors.New("this podman runs as root; sandboxes are only run by a rootless one"),
			Cure: userCure,
		}
	}
	disabled := false
	if len(info.Host.CgroupControllers) > 0 {
		if disabled, err = d.cgroupsDisabled(ctx); err != nil {
			return nil, err
		}
	}
	facts := judge(info, disabled)
	d.host.Store(facts)
	return facts, nil
}

// judge draws the conclusions from what Podman says of the host.
func judge(info *define.Info, cgroupsDisabled bool) *hostFacts {
	host := info.Host
	has := func(controller string) bool {
		return host.CgroupsVersion == "v2" && !cgroupsDisabled && slices.Contains(host.CgroupControllers, controller)
	}
	facts := &hostFacts{
		version:   info.Version.Version,
		limits:    sandbox.Limits{CPU: has("cpu"), Memory: has("memory"), Pids: has("pids")},
		uids:      count(host.IDMappings.UIDMap),
		gids:      count(host.IDMappings.GIDMap),
		pastaDate: pastaDate(host.Pasta),
		noEvents:  host.EventLogger == "none",
	}
	warn := func(format string, args ...any) {
		facts.warnings = append(facts.warnings, fmt.Sprintf(format, args...))
	}
	if facts.limits != (sandbox.Limits{CPU: true, Memory: true, Pids: true}) {
		facts.whyUnlimited, facts.limitsCure = explainLimits(host, cgroupsDisabled)
		warn("limits on %s cannot be enforced: %s; %s", missing(facts.limits), facts.whyUnlimited, facts.limitsCure)
	}
	if ids := min(facts.uids, facts.gids); ids < 1000 {
		warn("there are only %d user ids for containers, too few for most images; "+
			"as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 <user>, then podman system migrate", ids)
	}
	if host.Pasta.Executable == "" {
		warn("pasta is not installed, so only sandboxes without a network start; install the package passt")
	}
	if !host.Security.SECCOMPEnabled {
		warn("podman runs without seccomp, which leaves sandboxes the kernel's rarer system calls; install the package libseccomp")
	}
	if facts.noEvents {
		warn("podman's events are off, so the end of a sandbox is noticed late; " +
			"remove events_logger = \"none\" from containers.conf")
	}
	if info.Store != nil && info.Store.GraphDriverName == "vfs" {
		warn("podman stores images with vfs, which copies every image whole for every sandbox; " +
			"set driver = \"overlay\" in storage.conf, then podman system reset")
	}
	if user := lingerless(); user != "" {
		warn("sandboxes end when %s logs out; loginctl enable-linger %s", user, user)
	}
	return facts
}

// explainLimits says why limits cannot be enforced and what mends it.
func explainLimits(host *define.HostInfo, cgroupsDisabled bool) (why, cure string) {
	switch {
	case cgroupsDisabled:
		return "containers.conf has cgroups = \"disabled\"", "remove that line from containers.conf"
	case host.CgroupsVersion != "v2":
		return "the host uses cgroups " + host.CgroupsVersion + ", whose controllers only root has",
			"boot with systemd.unified_cgroup_hierarchy=1"
	default:
		has := strings.Join(host.CgroupControllers, ", ")
		if has == "" {
			has = "none"
		}
		return "of the cgroup controllers this user has " + has,
			"put \"[Service]\\nDelegate=cpu cpuset io memory pids\" into /etc/systemd/system/user@.service.d/delegate.conf, " +
				"then systemctl daemon-reload and log in anew"
	}
}

// missing names the limits that cannot be enforced.
func missing(limits sandbox.Limits) string {
	var names []string
	for name, enforced := range map[string]bool{"CPU": limits.CPU, "memory": limits.Memory, "pids": limits.Pids} {
		if !enforced {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

func count(mappings []idtools.IDMap) int64 {
	var n int64
	for _, m := range mappings {
		n += int64(m.Size)
	}
	return n
}

var datePattern = regexp.MustCompile(`20\d{6}`)

// pastaDate finds the date that is pasta's version. Not every distribution
// says it in the same place.
func pastaDate(pasta define.PastaInfo) int {
	for _, text := range []string{pasta.Version, pasta.Package} {
		if date, err := strconv.Atoi(datePattern.FindString(text)); err == nil {
			return date
		}
	}
	return 0
}

// cgroupsDisabled reports whether containers.conf turns cgroups off, upon which
// Podman takes limits and ignores them. Nothing in the API says so but a
// container, so one is made, of no image, and removed; it never runs.
func (d *Driver) cgroupsDisabled(ctx context.Context) (bool, error) {
	name := strings.TrimSuffix(d.prefix(), "-") // no sandbox's
	spec := specgen.NewSpecGeneratorWithRootfs("/")
	spec.Name = name
	spec.Labels = map[string]string{labelOwner: d.cfg.Owner}
	spec.Command = []string{"/"}
	spec.NetNS = specgen.Namespace{NSMode: specgen.NoNetwork}
	var mode string
	err := d.settle(ctx, readLimit, func(ctx context.Context) error {
		// If it exists, another process is here too, or one was and is no more.
		_, created := containers.CreateWithSpec(ctx, spec, nil)
		data, err := containers.Inspect(ctx, name, nil)
		if err != nil {
			return errors.Join(created, err)
		}
		if data.HostConfig != nil {
			mode = data.HostConfig.Cgroups
		}
		_, err = containers.Remove(ctx, name, new(containers.RemoveOptions).WithForce(true).WithIgnore(true))
		return err
	})
	if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		return false, fmt.Errorf("find out about cgroups: %w", err)
	}
	return mode == "disabled", nil
}

// checkSocketOwner refuses a socket that is not this user's: behind root's is
// root's Podman.
func checkSocketOwner(socket string, uid int) error {
	info, err := os.Stat(socket)
	if err != nil {
		return socketError(socket, err)
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !ok || info.Mode().Type() != os.ModeSocket:
		return &sandbox.UnavailableError{Err: fmt.Errorf("%s is not a socket", socket), Cure: startCure}
	case stat.Uid == 0:
		return &sandbox.UnavailableError{
			Err:  fmt.Errorf("the podman at %s is root's; sandboxes are only run by a rootless one", socket),
			Cure: userCure,
		}
	case int(stat.Uid) != uid:
		return &sandbox.UnavailableError{
			Err:  fmt.Errorf("the podman at %s is that of the user with id %d", socket, stat.Uid),
			Cure: userCure,
		}
	}
	return nil
}

// installed reports whether there is a podman to start.
func installed() bool {
	return slices.ContainsFunc([]string{
		"/usr/bin", "/usr/local/bin", "/run/current-system/sw/bin", "/opt/homebrew/bin", "/opt/podman/bin",
	}, func(dir string) bool {
		_, err := os.Stat(filepath.Join(dir, "podman"))
		return err == nil
	})
}

// lingerless returns this user's name if systemd ends the user's processes at
// logout.
func lingerless() string {
	if runtime.GOOS != "linux" {
		return ""
	}
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return "" // no systemd, nobody to end them
	}
	name := userName(os.Getuid())
	if name == "" {
		return ""
	}
	if _, err := os.Stat(filepath.Join("/var/lib/systemd/linger", name)); err == nil {
		return ""
	}
	return name
}

// userName returns the name of a user of the host, or "".
func userName(uid int) string {
	passwd, err := os.ReadFile("/etc/passwd")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(passwd)) {
		if fields := strings.Split(line, ":"); len(fields) > 2 && fields[2] == strconv.Itoa(uid) {
			return fields[0]
		}
	}
	return ""
}
