package container

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/test/image"
)

func TestWorkloadIsConfined(t *testing.T) {
	t.Parallel()
	d := backend(t)
	for img, ids := range map[string][2]string{image.RootName: {"0", "0"}, image.UserName: {"1000", "1000"}} {
		output, code := newBox(t, d).run(program(img, "id"))
		got := values(output)
		if code != 0 || got["uid"] != ids[0] || got["gid"] != ids[1] {
			t.Errorf("%s runs as %s:%s, exit %d", img, got["uid"], got["gid"], code)
		}
		for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
			if got[set] != "0000000000000000" {
				t.Errorf("%s: %s is %s", img, set, got[set])
			}
		}
		if got["NoNewPrivs"] != "1" || got["Seccomp"] != "2" {
			t.Errorf("%s: NoNewPrivs %s, Seccomp %s", img, got["NoNewPrivs"], got["Seccomp"])
		}
	}
	output, _ := newBox(t, d).run(program(image.RootName, "cat", "/proc/self/limits"))
	for line := range strings.Lines(output) {
		if fields := strings.Fields(line); strings.HasPrefix(line, "Max core file size") && (fields[4] != "0" || fields[5] != "0") {
			t.Errorf("cores are dumped: %s", line)
		}
		if fields := strings.Fields(line); strings.HasPrefix(line, "Max open files") && fields[3] == "1024" {
			t.Errorf("containers.conf's limits are lost: %s", line)
		}
	}
	output, _ = newBox(t, d).run(program(image.RootName, "cat", "/proc/self/uid_map"))
	if fields := strings.Fields(output); len(fields) < 3 || fields[1] == "0" && fields[2] == "4294967295" {
		t.Errorf("it is in the host's user namespace: %q", output)
	}
}

func TestAddedCapabilitiesAreTheOnlyOnes(t *testing.T) {
	t.Parallel()
	d := backend(t)
	for _, img := range []string{image.RootName, image.UserName} {
		spec := program(img, "id")
		spec.DriverOptions = json.RawMessage(`{"cap_add":["NET_BIND_SERVICE"]}`)
		output, _ := newBox(t, d).run(spec)
		got := values(output)
		const netBindService = "0000000000000400" // 1 << 10, capability.h
		if got["CapEff"] != netBindService || got["CapBnd"] != netBindService {
			t.Errorf("%s: effective %s, bounding %s", img, got["CapEff"], got["CapBnd"])
		}
	}
}

func TestMountsInside(t *testing.T) {
	t.Parallel()
	d := backend(t)
	dir := t.TempDir()
	spec := program(image.RootName, "mounts")
	spec.Mounts = []sandbox.Mount{
		{Kind: sandbox.MountWorkspace, Source: mkdir(t, dir, "w"), Target: "/workspace"},
		{Kind: sandbox.MountWorkspace, Source: mkdir(t, dir, "rw"), Target: "/open", ReadWrite: true},
		{Kind: sandbox.MountData, Source: mkdir(t, dir, "d"), Target: "/data"},
	}
	output, _ := newBox(t, d).run(spec)
	options := map[string][]string{}
	for line := range strings.Lines(output) {
		if f := strings.Fields(line); len(f) == 3 {
			options[f[0]] = append(strings.Split(f[2], ","), f[1])
		}
	}
	for target, want := range map[string][]string{
		"/workspace":   {"ro", "nosuid", "nodev"},
		"/open":        {"rw", "nosuid", "nodev"},
		"/data":        {"rw", "nosuid", "nodev"},
		"/run/choiros": {"rw", "nosuid", "nodev", "noexec"},
		"/run/guestd":  {"ro", "nosuid", "nodev"},
		"/run/secrets": {"rw", "nosuid", "nodev", "noexec", "tmpfs"},
		"/etc/hosts":   {"ro"},
		"/proc/sys":    {"ro"}, // and the like: what Podman protects
		"/sys":         {"ro"},
	} {
		for _, option := range want {
			if !slices.Contains(options[target], option) {
				t.Errorf("%s is mounted %q, want %s", target, options[target], option)
			}
		}
	}
	for target := range options {
		// The devices that every container has, see the OCI runtime
		// specification, and no other.
		if name, ok := strings.CutPrefix(target, "/dev/"); ok && !slices.Contains([]string{
			"null", "zero", "full", "random", "urandom", "tty", "pts", "shm", "mqueue", "console",
		}, name) {
			t.Errorf("the sandbox has %s", target)
		}
	}
}

func TestReadOnlyRootfs(t *testing.T) {
	t.Parallel()
	d := backend(t)
	for path, want := range map[string]int{"/new": 1, "/tmp/new": 0, "/run/choiros/new": 0} {
		spec := program(image.RootName, "touch", path)
		spec.DriverOptions = json.RawMessage(`{"read_only_rootfs":true}`)
		if output, code := newBox(t, d).run(spec); code != want {
			t.Errorf("touch %s: %d, want %d: %s", path, code, want, output)
		}
	}
}

// TestOwnership is the promise that data which a sandbox writes belongs to the
// agent's user outside, and is its own inside, whoever it runs as.
func TestOwnership(t *testing.T) {
	t.Parallel()
	d := backend(t)
	for name, test := range map[string]struct {
		image, user, options string
	}{
		"root":             {image: image.RootName},
		"user":             {image: image.UserName},
		"named":            {image: image.RootName, user: "app"},
		"number and group": {image: image.RootName, user: "1234:5678"},
		"number":           {image: image.RootName, user: "1000"},
		"user made root":   {image: image.UserName, user: "0"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			data, old := filepath.Join(dir, "new"), filepath.Join(dir, "old")
			// What the agent's user has already is writable inside.
			if err := os.WriteFile(old, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			b := newBox(t, d)
			spec := program(test.image, "write", "/data/new", "x")
			spec.User = test.user
			spec.Mounts = []sandbox.Mount{{Kind: sandbox.MountData, Source: dir, Target: "/data"}}
			b.start(spec)
			eventually(t, "the file is written", func() bool {
				info, err := os.Stat(data)
				return err == nil && info.Size() > 0
			})
			info, err := os.Stat(data)
			if err != nil {
				t.Fatal(err)
			}
			if stat := info.Sys().(*syscall.Stat_t); int(stat.Uid) != os.Getuid() || int(stat.Gid) != os.Getgid() {
				t.Errorf("it belongs to %d:%d, want %d:%d", stat.Uid, stat.Gid, os.Getuid(), os.Getgid())
			}
			if code, output, err := b.exec("/workload", "touch", "/data/old"); err != nil || code != 0 {
				t.Errorf("writing an older file: %d, %v, %s", code, err, output)
			}
		})
	}
}

func TestUsernsRoot(t *testing.T) {
	t.Parallel()
	d := backend(t)
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	b := newBox(t, d)
	spec := program(image.UserName, "touch", "/data/new")
	spec.DriverOptions = json.RawMessage(`{"userns":"root"}`)
	spec.Mounts = []sandbox.Mount{{Kind: sandbox.MountData, Source: dir, Target: "/data"}}
	if output, code := b.run(spec); code != 0 {
		t.Fatal(output)
	}
	info, err := os.Stat(filepath.Join(dir, "new"))
	if err != nil {
		t.Fatal(err)
	}
	if stat := info.Sys().(*syscall.Stat_t); int(stat.Uid) == os.Getuid() {
		t.Error("the workload's user is the host's, and not one of its subordinates")
	}
}

func TestUnknownUserNamesTheField(t *testing.T) {
	t.Parallel()
	d := backend(t)
	for _, user := range []string{"nobody-has-this-name", "app:nor-this", "4000000000:1"} {
		b := newBox(t, d)
		spec := program(image.RootName, "sleep")
		spec.User = user
		err := d.Create(t.Context(), b.ref, spec)
		var wrong *sandbox.FieldError
		if !errors.As(err, &wrong) || wrong.Field != "spec.user" {
			t.Errorf("user %s: %v, want an error about spec.user", user, err)
		}
	}
}

func TestWorkspaceIsReadOnlyUnlessAsked(t *testing.T) {
	t.Parallel()
	d := backend(t)
	dir := t.TempDir()
	for _, readWrite := range []bool{false, true} {
		spec := program(image.RootName, "touch", "/workspace/new")
		spec.Mounts = []sandbox.Mount{{Kind: sandbox.MountWorkspace, Source: dir, Target: "/workspace", ReadWrite: readWrite}}
		output, code := newBox(t, d).run(spec)
		if wrote := code == 0; wrote != readWrite {
			t.Errorf("read_write %v: exit %d: %s", readWrite, code, output)
		}
	}
}

func TestStartRefusesSourcesThatHaveMoved(t *testing.T) {
	t.Parallel()
	d := backend(t)
	b := newBox(t, d)
	dir := home(t)
	source := mkdir(t, dir, "source")
	spec := program(image.RootName, "sleep")
	spec.Mounts = []sandbox.Mount{{Kind: sandbox.MountData, Source: source, Target: "/data"}}
	b.must("Create", d.Create(t.Context(), b.ref, spec))
	if err := errors.Join(os.Remove(source), os.Symlink("/etc", source)); err != nil {
		t.Fatal(err)
	}
	if err := d.Start(t.Context(), b.ref); !errors.Is(err, sandbox.ErrInvalid) || !strings.Contains(err.Error(), "spec.mounts") {
		t.Errorf("Start: %v, want invalid", err)
	}
	if o, err := d.Inspect(t.Context(), b.ref); err != nil || o.State != sandbox.StateCreated {
		t.Errorf("it is %+v, %v", o, err)
	}
}

func TestConfigureNamesTheCommandThatIsNotThere(t *testing.T) {
	t.Parallel()
	d := backend(t)
	for command, want := range map[string]int{"/no/such/program": 127, "/etc/passwd": 126} {
		b := newBox(t, d)
		spec := program(image.RootName)
		spec.Entrypoint = []string{command}
		b.must("Create", d.Create(t.Context(), b.ref, spec))
		b.must("Start", d.Start(t.Context(), b.ref))
		if err := b.configure(guest.Configuration{}); err == nil || !strings.Contains(err.Error(), command) {
			t.Errorf("Configure: %v, want an error that names %s", err, command)
		}
		if o, err := d.Wait(t.Context(), b.ref); err != nil || o.ExitCode != want {
			t.Errorf("it is %+v, %v; want exit code %d", o, err, want)
		}
	}
	running := newBox(t, d)
	running.start(program(image.RootName, "sleep"))
	for command, sentinel := range map[string]error{"/no/such/program": sandbox.ErrNotFound, "/etc/passwd": sandbox.ErrDenied} {
		if code, _, err := running.exec(command); !errors.Is(err, sentinel) {
			t.Errorf("Exec of %s: %d, %v; want %v", command, code, err, sentinel)
		}
	}
}

func TestHostsFileDoesNotNameTheHost(t *testing.T) {
	t.Parallel()
	b := newBox(t, backend(t))
	if output, _ := b.run(program(image.RootName, "cat", "/etc/hosts")); output != hostsFile(b.ref.ID) {
		t.Errorf("/etc/hosts is\n%s", output)
	}
}

func TestEnvironmentIsNotTheHosts(t *testing.T) {
	t.Parallel()
	spec := program(image.RootName, "env")
	spec.Env = map[string]string{"OWN": "1", "PATH": "/own"}
	output, _ := newBox(t, backend(t)).run(spec)
	got := values(output)
	if got["OWN"] != "1" || got["PATH"] != "/own" {
		t.Errorf("the spec's variables are %q", got)
	}
	for name := range got {
		if !slices.Contains([]string{"OWN", "PATH", "HOME", "HOSTNAME", "container", "TERM"}, name) {
			t.Errorf("it has %s from somewhere", name)
		}
	}
}
