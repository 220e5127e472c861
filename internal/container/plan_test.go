package container

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.podman.io/storage/pkg/idtools"

	"github.com/choiros/agent/internal/account"
	"github.com/choiros/agent/internal/sandbox"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// golden compares with a file in testdata.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v (go test -update makes it)", err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

// planOf is a plan as Driver.plan would make it, on a host that enforces all.
func planOf(spec sandbox.Spec, opts options) plan {
	spec.Image = "localhost/app:latest"
	p := plan{
		name: "choiros-0123abcd-web-1", owner: "0123abcd",
		ref:  sandbox.Ref{ID: "web-1", Dir: "/var/lib/agent/web-1"},
		spec: spec, opts: opts,
		image:     imageFacts{id: strings.Repeat("ab", 32), entrypoint: []string{"/app"}, cmd: []string{"serve"}},
		guestdDir: "/usr/libexec/choiros/guest",
		limits:    sandbox.Limits{CPU: true, Memory: true, Pids: true},
		uids:      65537, gids: 65537,
	}
	if opts.Network == networkInternet {
		p.pasta = pastaOptions(2025_05_03, true)
	}
	return p
}

func TestContainerGolden(t *testing.T) {
	t.Parallel()
	auto := options{Network: networkInternet, Userns: usernsAuto}
	user := planOf(sandbox.Spec{User: "app", Resources: sandbox.Resources{CPUMillis: 1500, MemoryMiB: 512, Pids: 100}}, auto)
	user.account = account.ID{UID: 1000, GID: 100}
	user.binds = []bind{
		{source: "/home/u/project", target: "/workspace"},
		{source: "/home/u/data", target: "/data", writable: true},
	}
	full := planOf(sandbox.Spec{
		Entrypoint: []string{"/bin/sh"}, Command: []string{"-c", "exec app"}, User: "0",
		WorkingDir: "/srv", Env: map[string]string{"B": "2", "A": "1"},
	}, options{Network: networkNone, Userns: usernsRoot, ReadOnlyRootfs: true, CapAdd: []string{"CHOWN", "NET_BIND_SERVICE"}})
	entrypoint := planOf(sandbox.Spec{Entrypoint: []string{"/bin/other"}}, auto)
	entrypoint.limits = sandbox.Limits{}
	for name, p := range map[string]plan{
		"root.json":       planOf(sandbox.Spec{}, auto),
		"user.json":       user,
		"full.json":       full,
		"entrypoint.json": entrypoint,
	} {
		text, err := json.MarshalIndent(p.container(), "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name, append(text, '\n'))
	}
}

func TestEntrypointKeepsTheImagesCommand(t *testing.T) {
	t.Parallel()
	image, cmd := []string{"/app"}, []string{"serve"}
	for name, test := range map[string]struct {
		spec            sandbox.Spec
		entrypoint, cmd []string
		want            []string
	}{
		"the image's":             {sandbox.Spec{}, image, cmd, []string{"/app", "serve"}},
		"own entrypoint":          {sandbox.Spec{Entrypoint: []string{"/own"}}, image, cmd, []string{"/own", "serve"}},
		"own command":             {sandbox.Spec{Command: []string{"own"}}, image, cmd, []string{"/app", "own"}},
		"both":                    {sandbox.Spec{Entrypoint: []string{"/own"}, Command: []string{"x"}}, image, cmd, []string{"/own", "x"}},
		"entrypoint taken away":   {sandbox.Spec{}, []string{""}, cmd, cmd},
		"none":                    {sandbox.Spec{}, nil, nil, nil},
		"command alone is enough": {sandbox.Spec{Command: []string{"own"}}, nil, nil, []string{"own"}},
	} {
		if got := argv(test.spec, test.entrypoint, test.cmd); !slices.Equal(got, test.want) {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
	}
}

func TestSwapWithRoot(t *testing.T) {
	t.Parallel()
	for id, want := range map[uint32][]idtools.IDMap{
		0: {{ContainerID: 0, HostID: 0, Size: 1}, {ContainerID: 1, HostID: 1, Size: 9}},
		3: {{ContainerID: 0, HostID: 1, Size: 3}, {ContainerID: 3, HostID: 0, Size: 1}, {ContainerID: 4, HostID: 4, Size: 6}},
		9: {{ContainerID: 0, HostID: 1, Size: 9}, {ContainerID: 9, HostID: 0, Size: 1}},
	} {
		got := swapWithRoot(id, 10)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("id %d (-want +got):\n%s", id, diff)
		}
		// Every id of the namespace is used once.
		seen := map[int]bool{}
		for _, m := range got {
			for i := range m.Size {
				if seen[m.HostID+i] {
					t.Errorf("id %d: %d is mapped twice", id, m.HostID+i)
				}
				seen[m.HostID+i] = true
			}
		}
		if len(seen) != 10 {
			t.Errorf("id %d: %d ids of 10 are mapped", id, len(seen))
		}
	}
}

func TestResourcesLiftWhatIsZero(t *testing.T) {
	t.Parallel()
	all := sandbox.Limits{CPU: true, Memory: true, Pids: true}
	r := resources(sandbox.Resources{}, all)
	if r.CPU != nil || *r.Memory.Limit != -1 || *r.Memory.Swap != -1 || r.Pids.Limit != -1 {
		t.Errorf("no limits became %+v %+v %+v", r.CPU, r.Memory, r.Pids)
	}
	r = resources(sandbox.Resources{CPUMillis: 10, MemoryMiB: 64 << 20, Pids: 2}, all)
	if *r.CPU.Quota != 1000 || *r.CPU.Period != 100_000 || *r.Memory.Limit != 64<<40 || r.Pids.Limit != 2 {
		t.Errorf("limits became %+v %+v %+v", r.CPU, r.Memory, r.Pids)
	}
	if r := resources(sandbox.Resources{CPUMillis: 10}, sandbox.Limits{}); r.CPU != nil || r.Memory != nil || r.Pids != nil {
		t.Errorf("limits where there are none to be had became %+v", r)
	}
}

func TestCheckLimitsNamesTheField(t *testing.T) {
	t.Parallel()
	facts := &hostFacts{limits: sandbox.Limits{Memory: true}, whyUnlimited: "of this", limitsCure: "do that"}
	if err := checkLimits(sandbox.Resources{MemoryMiB: 64}, facts); err != nil {
		t.Errorf("memory can be limited: %v", err)
	}
	for field, r := range map[string]sandbox.Resources{
		"spec.resources.cpu_millis": {CPUMillis: 100},
		"spec.resources.pids":       {Pids: 10},
	} {
		err := checkLimits(r, facts)
		var wrong *sandbox.FieldError
		if !errors.As(err, &wrong) || wrong.Field != field || !errors.Is(err, sandbox.ErrUnsupported) || !strings.Contains(err.Error(), "do that") {
			t.Errorf("%+v: %v, want unsupported %s and the cure", r, err, field)
		}
	}
}

func TestParseOptions(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", "null", "{}", `{"network":"internet","userns":"auto","cap_add":[],"read_only_rootfs":false}`} {
		opts, err := parseOptions(json.RawMessage(text))
		if err != nil || opts.Network != networkInternet || opts.Userns != usernsAuto || opts.ReadOnlyRootfs || len(opts.CapAdd) > 0 {
			t.Errorf("%s: %+v, %v; want the defaults", text, opts, err)
		}
	}
	opts, err := parseOptions(json.RawMessage(`{"cap_add":["cap_setuid","CHOWN","SETUID"],"network":"none","userns":"root","read_only_rootfs":true}`))
	want := options{CapAdd: []string{"CHOWN", "SETUID"}, Network: networkNone, Userns: usernsRoot, ReadOnlyRootfs: true}
	if diff := cmp.Diff(want, opts); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}

func TestParseOptionsNamesTheKey(t *testing.T) {
	t.Parallel()
	for text, field := range map[string]string{
		`[]`:                            "spec.driver_options",
		`"x"`:                           "spec.driver_options",
		`{`:                             "spec.driver_options",
		`{} {}`:                         "spec.driver_options",
		`{"privileged":true}`:           "spec.driver_options.privileged",
		`{"Network":"none"}`:            "spec.driver_options.Network",
		`{"network":"host"}`:            "spec.driver_options.network",
		`{"network":1}`:                 "spec.driver_options.network",
		`{"userns":"keep-id"}`:          "spec.driver_options.userns",
		`{"read_only_rootfs":"yes"}`:    "spec.driver_options.read_only_rootfs",
		`{"cap_add":"CHOWN"}`:           "spec.driver_options.cap_add",
		`{"cap_add":["CHOWN","CHOWM"]}`: "spec.driver_options.cap_add[1]",
		`{"cap_add":["sys_admin"]}`:     "spec.driver_options.cap_add[0]",
		`{"cap_add":["ALL"]}`:           "spec.driver_options.cap_add[0]",
	} {
		_, err := parseOptions(json.RawMessage(text))
		var wrong *sandbox.FieldError
		if !errors.As(err, &wrong) || wrong.Field != field || !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v, want an error about %s", text, err, field)
		}
	}
}

func TestNoGrantableCapabilityIsRefused(t *testing.T) {
	t.Parallel()
	for _, name := range grantableCapabilities() {
		if _, refused := refusedCapabilities()[name]; refused {
			t.Errorf("%s is both", name)
		}
	}
}

func FuzzParseOptions(f *testing.F) {
	for _, seed := range []string{`{}`, `{"cap_add":["CHOWN"],"network":"none"}`, `{"userns":null}`, `[1`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		opts, err := parseOptions(text)
		var wrong *sandbox.FieldError
		if err != nil && !errors.As(err, &wrong) {
			t.Fatalf("%q: %v is no *FieldError", text, err)
		}
		if err == nil && bytes.Contains(text, []byte("SYS_ADMIN")) && len(opts.CapAdd) > 0 {
			for _, c := range opts.CapAdd {
				if c == "SYS_ADMIN" {
					t.Fatalf("%q is accepted", text)
				}
			}
		}
	})
}
