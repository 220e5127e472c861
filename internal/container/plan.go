package container

import (
	"context"
	"errors"
	"fmt"
	"math"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containers/podman/v5/libpod/define"
	"github.com/containers/podman/v5/pkg/bindings/images"
	entities "github.com/containers/podman/v5/pkg/domain/entities/types"
	"github.com/containers/podman/v5/pkg/specgen"
	"github.com/opencontainers/runtime-spec/specs-go"
	"go.podman.io/image/v5/manifest"
	"go.podman.io/storage/pkg/idtools"
	"go.podman.io/storage/types"

	"github.com/choiros/agent/internal/account"
	"github.com/choiros/agent/internal/sandbox"
)

// logSizeBytes bounds what is kept of a workload's output. When it is reached
// conmon begins anew.
const logSizeBytes = 64 << 20

// plan is all that a sandbox's container is made from.
type plan struct {
	name, owner string
	ref         sandbox.Ref
	spec        sandbox.Spec
	opts        options
	binds       []bind
	image       imageFacts
	guestdDir   string
	account     account.ID
	pasta       []string
	limits      sandbox.Limits
	uids, gids  int64 // how many there are
}

// imageFacts is what is needed to know of an image.
type imageFacts struct {
	id         string
	user       string
	entrypoint []string
	cmd        []string
}

// Validate implements sandbox.Validator.
func (d *Driver) Validate(ctx context.Context, spec sandbox.Spec) error {
	_, _, _, err := d.check(ctx, spec)
	return err
}

// check does what can be done of a plan without making anything.
func (d *Driver) check(ctx context.Context, spec sandbox.Spec) (options, []bind, *entities.ImageInspectReport, error) {
	fail := func(err error) (options, []bind, *entities.ImageInspectReport, error) {
		return options{}, nil, nil, err
	}
	if spec.Image == "" {
		return fail(sandbox.Unsupportedf("spec.machine", "this driver runs images only; give spec.image"))
	}
	opts, err := parseOptions(spec.DriverOptions)
	if err != nil {
		return fail(err)
	}
	conn, err := d.connect(ctx)
	if err != nil {
		return fail(err)
	}
	binds, err := resolveMounts(spec.Mounts, conn.socket)
	if err != nil {
		return fail(err)
	}
	facts, err := d.facts(ctx)
	if err != nil {
		return fail(err)
	}
	if err := checkLimits(spec.Resources, facts); err != nil {
		return fail(err)
	}
	if err := checkGuestd(d.cfg.GuestdDir); err != nil {
		return fail(err)
	}
	image, err := d.image(ctx, spec.Image)
	if err != nil {
		return fail(err)
	}
	if len(argv(spec, image.Config.Entrypoint, image.Config.Cmd)) == 0 {
		return fail(sandbox.Invalidf("spec.command", "the image names no command, so the spec has to"))
	}
	if a, ok := account.Of(userOf(spec, image)); ok && opts.Userns == usernsAuto {
		if err := checkAccount(a, userOf(spec, image), facts); err != nil {
			return fail(err)
		}
	}
	return opts, binds, image, nil
}

// image looks an image up. It never pulls one.
func (d *Driver) image(ctx context.Context, reference string) (*entities.ImageInspectReport, error) {
	var image *entities.ImageInspectReport
	err := d.call(ctx, readLimit, func(ctx context.Context) (err error) {
		image, err = images.GetImage(ctx, reference, nil)
		return err
	})
	if isNotFound(err) {
		return nil, &sandbox.FieldError{
			Field:   "spec.image",
			Problem: reference + " is not on this host; get it with agentctl image load or agentctl image pull",
			Err:     sandbox.ErrNotFound,
		}
	}
	if err != nil {
		return nil, err
	}
	if image.ImageData == nil || image.Config == nil {
		return nil, &sandbox.UnavailableError{Err: fmt.Errorf("podman says nothing of image %s", reference), Cure: upgradeCure}
	}
	return image, nil
}

// checkLimits refuses limits that this host would not enforce.
func checkLimits(r sandbox.Resources, facts *hostFacts) error {
	for _, limit := range []struct {
		field           string
		given, enforced bool
	}{
		{"spec.resources.cpu_millis", r.CPUMillis > 0, facts.limits.CPU},
		{"spec.resources.memory_mib", r.MemoryMiB > 0, facts.limits.Memory},
		{"spec.resources.pids", r.Pids > 0, facts.limits.Pids},
	} {
		if limit.given && !limit.enforced {
			return sandbox.Unsupportedf(limit.field, "cannot be enforced on this host: %s; %s", facts.whyUnlimited, facts.limitsCure)
		}
	}
	return nil
}

// checkAccount refuses a user for whom the host has no number left.
func checkAccount(a account.ID, user string, facts *hostFacts) error {
	if int64(a.UID) < facts.uids && int64(a.GID) < facts.gids {
		return nil
	}
	return sandbox.Invalidf("spec.user", "%s is beyond the %d ids that containers of this user have; "+
		"as root: usermod --add-subuids and --add-subgids give more", user, min(facts.uids, facts.gids))
}

// userOf returns whom a workload runs as, as user[:group].
func userOf(spec sandbox.Spec, image *entities.ImageInspectReport) string {
	if spec.User != "" {
		return spec.User
	}
	return image.Config.User
}

// plan finds out all that a container is made from.
func (d *Driver) plan(ctx context.Context, ref sandbox.Ref, spec sandbox.Spec) (plan, error) {
	opts, binds, image, err := d.check(ctx, spec)
	if err != nil {
		return plan{}, err
	}
	facts, err := d.facts(ctx)
	if err != nil {
		return plan{}, err
	}
	p := plan{
		name: d.name(ref.ID), owner: d.cfg.Owner, ref: ref, spec: spec, opts: opts, binds: binds,
		image: imageFacts{
			id: image.ID, user: image.Config.User, entrypoint: image.Config.Entrypoint, cmd: image.Config.Cmd,
		},
		guestdDir: d.cfg.GuestdDir,
		limits:    facts.limits, uids: facts.uids, gids: facts.gids,
	}
	if opts.Network == networkInternet {
		p.pasta = pastaOptions(facts.pastaDate, hasIPv4Route())
	}
	if opts.Userns == usernsAuto {
		user := userOf(spec, image)
		if p.account, err = d.account(ctx, ref.ID, image, user); err != nil {
			return plan{}, err
		}
		if err := checkAccount(p.account, user, facts); err != nil {
			return plan{}, err
		}
	}
	return p, nil
}

// container writes a plan in Podman's terms. What the API would take from
// containers.conf where it is not said, is said, if it matters.
func (p plan) container() *specgen.SpecGenerator {
	s := specgen.NewSpecGenerator(p.image.id, false)
	no, yes := false, true

	s.Name = p.name
	s.Hostname = p.ref.ID
	s.RawImageName = p.spec.Image
	s.Labels = map[string]string{labelOwner: p.owner, labelSandbox: p.ref.ID}
	s.Entrypoint = []string{path.Join(guestdTarget, guestdName)}
	s.Command = append([]string{"--"}, argv(p.spec, p.image.entrypoint, p.image.cmd)...)
	s.Env = p.spec.Env
	s.EnvHost, s.HTTPProxy = &no, &no
	s.WorkDir, s.CreateWorkingDir = p.spec.WorkingDir, &yes
	s.User = p.spec.User
	s.RestartPolicy = define.RestartPolicyNo
	s.SdNotifyMode = define.SdNotifyModeIgnore
	s.Systemd = "false"
	// An image's health check would be run by timers of systemd's.
	s.HealthConfig = &manifest.Schema2HealthConfig{
		Test: []string{define.HealthConfigTestNone},
		// Of no effect, but Podman 5.4 refuses every later update of the
		// container without them ("healthcheck-timeout must be at least 1 second").
		Interval: 30 * time.Second, Timeout: 30 * time.Second, Retries: 3,
	}
	s.LogConfiguration = &specgen.LogConfig{Driver: define.KubernetesLogging, Size: logSizeBytes}

	p.harden(s)
	s.NetNS, s.NetworkOptions = network(p.opts.Network, p.pasta)
	s.UseImageHosts = &yes // that is: not Podman's; see hostsFile
	s.Mounts = p.mounts()
	s.ImageVolumeMode = "ignore"
	if p.opts.ReadOnlyRootfs {
		s.ImageVolumeMode = define.TypeTmpfs
	}
	s.ResourceLimits = resources(p.spec.Resources, p.limits)
	return s
}

// argv is the workload's command line: the spec's entrypoint, or else the
// image's, and the spec's command, or else the image's.
func argv(spec sandbox.Spec, entrypoint, cmd []string) []string {
	if len(spec.Entrypoint) > 0 {
		entrypoint = spec.Entrypoint
	}
	if len(spec.Command) > 0 {
		cmd = spec.Command
	}
	if len(entrypoint) == 1 && entrypoint[0] == "" {
		entrypoint = nil // how a Dockerfile takes its base image's away
	}
	return slices.Concat(entrypoint, cmd)
}

// harden closes what can be closed.
func (p plan) harden(s *specgen.SpecGenerator) {
	no, yes := false, true
	s.Privileged, s.NoNewPrivileges = &no, &yes
	s.CapDrop, s.CapAdd = []string{"ALL"}, p.opts.CapAdd
	s.ReadOnlyFilesystem, s.ReadWriteTmpfs = &p.opts.ReadOnlyRootfs, &p.opts.ReadOnlyRootfs
	s.Init = &no
	private := specgen.Namespace{NSMode: specgen.Private}
	s.PidNS, s.IpcNS, s.UtsNS, s.CgroupNS = private, private, private, private
	s.UserNS = specgen.Namespace{NSMode: specgen.Host} // the rootless user's own
	if p.account != (account.ID{}) {
		// Podman can work these mappings out itself ("keep-id"), but not twice
		// at the same time: it reads /etc/subuid with a library that is not
		// safe for threads, and the whole service dies of it (seen in 5.4.2,
		// SIGSEGV in subid_get_uid_ranges).
		s.UserNS = private
		s.IDMappings = &types.IDMappingOptions{
			UIDMap: swapWithRoot(p.account.UID, p.uids),
			GIDMap: swapWithRoot(p.account.GID, p.gids),
		}
	}
	s.Rlimits = []specs.POSIXRlimit{{Type: "core"}}
}

// swapWithRoot maps the ids of a container to those of the rootless user's own
// namespace, of which there are count, such that id is that namespace's 0: the
// host's user. The others keep their order.
func swapWithRoot(id uint32, count int64) []idtools.IDMap {
	at, n := int(id), int(count)
	var maps []idtools.IDMap
	if at > 0 {
		maps = append(maps, idtools.IDMap{ContainerID: 0, HostID: 1, Size: at})
	}
	maps = append(maps, idtools.IDMap{ContainerID: at, HostID: 0, Size: 1})
	if at+1 < n {
		maps = append(maps, idtools.IDMap{ContainerID: at + 1, HostID: at + 1, Size: n - at - 1})
	}
	return maps
}

// mounts are a sandbox's own, then those that its spec asks for.
func (p plan) mounts() []specs.Mount {
	mounts := []specs.Mount{
		bindMount(guestDir(p.ref), guestTarget, "rw", "noexec"),
		bindMount(p.guestdDir, guestdTarget, "ro"),
		{
			Type: define.TypeTmpfs, Source: define.TypeTmpfs, Destination: secretsTarget,
			// Podman would fill it with what the image has in that place.
			Options: []string{"rw", "mode=1777", "size=8m", "nosuid", "nodev", "noexec", "notmpcopyup"},
		},
		bindMount(hostsPath(p.ref), "/etc/hosts", "ro", "noexec"),
	}
	for _, b := range p.binds {
		if b.writable {
			mounts = append(mounts, bindMount(b.source, b.target, "rw"))
		} else {
			mounts = append(mounts, bindMount(b.source, b.target, "ro"))
		}
	}
	return mounts
}

// bindMount binds recursively: the kernel lets no user namespace show a folder
// without what is mounted below it.
func bindMount(source, target string, options ...string) specs.Mount {
	return specs.Mount{
		Type: define.TypeBind, Source: source, Destination: target,
		Options: append([]string{"rbind", "rprivate", "nosuid", "nodev"}, options...),
	}
}

// cpuPeriodMicros is the time over which a share of the CPU is measured out.
const cpuPeriodMicros uint64 = 100_000

// cpuQuota is so much of a CPU in the runtime's terms.
func cpuQuota(millis uint32) *specs.LinuxCPU {
	period, quota := cpuPeriodMicros, int64(millis)*int64(cpuPeriodMicros)/1000
	return &specs.LinuxCPU{Period: &period, Quota: &quota}
}

// resources writes limits in the runtime's terms, each one of those that can be
// enforced: a zero lifts it. No limit on CPU is to say nothing: under systemd's
// cgroup manager a quota of -1 becomes one of a hundredth of a CPU (seen with
// Podman 5.4, crun 1.21 and systemd 257).
func resources(r sandbox.Resources, enforced sandbox.Limits) *specs.LinuxResources {
	limits := new(specs.LinuxResources)
	if enforced.CPU && r.CPUMillis > 0 {
		limits.CPU = cpuQuota(r.CPUMillis)
	}
	if enforced.Memory {
		memory := int64(-1)
		if r.MemoryMiB > 0 {
			memory = int64(min(r.MemoryMiB, math.MaxInt64>>20)) << 20
		}
		swap := memory // memory and swap together: none beyond the limit
		limits.Memory = &specs.LinuxMemory{Limit: &memory, Swap: &swap}
	}
	if enforced.Pids {
		pids := int64(-1)
		if r.Pids > 0 {
			pids = int64(r.Pids)
		}
		limits.Pids = &specs.LinuxPids{Limit: pids}
	}
	return limits
}

// isNotFound reports whether Podman said that there is no such thing.
func isNotFound(err error) bool {
	var answer *podmanError
	return errors.As(err, &answer) && errors.Is(answer, sandbox.ErrNotFound)
}

// ownSources are the sources of a container's mounts that come from its spec.
func ownSources(data *define.InspectContainerData) []string {
	var sources []string
	for _, m := range data.Mounts {
		own := []string{guestTarget, guestdTarget, secretsTarget, "/etc/hosts"}
		if m.Type == define.TypeBind && !slices.Contains(own, m.Destination) && !strings.HasPrefix(m.Destination, "/run/.") {
			sources = append(sources, m.Source)
		}
	}
	slices.Sort(sources)
	return slices.Compact(sources)
}
