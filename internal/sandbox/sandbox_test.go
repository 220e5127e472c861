package sandbox

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

func valid() Spec { return Spec{Driver: "d", Image: "localhost/x:latest"} }

func TestValidateNamesTheField(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 200<<10)
	for _, c := range []struct {
		field string
		edit  func(*Spec)
	}{
		{"spec.image", func(s *Spec) { s.Image = "" }},
		{"spec.image", func(s *Spec) { s.Image = "a b" }},
		{"spec.image", func(s *Spec) { s.Image = long }},
		{"spec.machine", func(s *Spec) { s.Machine = "m" }},
		{"spec.machine_class", func(s *Spec) { s.MachineClass = "No" }},
		{"spec.driver_options", func(s *Spec) { s.DriverOptions = []byte(`"` + long + `"`) }},
		{"spec.command[1]", func(s *Spec) { s.Command = []string{"a", "b\x00"} }},
		{"spec.entrypoint", func(s *Spec) { s.Entrypoint = []string{long} }},
		{"spec.command", func(s *Spec) { s.Command = make([]string, maxArgs+1) }},
		{"spec.user", func(s *Spec) { s.User = "a:b:c" }},
		{"spec.user", func(s *Spec) { s.User = "../x" }},
		{"spec.working_dir", func(s *Spec) { s.WorkingDir = "rel" }},
		{"spec.env", func(s *Spec) { s.Env = map[string]string{"A=B": ""} }},
		{"spec.env", func(s *Spec) { s.Env = map[string]string{"A": long} }},
		{"spec.env[A]", func(s *Spec) { s.Env = map[string]string{"A": "\x00"} }},
		{"spec.resources.cpu_millis", func(s *Spec) { s.Resources.CPUMillis = 9 }},
		{"spec.resources.cpu_millis", func(s *Spec) { s.Resources.CPUMillis = 1 << 31 }},
		{"spec.resources.memory_mib", func(s *Spec) { s.Resources.MemoryMiB = 1 << 60 }},
		{"spec.resources.pids", func(s *Spec) { s.Resources.Pids = 1 }},
		{"spec.mounts[0].kind", func(s *Spec) { s.Mounts = []Mount{{Source: "/x"}} }},
		{"spec.mounts[0].source", func(s *Spec) { s.Mounts = []Mount{{Kind: MountData}} }},
		{"spec.mounts[0].source", func(s *Spec) { s.Mounts = []Mount{{Kind: MountData, Source: "x"}} }},
		{"spec.mounts[0].source", func(s *Spec) { s.Mounts = []Mount{{Kind: MountData, Source: "/a/../b"}} }},
		{"spec.mounts[0].source", func(s *Spec) { s.Mounts = []Mount{{Kind: MountData, Source: "/" + strings.Repeat("x", 5000)}} }},
		{"spec.mounts[0].target", func(s *Spec) { s.Mounts = []Mount{{Kind: MountData, Source: "/x", Target: "/"}} }},
		{"spec.mounts[0].target", func(s *Spec) { s.Mounts = []Mount{{Kind: MountData, Source: "/x", Target: "/dev/shm"}} }},
		{"spec.mounts[0].target", func(s *Spec) {
			s.Mounts = []Mount{{Kind: MountData, Source: "/x", Target: "/run/choiros"}}
		}},
		{"spec.mounts[1].target", func(s *Spec) {
			s.Mounts = []Mount{{Kind: MountData, Source: "/x"}, {Kind: MountData, Source: "/y"}}
		}},
		{"spec.ports[0].guest_port", func(s *Spec) { s.Ports = []Port{{}} }},
		{"spec.ports[0].bind_address", func(s *Spec) { s.Ports = []Port{{GuestPort: 1, BindAddress: "here"}} }},
		{"spec.ports[1].host_port", func(s *Spec) { s.Ports = []Port{{GuestPort: 1, HostPort: 9}, {GuestPort: 2, HostPort: 9}} }},
		{"spec.ports[1].name", func(s *Spec) { s.Ports = []Port{{GuestPort: 1, Name: "a"}, {GuestPort: 2, Name: "a"}} }},
		{"spec.secrets[0].name", func(s *Spec) { s.Secrets = []SecretRef{{Name: "a b", Source: "file:/x"}} }},
		{"spec.secrets[0].source", func(s *Spec) { s.Secrets = []SecretRef{{Name: "A", Source: "hunter2"}} }},
		{"spec.readiness", func(s *Spec) { s.Readiness = Readiness{TCPPort: 1, Exec: []string{"x"}} }},
		{"spec.readiness.http.port", func(s *Spec) { s.Readiness.HTTP = &HTTPProbe{} }},
		{"spec.readiness.http.path", func(s *Spec) { s.Readiness.HTTP = &HTTPProbe{Port: 1, Path: "x"} }},
		{"spec.readiness.exec.command", func(s *Spec) { s.Readiness.Exec = []string{""} }},
		{"spec.readiness.timeout", func(s *Spec) { s.Readiness.Timeout = -1 }},
		{"spec.readiness.interval", func(s *Spec) { s.Readiness.Interval = time.Hour }},
		{"spec.idle.timeout", func(s *Spec) { s.Idle.Timeout = time.Millisecond }},
		{"spec.idle.action", func(s *Spec) { s.Idle.Action = "dance" }},
		{"spec.restart.mode", func(s *Spec) { s.Restart.Mode = "maybe" }},
		{"spec.restart.max_backoff", func(s *Spec) {
			s.Restart = RestartPolicy{InitialBackoff: time.Minute, MaxBackoff: time.Second}
		}},
		{"spec.mounts[0].size_mib", func(s *Spec) { s.Mounts = []Mount{{Kind: MountData, Source: "/x", SizeMiB: 16}} }},
		{"spec.mounts[0].size_mib", func(s *Spec) { s.Mounts = []Mount{{Kind: MountDisk, Source: "/x", Target: "/d"}} }},
		{"spec.mounts[0].size_mib", func(s *Spec) {
			s.Mounts = []Mount{{Kind: MountDisk, Source: "/x", Target: "/d", SizeMiB: 16<<20 + 1}}
		}},
		{"spec.mounts[0].target", func(s *Spec) { s.Mounts = []Mount{{Kind: MountDisk, Source: "/x", SizeMiB: 16}} }},
		{"spec.mounts[0].source", func(s *Spec) { s.Mounts = []Mount{{Kind: MountDisk, Target: "/d", SizeMiB: 16}} }},
		{"spec.mounts[1].source", func(s *Spec) {
			s.Mounts = []Mount{
				{Kind: MountDisk, Source: "/x", Target: "/d", SizeMiB: 16}, {Kind: MountDisk, Source: "/x", Target: "/e", SizeMiB: 16},
			}
		}},
		{"spec.egress.mode", func(s *Spec) { s.Egress.Mode = "perhaps" }},
		{"spec.egress.rules[0]", func(s *Spec) { s.Egress = Egress{Mode: EgressList, Rules: []EgressRule{{}}} }},
	} {
		spec := valid()
		c.edit(&spec)
		err := spec.Validate()
		var bad *FieldError
		if !errors.As(err, &bad) || bad.Field != c.field || !errors.Is(err, ErrInvalid) {
			t.Errorf("%+.80v:\n  got  %v\n  want a refusal of %s", spec, err, c.field)
			continue
		}
		if len(err.Error()) > 500 || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error echoes too much: %.600s", c.field, err)
		}
	}
}

func TestValidateFillsInTargets(t *testing.T) {
	t.Parallel()
	spec := valid()
	spec.Mounts = []Mount{
		{Kind: MountWorkspace, Source: "/w"},
		{Kind: MountData, Source: "/d"},
		{Kind: MountDisk, Source: "/disk.img", Target: "/disk", SizeMiB: 16},
	}
	if err := spec.Validate(); err != nil {
		t.Fatal(err)
	}
	if spec.Mounts[0].Target != "/workspace" || spec.Mounts[1].Target != "/data" {
		t.Errorf("targets: %+v", spec.Mounts)
	}
	if spec.Mounts[0].Writable() || !spec.Mounts[1].Writable() || !spec.Mounts[2].Writable() {
		t.Error("a workspace is read-only unless asked otherwise, data and disks are writable")
	}
}

func TestNames(t *testing.T) {
	t.Parallel()
	for name, ok := range map[string]bool{
		"a": true, "web-1": true, "0": true, strings.Repeat("a", 63): true, "a-": true,
		"": false, "-a": false, "A": false, "a_b": false, "a.b": false, "a/b": false, "..": false, "ä": false,
		strings.Repeat("a", 64): false, "a\n": false, "a ": false,
	} {
		if err := ValidateName("name", name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestCloneSharesNothing(t *testing.T) {
	t.Parallel()
	spec := valid()
	spec.Env, spec.Command = map[string]string{"A": "1"}, []string{"x"}
	spec.Mounts = []Mount{{Kind: MountData}}
	spec.Readiness.HTTP = &HTTPProbe{Port: 1}
	spec.Egress = Egress{Mode: EgressList, Rules: []EgressRule{{CIDR: "192.0.2.0/24", Ports: []PortRange{{From: 1}}}}}
	clone := spec.Clone()
	clone.Env["A"], clone.Command[0], clone.Mounts[0].Kind, clone.Readiness.HTTP.Port = "2", "y", MountWorkspace, 2
	clone.Egress.Rules[0].CIDR, clone.Egress.Rules[0].Ports[0].From = "", 2
	if spec.Env["A"] != "1" || spec.Command[0] != "x" || spec.Mounts[0].Kind != MountData || spec.Readiness.HTTP.Port != 1 ||
		spec.Egress.Rules[0].CIDR == "" || spec.Egress.Rules[0].Ports[0].From != 1 {
		t.Errorf("changed through its clone: %+v", spec)
	}
}

func TestBackoff(t *testing.T) {
	t.Parallel()
	p := RestartPolicy{InitialBackoff: time.Second, MaxBackoff: 5 * time.Second}
	var got []time.Duration
	for n := range uint32(5) {
		got = append(got, p.Backoff(n))
	}
	if fmt.Sprint(got) != "[1s 2s 4s 5s 5s]" {
		t.Errorf("backoff: %v", got)
	}
	if d := (RestartPolicy{}).Backoff(1 << 30); d != time.Minute {
		t.Errorf("default backoff ends at %s", d)
	}
}

func TestFailureTable(t *testing.T) {
	t.Parallel()
	reasons := map[string]bool{}
	for _, f := range Failures() {
		if reasons[f.Reason] || f.Code == 0 || f.Code > 16 || f.Exit == 0 || f.Exit > 125 {
			t.Errorf("row %+v", f)
		}
		reasons[f.Reason] = true
	}
	for err, want := range map[error]string{
		errors.New("x"):        "INTERNAL",
		Invalidf("f", "x"):     "INVALID",
		Unsupportedf("f", "x"): "UNSUPPORTED",
		&RetryError{Err: fmt.Errorf("x: %w", ErrExhausted)}:                 "RESOURCE_EXHAUSTED",
		&UnavailableError{Err: errors.New("x")}:                             "DRIVER_UNAVAILABLE",
		fmt.Errorf("x: %w", &FieldError{Field: "f", Err: ErrRequestReused}): "REQUEST_ID_REUSED",
	} {
		if got := FailureOf(err).Reason; got != want {
			t.Errorf("%v: %s, want %s", err, got, want)
		}
	}
}
