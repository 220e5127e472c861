package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

func parse(t *testing.T, text string) *definition {
	t.Helper()
	d, err := parseSpecFile([]byte(text), "sandbox.yaml", "/work/shop", "/home/ada")
	if err != nil {
		t.Fatalf("%v\nin:\n%s", err, text)
	}
	return d
}

func TestSpecFileExampleMeansWhatItSays(t *testing.T) {
	t.Parallel()
	d := parse(t, specFileExample)
	want := &agentv1.Sandbox{
		Name:   "web",
		Labels: map[string]string{"team": "apps", "tier": "web"},
		Spec: &agentv1.SandboxSpec{
			Source:     &agentv1.SandboxSpec_Image{Image: "docker.io/library/node:22"},
			Command:    []string{"node", "server.js"},
			User:       "1000:1000",
			WorkingDir: "/workspace",
			Env:        map[string]string{"NODE_ENV": "production", "PORT": "8080"},
			Resources:  &agentv1.Resources{CpuMillis: 1500, MemoryMib: 2048, Pids: 512},
			Mounts: []*agentv1.Mount{
				{Kind: agentv1.Mount_KIND_WORKSPACE, Source: "/work/shop", Target: "/workspace", ReadWrite: true},
				{Kind: agentv1.Mount_KIND_DATA, Source: "/home/ada/data/web", Target: "/data"},
			},
			Ports: []*agentv1.Port{
				{GuestPort: 8080, Protocol: agentv1.Protocol_PROTOCOL_TCP},
				{Name: "debug", GuestPort: 9229, HostPort: 9229, Protocol: agentv1.Protocol_PROTOCOL_TCP},
			},
			Secrets: []*agentv1.SecretRef{{Name: "OPENAI_API_KEY", Source: "env-file:/home/ada/.config/keys.env"}},
			Readiness: &agentv1.Readiness{
				Probe:   &agentv1.Readiness_Http{Http: &agentv1.HttpProbe{Port: 8080, Path: "/health"}},
				Timeout: durationpb.New(45 * time.Second),
			},
			Idle:    &agentv1.IdlePolicy{Timeout: durationpb.New(30 * time.Minute), Action: agentv1.IdlePolicy_ACTION_STOP},
			Restart: &agentv1.RestartPolicy{Mode: agentv1.RestartPolicy_MODE_ON_FAILURE, MaxRetries: 5},
		},
	}
	if diff := cmp.Diff(want, d.message(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestSpecFileShortAndLongForms(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, short, long string }{
		{"command", "command: sh -c 'echo a b'", "command: [sh, -c, echo a b]"},
		{"workspace", "workspace: ./src:/code:ro", "workspace: {path: src, target: /code, read_only: true}"},
		{"workspace writable", "workspace: /src", "workspace: {path: /src}"},
		{"workspace here", "workspace: .", "workspace: {}"},
		{"data", "data: ~/d:/var/lib/db", "data:\n- {path: /home/ada/d, target: /var/lib/db}"},
		{"data alone", "data: ./d", "data: {path: d}"},
		{"ports", "ports: ['127.0.0.1:8080:80', '53/udp']", "ports:\n- {bind: 127.0.0.1, host: 8080, guest: 80}\n- {guest: 53, protocol: udp}"},
		{"secrets", "secrets: ['KEY=file:k,file,optional']", "secrets:\n- {name: KEY, source: 'file:/work/shop/k', file: true, optional: true}"},
		{"secret map", "secrets: {KEY: sops:k.yaml#a.b}", "secrets:\n- {name: KEY, source: 'sops:/work/shop/k.yaml#a.b'}"},
		{"ready exec", "ready: {exec: test -e x}", "ready:\n  exec:\n  - test\n  - -e\n  - x"},
		{"ready http", "ready: {http: 8080}", "ready: {http: {port: 8080, path: /}}"},
		{"idle", "idle: 1h30m:hibernate", "idle: {after: 90m, action: hibernate}"},
		{"idle in days", "idle: 1d12h", "idle: 36h"},
		{"restart", "restart: always:3", "restart: {mode: always, max_retries: 3}"},
		{"disks", "disks: ~/db.img:/var/lib/db:20g", "disks:\n- {path: /home/ada/db.img, target: /var/lib/db, size: 20GiB}"},
		{"egress", "egress: deny", "egress: {mode: deny}"},
		{"egress list", "egress: ['*.a.b:80+443/tcp', 10.0.0.0/8, deny-private]", "egress:\n  deny_private: true\n  rules:\n  " +
			"- {name: '*.a.b', ports: [80, 443], protocol: tcp}\n  - 10.0.0.0/8"},
		{"egress text", "egress: a.b:8000-8999,192.0.2.1", "egress: {mode: list, rules: [{name: a.b, ports: 8000-8999}, {cidr: 192.0.2.1/32}]}"},
		{"egress private", "egress: deny-private", "egress: {deny_private: true}"},
		{"memory", "memory: 1.5g", "memory: 1536MiB"},
		{"numbers stay as written", `env: {A: 1.10, B: on, C: 0x10}`, `env: {A: "1.10", B: "on", C: "0x10"}`},
		{"nothing", "", "# nothing\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			short, long := parse(t, test.short), parse(t, test.long)
			if diff := cmp.Diff(long.message(), short.message(), protocmp.Transform()); diff != "" {
				t.Errorf("-long +short:\n%s", diff)
			}
		})
	}
}

func TestSpecFileOptionsKeepTheirTypes(t *testing.T) {
	t.Parallel()
	got := parse(t, "options:\n  a: 1\n  b: [x, true]\n  c: {d: null, e: '2'}").spec.GetDriverOptions()
	want, err := structpb.NewStruct(map[string]any{"a": 1, "b": []any{"x", true}, "c": map[string]any{"d": nil, "e": "2"}})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestSpecFileWorkspaceNone(t *testing.T) {
	t.Parallel()
	d := parse(t, "workspace: none")
	if err := d.complete("/home/ada"); err != nil || len(d.spec.GetMounts()) != 0 {
		t.Errorf("mounts %v, error %v", d.spec.GetMounts(), err)
	}
}

func TestSpecFileErrorsNameTheirPlace(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ text, want string }{
		{"image: a\nimagee: b", "sandbox.yaml:2: imagee: unknown key; did you mean image?"},
		{"image: a\nworkspace:\n  path: .\n  targett: /x", "sandbox.yaml:4: workspace.targett: unknown key; did you mean target?"},
		{"zzz: 1", "sandbox.yaml:1: zzz: unknown key"},
		{"image: a\nimage: b", "sandbox.yaml:2: image: is given twice"},
		{"image: a\nmachine: b", "sandbox.yaml: machine: is given together with image; give one"},
		{"disks: a.img:/a", `sandbox.yaml:1: disks: "a.img:/a" is not of the form PATH:TARGET:SIZE`},
		{"disks:\n- {path: a.img, target: /a}", "sandbox.yaml:2: disks[0]: needs a path, a target and a size"},
		{"disks:\n- {path: a.img, target: /a, size: 1g, ro: true}", "sandbox.yaml:2: disks[0].ro: unknown key"},
		{"egress: {modee: deny}", "sandbox.yaml:1: egress.modee: unknown key; did you mean mode?"},
		{"egress: {mode: perhaps}", `sandbox.yaml:1: egress.mode: "perhaps" is none of allow, deny and list`},
		{"egress: {mode: deny, rules: [a.b]}", "sandbox.yaml:1: egress.rules: is given, but the mode is not list"},
		{"egress: [allow, a.b]", `sandbox.yaml:1: egress: "allow,a.b": give allow, deny, or rules of the form ` + ruleForm},
		{"egress: {rules: [{name: a, cidr: 10.0.0.0/8}]}", "sandbox.yaml:1: egress.rules[0]: needs either a name or a cidr"},
		{"egress: {rules: [{name: a, ports: x}]}", `sandbox.yaml:1: egress.rules[0].ports: "x" is not a port from 1 to 65535`},
		{"image: [a]", "sandbox.yaml:1: image: is a list; write a single value"},
		{"image:\ncpus: 1", "sandbox.yaml:1: image: has no value"},
		{"image: ''", "sandbox.yaml:1: image: is empty"},
		{"- image", "sandbox.yaml:1: is a list; write it as key: value lines"},
		{"memory: 512", `sandbox.yaml:1: memory: "512" has no unit; write 512m or 2g`},
		{"memory: 0.3m", `sandbox.yaml:1: memory: "0.3m" is too little or too much`},
		{"cpus: two", `sandbox.yaml:1: cpus: "two" is not a number of CPUs; write 2 or 1.5`},
		{"pids: -1", `sandbox.yaml:1: pids: "-1" is not a whole number above zero`},
		{"env:\n  A: 1\n  B: [x]", "sandbox.yaml:3: env.B: is a list; write a single value"},
		{"env:\n  A:", "sandbox.yaml:2: env.A: has no value"},
		{"command: []", "sandbox.yaml:1: command: is empty"},
		{"command: sh -c 'x", `sandbox.yaml:1: command: "sh -c 'x" has a quote that does not end`},
		{"workspace: .:relative", `sandbox.yaml:1: workspace: target "relative" is not absolute`},
		{"workspace: {path: ., read_only: yess}", "sandbox.yaml:1: workspace.read_only: is neither true nor false"},
		{"workspace:\n  path: .\n  exclude: [.env, '*.pem']", "sandbox.yaml:3: workspace.exclude: is not possible: a folder is shown whole, with what comes into it later"},
		{"data:\n- {path: d, exclude: .env}", "sandbox.yaml:2: data[0].exclude: is not possible: a folder is shown whole, with what comes into it later"},
		{"disks:\n- {path: a.img, target: /a, size: 1g, exclude: .env}", "sandbox.yaml:2: disks[0].exclude: unknown key"},
		{"exclude: [.env]", "sandbox.yaml:1: exclude: is not possible: a folder is shown whole, with what comes into it later"},
		{"data:\n- ok\n- {target: /x}", "sandbox.yaml:3: data[1].path: names no path"},
		{"ports:\n- 70000", `sandbox.yaml:2: ports[0]: "70000": "70000" is not a port from 1 to 65535`},
		{"ports:\n- {host: 80}", "sandbox.yaml:2: ports[0].guest: is missing: the port inside the sandbox"},
		{"ports: ['x:1:2']", `sandbox.yaml:1: ports[0]: "x:1:2": "x" is not an IP address`},
		{"secrets:\n  KEY: sk-123", "sandbox.yaml:2: secrets.KEY: names no source: write env-file:PATH, file:PATH, credential:NAME, …"},
		{"ready: {exec: a, tcp: 1}", "sandbox.yaml:1: ready.tcp: is a second probe; give one of exec, http and tcp"},
		{"ready: {timeout: soon}", `sandbox.yaml:1: ready.timeout: "soon" is not a duration; write 45s, 30m or 1h30m`},
		{"ready: {http: {path: /}}", "sandbox.yaml:1: ready.http.port: is missing"},
		{"idle: 30", `sandbox.yaml:1: idle: "30" is not a duration; write 45s, 30m or 1h30m`},
		{"idle: 30m:sleep", `sandbox.yaml:1: idle: "sleep" is neither stop nor hibernate`},
		{"restart: sometimes", `sandbox.yaml:1: restart: "sometimes" is none of never, on-failure and always`},
		{"restart: {max_retries: 3}", "sandbox.yaml:1: restart.mode: is missing: never, on-failure or always"},
		{"env: &a {A: 1}\nlabels: *a", "sandbox.yaml:1: anchors and aliases are not supported"},
		{"image: a\n---\nimage: b", "sandbox.yaml:2: has a second document; one file describes one sandbox"},
		{"image: 'a", "sandbox.yaml: found unexpected end of stream"},
	} {
		_, err := parseSpecFile([]byte(test.text), "sandbox.yaml", "/work", "/home/ada")
		if err == nil || err.Error() != test.want {
			t.Errorf("%q\n got %v\nwant %s", test.text, err, test.want)
		}
		if !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%q: the error is not ErrInvalid", test.text)
		}
	}
}

func TestReadSpecFileRefusesWhatIsTooLong(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), specFileName)
	if err := os.WriteFile(path, make([]byte, maxSpecFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readSpecFile(path, ""); err == nil || !strings.Contains(err.Error(), "longer than 1 MiB") {
		t.Errorf("error %v", err)
	}
}

func TestFolderName(t *testing.T) {
	t.Parallel()
	for folder, want := range map[string]string{
		"/home/ada/My Shop": "my-shop", "/x/--a..b_": "a-b", "/": "", "/x/日本": "", "/x/9lives": "9lives",
		"/x/" + strings.Repeat("a", 62) + "-bc": strings.Repeat("a", 62),
	} {
		got := folderName(folder)
		if got != want {
			t.Errorf("folderName(%q) = %q, want %q", folder, got, want)
		}
		if got != "" && sandbox.ValidateName("name", got) != nil {
			t.Errorf("folderName(%q) = %q, which is no name", folder, got)
		}
	}
}

// FuzzSpecFile: no text makes the reader panic, and what it accepts can be sent.
func FuzzSpecFile(f *testing.F) {
	f.Add(specFileExample)
	for _, seed := range []string{"", "image: a", "ports: [1, {guest: 2}]", "options: {a: [1, {b: c}]}", "a: &x [*x]", "? [a]\n: b", "env: {<<: {A: 1}}", "options: {t: 2001-01-01, n: .nan, b: !!binary aGk=}"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		d, err := parseSpecFile([]byte(text), "f", "/work", "/home/ada")
		if err != nil {
			if !errors.Is(err, sandbox.ErrInvalid) || strings.TrimSpace(err.Error()) == "" {
				t.Fatalf("error %v", err)
			}
			return
		}
		for _, m := range d.spec.GetMounts() {
			if !filepath.IsAbs(m.GetSource()) || !strings.HasPrefix(m.GetTarget(), "/") {
				t.Fatalf("mount %v", m)
			}
		}
		if _, err := toJSON(d.message()); err != nil {
			t.Fatal(err)
		}
	})
}
