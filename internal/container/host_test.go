package container

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containers/podman/v5/libpod/define"
	"go.podman.io/storage/pkg/idtools"

	"github.com/choiros/agent/internal/sandbox"
)

// goodInfo is what Podman says of a host on which all is well.
func goodInfo() *define.Info {
	ids := []idtools.IDMap{{ContainerID: 0, HostID: 1000, Size: 1}, {ContainerID: 1, HostID: 100000, Size: 65536}}
	return &define.Info{
		Host: &define.HostInfo{
			CgroupsVersion: "v2", CgroupControllers: []string{"cpu", "io", "memory", "pids"},
			IDMappings: define.IDMappings{UIDMap: ids, GIDMap: ids},
			Pasta:      define.PastaInfo{Executable: "/usr/bin/pasta", Package: "passt_0.0~git20250503.587980c-2_amd64"},
			Security:   define.SecurityInfo{Rootless: true, SECCOMPEnabled: true},
		},
		Store:   &define.StoreInfo{GraphDriverName: "overlay"},
		Version: define.Version{Version: "5.4.2"},
	}
}

func TestJudge(t *testing.T) {
	t.Parallel()
	all := sandbox.Limits{CPU: true, Memory: true, Pids: true}
	for name, test := range map[string]struct {
		change   func(info *define.Info)
		disabled bool
		limits   sandbox.Limits
		warning  string
	}{
		"good":             {func(*define.Info) {}, false, all, ""},
		"cgroups disabled": {func(*define.Info) {}, true, sandbox.Limits{}, "containers.conf"},
		"no controllers": {
			func(i *define.Info) { i.Host.CgroupControllers = nil }, false,
			sandbox.Limits{},
			"limits on CPU, memory, pids cannot be enforced",
		},
		"not delegated": {
			func(i *define.Info) { i.Host.CgroupControllers = []string{"memory", "pids"} }, false,
			sandbox.Limits{Memory: true, Pids: true},
			"Delegate=cpu",
		},
		"version 1":  {func(i *define.Info) { i.Host.CgroupsVersion = "v1" }, false, sandbox.Limits{}, "unified_cgroup_hierarchy"},
		"no sub-ids": {func(i *define.Info) { i.Host.IDMappings.UIDMap = i.Host.IDMappings.UIDMap[:1] }, false, all, "--add-subuids"},
		"no pasta":   {func(i *define.Info) { i.Host.Pasta = define.PastaInfo{} }, false, all, "package passt"},
		"no seccomp": {func(i *define.Info) { i.Host.Security.SECCOMPEnabled = false }, false, all, "seccomp"},
		"no events":  {func(i *define.Info) { i.Host.EventLogger = "none" }, false, all, "events_logger"},
		"vfs":        {func(i *define.Info) { i.Store.GraphDriverName = "vfs" }, false, all, "overlay"},
	} {
		info := goodInfo()
		test.change(info)
		facts := judge(info, test.disabled)
		if facts.limits != test.limits {
			t.Errorf("%s: limits %+v, want %+v", name, facts.limits, test.limits)
		}
		matches := slices.ContainsFunc(facts.warnings, func(w string) bool { return strings.Contains(w, test.warning) })
		// Whether this machine lingers is not of this test.
		others := slices.DeleteFunc(slices.Clone(facts.warnings), func(w string) bool { return strings.Contains(w, "linger") })
		if test.warning != "" && !matches || test.warning == "" && len(others) > 0 {
			t.Errorf("%s: warnings %q, want one with %q", name, facts.warnings, test.warning)
		}
	}
}

func TestPastaOptions(t *testing.T) {
	t.Parallel()
	for date, want := range map[int]bool{0: true, 2024_08_06: false, 2024_08_14: true, 2025_05_03: true} {
		options := pastaOptions(date, true)
		if got := slices.Contains(options, "--map-guest-addr"); got != want {
			t.Errorf("pasta of %d: %q", date, options)
		}
		if !slices.Contains(options, "--no-map-gw") || !slices.Contains(options, "--ipv4-only") {
			t.Errorf("pasta of %d: %q", date, options)
		}
	}
	if slices.Contains(pastaOptions(0, false), "--ipv4-only") {
		t.Error("a host without IPv4 would have no network")
	}
	for want, pasta := range map[int]define.PastaInfo{
		20250503: {Package: "passt_0.0~git20250503.587980c-2+deb13u1_amd64"},
		20240806: {Package: "passt-0^20240806.gee36266-2.el9.x86_64", Version: "pasta 0^20240806.gee36266-2.el9"},
		0:        {Package: "Unknown"},
	} {
		if got := pastaDate(pasta); got != want {
			t.Errorf("%+v is of %d, want %d", pasta, got, want)
		}
	}
}

func TestDefaultRoute(t *testing.T) {
	t.Parallel()
	const head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
	for table, want := range map[string]bool{
		"":   false,
		head: false,
		head + "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n":                                                                         false,
		head + "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n":                                                                         true,
		head + "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n" + "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n":        true,
		head + "tun0\t00000000\t010200C0\t0003\t0\t0\t0\t00000080\t0\t0\t0\n" + "tun0\t00000080\t010200C0\t0003\t0\t0\t0\t00000080\t0\t0\t0\ngarbage": false,
	} {
		if got := defaultRouteIn(table); got != want {
			t.Errorf("%q: %v, want %v", table, got, want)
		}
	}
}

// home is the test's folder without symbolic links.
func home(t *testing.T) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func mkdir(t *testing.T, path ...string) string {
	t.Helper()
	dir := filepath.Join(path...)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestResolveMounts(t *testing.T) {
	t.Parallel()
	dir := home(t)
	real := mkdir(t, dir, "real")
	if err := os.Symlink("real", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	binds, err := resolveMounts([]sandbox.Mount{
		{Kind: sandbox.MountData, Source: filepath.Join(dir, "link"), Target: "/data"},
		{Kind: sandbox.MountWorkspace, Source: real, Target: "/workspace"},
	}, "/nowhere/podman.sock")
	if err != nil || len(binds) != 2 || binds[0] != (bind{real, "/data", true}) || binds[1] != (bind{real, "/workspace", false}) {
		t.Errorf("%+v, %v; want the folder behind the link, and read-only sources", binds, err)
	}
	if err := checkUnmoved(real); err != nil {
		t.Errorf("nothing has changed: %v", err)
	}
	if err := checkUnmoved(filepath.Join(dir, "link")); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("what has become a link: %v, want invalid", err)
	}
}

func TestResolveMountsNamesTheField(t *testing.T) {
	t.Parallel()
	dir := home(t)
	good := mkdir(t, dir, "good")
	mkdir(t, dir, "good", "sub")
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	closed := mkdir(t, dir, "closed")
	if err := os.Chmod(closed, 0o500); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(mkdir(t, dir, "run", "podman"), "podman.sock")
	type mounts = []sandbox.Mount
	data := func(source, target string) sandbox.Mount {
		return sandbox.Mount{Kind: sandbox.MountData, Source: source, Target: target}
	}
	workspace := func(source, target string) sandbox.Mount {
		return sandbox.Mount{Kind: sandbox.MountWorkspace, Source: source, Target: target}
	}
	for name, test := range map[string]struct {
		mounts mounts
		field  string
	}{
		"missing":             {mounts{data(good, "/a"), data(filepath.Join(dir, "missing"), "/b")}, "spec.mounts[1].source"},
		"file":                {mounts{data(file, "/a")}, "spec.mounts[0].source"},
		"below a file":        {mounts{data(filepath.Join(file, "x"), "/a")}, "spec.mounts[0].source"},
		"not writable":        {mounts{data(closed, "/a")}, "spec.mounts[0].source"},
		"podman's socket":     {mounts{workspace(filepath.Join(dir, "run"), "/a")}, "spec.mounts[0].source"},
		"everything":          {mounts{workspace("/", "/a")}, "spec.mounts[0].source"},
		"over /etc":           {mounts{data(good, "/etc")}, "spec.mounts[0].target"},
		"over /run":           {mounts{data(good, "/run")}, "spec.mounts[0].target"},
		"over hosts":          {mounts{data(good, "/etc/hosts")}, "spec.mounts[0].target"},
		"in the guest's":      {mounts{data(good, "/run/choiros/x")}, "spec.mounts[0].target"},
		"over guestd":         {mounts{data(good, "/run/guestd")}, "spec.mounts[0].target"},
		"in the secrets'":     {mounts{data(good, "/run/secrets/x")}, "spec.mounts[0].target"},
		"nested in read-only": {mounts{workspace(good, "/w"), data(good, "/w/new")}, "spec.mounts[1].target"},
		"a disk": {
			mounts{{Kind: sandbox.MountDisk, Source: filepath.Join(dir, "disk.img"), Target: "/a", SizeMiB: 16}}, "spec.mounts[0].kind",
		},
	} {
		if os.Getuid() == 0 && name == "not writable" {
			continue // nothing is closed to root
		}
		_, err := resolveMounts(test.mounts, socket)
		var wrong *sandbox.FieldError
		if !errors.As(err, &wrong) || wrong.Field != test.field {
			t.Errorf("%s: %v, want an error about %s", name, err, test.field)
		}
	}
	for name, fine := range map[string]mounts{
		"not writable and read": {workspace(closed, "/a")},
		"nested in writable":    {data(good, "/w"), data(good, "/w/new")},
		"nested in what is":     {workspace(good, "/w"), data(good, "/w/sub")},
		"beside /etc":           {data(good, "/etc2"), data(good, "/etc/app"), data(good, "/run/app")},
	} {
		if _, err := resolveMounts(fine, socket); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMountBelow(t *testing.T) {
	t.Parallel()
	const table = `22 1 0:21 / /proc rw - proc proc rw
30 1 8:1 / / rw - ext4 /dev/sda rw
31 30 8:2 / /home/u/pro\040ject/cache rw - ext4 /dev/sdb rw
32 30 8:2 / /home/user rw - ext4 /dev/sdb rw
`
	for dir, want := range map[string]string{
		"/home/u/pro ject":       "/home/u/pro ject/cache",
		"/home/u/pro ject/cache": "",
		"/home/u/pro":            "",
		"/home/use":              "",
		"/home":                  "/home/u/pro ject/cache",
	} {
		if got := mountBelow(table, dir); got != want {
			t.Errorf("below %s is %q, want %q", dir, got, want)
		}
	}
}

func TestReadOnlyMountOfMountsIsRefused(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/proc/self/mountinfo"); err != nil {
		t.Skip("only Linux tells what is mounted")
	}
	mount := sandbox.Mount{Kind: sandbox.MountWorkspace, Source: "/dev", Target: "/w"}
	if err := checkReadOnly("f", "/dev", mount); !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("/dev, with /dev/pts mounted in it: %v", err)
	}
	mount.ReadWrite = true
	if err := checkReadOnly("f", "/dev", mount); err != nil {
		t.Errorf("when it may be written to: %v", err)
	}
}

func TestEmptyDirRemovesWhatAGuestHasClosed(t *testing.T) {
	t.Parallel()
	ref := sandbox.Ref{ID: "a", Dir: home(t)}
	if err := emptyDir(ref); err != nil {
		t.Errorf("without a folder: %v", err)
	}
	if err := makeDir(ref); err != nil {
		t.Fatal(err)
	}
	outside := mkdir(t, ref.Dir, "outside")
	kept := filepath.Join(outside, "kept")
	guest := guestDir(ref)
	deep := mkdir(t, guest, "a", "b")
	for path, text := range map[string]string{kept: "x", filepath.Join(deep, "file"): "y", filepath.Join(guest, "7.sock"): ""} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside, filepath.Join(guest, "link")); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{deep, filepath.Dir(deep)} {
		if err := os.Chmod(dir, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := emptyDir(ref); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(guest); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
	if _, err := os.Stat(kept); err != nil {
		t.Errorf("what a link led to: %v", err)
	}
	if info, err := os.Stat(outside); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("the mode of what a link led to: %v, %v", info.Mode(), err)
	}
}

func TestNewWantsAnOwner(t *testing.T) {
	t.Parallel()
	for _, owner := range []string{"", "abc", "0123ABCD", "0123456g", "012345678"} {
		if _, err := New(Config{Owner: owner}); err == nil {
			t.Errorf("owner %q is accepted", owner)
		}
	}
}
