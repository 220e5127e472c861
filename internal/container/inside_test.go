package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/test/image"
)

// box is a sandbox of a test's.
type box struct {
	t   *testing.T
	d   *Driver
	ref sandbox.Ref
}

var boxes atomic.Int64

// newBox returns a sandbox that does not exist yet, and is deleted at the end.
func newBox(t *testing.T, d *Driver) *box {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "ctr")
	if err != nil {
		t.Fatal(err)
	}
	b := &box{t, d, sandbox.Ref{ID: fmt.Sprintf("b%d", boxes.Add(1)), Dir: dir}}
	t.Cleanup(func() {
		if err := d.Delete(context.Background(), b.ref); err != nil {
			t.Errorf("Delete: %v", err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("what the sandbox wrote cannot be removed: %v", err)
		}
		checkLeaks(t, d.cfg.Owner, b.ref)
	})
	return b
}

func (b *box) must(what string, err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatalf("%s: %v", what, err)
	}
}

// start creates and starts a sandbox.
func (b *box) start(spec sandbox.Spec) {
	b.t.Helper()
	b.must("Create", b.d.Create(b.t.Context(), b.ref, spec))
	b.must("Start", b.d.Start(b.t.Context(), b.ref))
}

// run runs a sandbox to its end and returns what it printed and its status.
func (b *box) run(spec sandbox.Spec) (output string, code int) {
	b.t.Helper()
	b.start(spec)
	o, err := b.d.Wait(b.t.Context(), b.ref)
	b.must("Wait", err)
	return b.output(), o.ExitCode
}

func (b *box) output() string {
	b.t.Helper()
	var text strings.Builder
	b.must("Logs", b.d.Logs(b.t.Context(), b.ref, sandbox.LogOptions{Tail: -1, Stdout: true, Stderr: true, Follow: true},
		func(e sandbox.LogEntry) error {
			text.Write(e.Data)
			return nil
		}))
	return text.String()
}

// program is a spec that runs the test workload.
func program(img string, args ...string) sandbox.Spec {
	return sandbox.Spec{Driver: "podman", Image: img, Command: args}
}

// values reads KEY=VALUE lines.
func values(text string) map[string]string {
	found := map[string]string{}
	for line := range strings.Lines(text) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			found[key] = value
		}
	}
	return found
}

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
			if code, err := d.ProbeExec(t.Context(), b.ref, []string{"/workload", "touch", "/data/old"}); err != nil || code != 0 {
				t.Errorf("writing an older file: %d, %v", code, err)
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

func TestStartNamesTheCommandThatIsNotThere(t *testing.T) {
	t.Parallel()
	d := backend(t)
	b := newBox(t, d)
	spec := program(image.RootName)
	spec.Entrypoint = []string{"/no/such/program"}
	b.must("Create", d.Create(t.Context(), b.ref, spec))
	err := d.Start(t.Context(), b.ref)
	var wrong *sandbox.FieldError
	if !errors.As(err, &wrong) || wrong.Field != "spec.command" {
		t.Errorf("Start: %v, want an error about spec.command", err)
	}
	if code, err := d.ProbeExec(t.Context(), b.ref, []string{"/no"}); !errors.Is(err, sandbox.ErrState) {
		t.Errorf("ProbeExec of what does not run: %d, %v", code, err)
	}
	running := newBox(t, d)
	running.start(program(image.RootName, "sleep"))
	for command, want := range map[string]int{"/no/such/program": 127, "/etc/passwd": 126} {
		if code, err := d.ProbeExec(t.Context(), running.ref, []string{command}); err != nil || code != want {
			t.Errorf("ProbeExec of %s: %d, %v; want %d", command, code, err, want)
		}
	}
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !condition(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// countingListener counts the connections that are made to it.
func countingListener(t *testing.T, address string) (port int, count *atomic.Int64) {
	t.Helper()
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	count = new(atomic.Int64)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			count.Add(1)
			_, _ = io.WriteString(conn, "the host's secret")
			conn.Close()
		}
	}()
	return listener.Addr().(*net.TCPAddr).Port, count
}

func TestNetworkReachesNothingOfTheHosts(t *testing.T) {
	t.Parallel()
	d := backend(t)
	loopback, loopbackCount := countingListener(t, "127.0.0.1:0")
	anywhere, anywhereCount := countingListener(t, "[::]:0")
	targets := []string{"127.0.0.1", "[::1]", "0.0.0.0", "169.254.1.1", "169.254.1.2", "host.containers.internal", "10.0.2.2", gateway()}
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range addresses {
		network, ok := address.(*net.IPNet)
		if !ok {
			continue
		}
		switch ip := network.IP; {
		case ip.IsLinkLocalUnicast() && ip.To4() == nil:
			targets = append(targets, fmt.Sprintf("[%s%%eth0]", ip))
		case ip.Equal(outward()) || ip.To4() == nil:
			// IPv4 addresses besides the main one are open, see the package's
			// comment.
			targets = append(targets, net.JoinHostPort(ip.String(), "")[:len(net.JoinHostPort(ip.String(), ""))-1])
		}
	}
	b := newBox(t, d)
	b.start(program(image.RootName, "sleep"))
	for _, target := range targets {
		if target == "" {
			continue
		}
		for _, port := range []int{loopback, anywhere} {
			// The status does not tell: some networks answer for everybody.
			if _, err := d.ProbeExec(t.Context(), b.ref, []string{"/workload", "connect", fmt.Sprintf("%s:%d", target, port)}); err != nil {
				t.Fatal(err)
			}
			if loopbackCount.Load()+anywhereCount.Load() > 0 {
				t.Fatalf("the host was reached as %s", target)
			}
		}
	}
	// The test can fail: whoever is on the host does get through.
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", loopback))
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	eventually(t, "the listener counts", func() bool { return loopbackCount.Load() == 1 })
}

// gateway is the first address of the main network, which often is the router.
func gateway() string {
	ip := outward().To4()
	if ip == nil {
		return ""
	}
	return net.IPv4(ip[0], ip[1], ip[2], 1).String()
}

// outward is the host's main address. Nothing is sent.
func outward() net.IP {
	conn, err := net.Dial("udp4", "192.0.2.254:9")
	if err != nil {
		return nil
	}
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).IP
}

func TestNetworkReachesNoOtherSandbox(t *testing.T) {
	t.Parallel()
	d := backend(t)
	server := newBox(t, d)
	server.start(program(image.RootName, "listen", "0.0.0.0:8765"))
	client := newBox(t, d)
	client.start(program(image.RootName, "sleep"))
	connect := func(b *box, host string) int {
		t.Helper()
		code, err := d.ProbeExec(t.Context(), b.ref, []string{"/workload", "connect", host + ":8765"})
		b.must("ProbeExec", err)
		return code
	}
	eventually(t, "the server listens", func() bool { return connect(server, "127.0.0.1") == 0 })
	hosts := []string{"127.0.0.1"}
	if ip := outward(); ip != nil {
		hosts = append(hosts, ip.String())
	}
	for _, host := range hosts {
		if connect(client, host) == 0 {
			t.Errorf("another sandbox is reached at %s", host)
		}
	}
}

func TestNetworkNone(t *testing.T) {
	t.Parallel()
	d := backend(t)
	spec := program(image.RootName, "cat", "/proc/net/dev")
	spec.DriverOptions = json.RawMessage(`{"network":"none"}`)
	output, _ := newBox(t, d).run(spec)
	if lines := strings.Split(strings.TrimSpace(output), "\n"); len(lines) != 3 || !strings.Contains(lines[2], "lo:") {
		t.Errorf("its interfaces are\n%s", output)
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
