package main

import (
	"fmt"
	"os"
	"path/filepath"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// specFileName is the file that `sandbox start` looks for.
const specFileName = "sandbox.yaml"

// maxSpecFile is far more than a file written by hand can need.
const maxSpecFile = 1 << 20

// readSpecFile reads a sandbox.yaml. home is what ~ in it stands for.
func readSpecFile(path, home string) (*definition, error) {
	info, err := os.Stat(path)
	if err == nil && info.IsDir() {
		path = filepath.Join(path, specFileName)
		info, err = os.Stat(path)
	}
	if err != nil {
		return nil, &fileError{file: path, problem: unwrapAll(err).Error()}
	}
	if info.Size() > maxSpecFile {
		return nil, &fileError{file: path, problem: "is longer than 1 MiB"}
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	absolute, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	return parseSpecFile(data, path, filepath.Dir(absolute), home)
}

// parseSpecFile reads a sandbox.yaml's text; folder is where it lies.
func parseSpecFile(data []byte, file, folder, home string) (*definition, error) {
	s := &specFile{reader{file}, paths{base: folder, home: home}, newDefinition(folder)}
	s.def.file = file
	root, err := s.parse(data)
	if err != nil || root == nil {
		return s.def, err
	}
	if err := s.read(root); err != nil {
		return nil, err
	}
	return s.def, nil
}

// specFile is a sandbox.yaml being read into a definition.
type specFile struct {
	reader
	paths paths
	def   *definition
}

func (s *specFile) read(root *yaml.Node) error {
	if err := s.fields(root, "", s.keys()); err != nil {
		return err
	}
	if hasKey(root, "image") && hasKey(root, "machine") {
		return &fileError{file: s.file, key: "machine", problem: "is given together with image; give one"}
	}
	return nil
}

// keys are what a sandbox.yaml may have.
func (s *specFile) keys() map[string]func(*yaml.Node, string) error {
	d, spec := s.def, s.def.spec
	text := func(set func(string)) func(*yaml.Node, string) error { return parsed(s.reader, nonEmpty, set) }
	return map[string]func(*yaml.Node, string) error{
		"name":       text(func(v string) { d.name = v }),
		"image":      text(d.setImage),
		"machine":    text(d.setMachine),
		"class":      text(func(v string) { spec.MachineClass = v }),
		"driver":     text(func(v string) { spec.Driver = v }),
		"command":    s.words(func(v []string) { spec.Command = v }),
		"entrypoint": s.words(func(v []string) { spec.Entrypoint = v }),
		"user":       text(func(v string) { spec.User = v }),
		"workdir":    text(func(v string) { spec.WorkingDir = v }),
		"env":        s.texts(spec.Env),
		"cpus":       parsed(s.reader, parseCPUs, func(v uint32) { d.resources().CpuMillis = v }),
		"memory":     parsed(s.reader, parseMemory, func(v uint64) { d.resources().MemoryMib = v }),
		"pids":       parsed(s.reader, parseCount, func(v uint32) { d.resources().Pids = v }),
		"workspace":  s.workspace,
		"data":       s.data,
		"disks":      s.disks,
		"egress":     s.egress,
		"ports":      s.ports,
		"secrets":    s.secrets,

		"keyless":         s.flag(&spec.Keyless),
		"secret_rotation": s.rotation,
		"auto_forward":    s.autoForward,

		"ready":   s.ready,
		"idle":    s.idle,
		"restart": s.restart,
		"labels":  s.texts(d.labels),
		"options": s.options,

		"exclude": s.exclude, // which some write where it is of no folder
	}
}

func hasKey(n *yaml.Node, name string) bool {
	for i := 0; i < len(n.Content); i += 2 {
		if n.Content[i].Value == name {
			return true
		}
	}
	return false
}

// words reads a command: a list of words, or one text split at its spaces.
func (s *specFile) words(set func([]string)) func(*yaml.Node, string) error {
	return func(n *yaml.Node, path string) error {
		if n.Kind != yaml.SequenceNode {
			return parsed(s.reader, parseWords, set)(n, path)
		}
		var words []string
		for i, item := range n.Content {
			word, err := s.text(item, fmt.Sprintf("%s[%d]", path, i))
			if err != nil {
				return err
			}
			words = append(words, word)
		}
		if len(words) == 0 {
			return s.errorf(n, path, "is empty")
		}
		set(words)
		return nil
	}
}

// texts reads a mapping of text to text.
func (s *specFile) texts(to map[string]string) func(*yaml.Node, string) error {
	return func(n *yaml.Node, path string) error {
		return s.entries(n, path, func(name string, _, value *yaml.Node) error {
			v, err := s.text(value, join(path, name))
			to[name] = v
			return err
		})
	}
}

// workspace reads PATH[:TARGET][:rw|ro], none, or a mapping.
func (s *specFile) workspace(n *yaml.Node, path string) error {
	if n.Kind == yaml.ScalarNode {
		if n.Value == "none" {
			s.def.setWorkspace(nil)
			return nil
		}
		return parsed(s.reader, func(v string) (*agentv1.Mount, error) {
			return parseMount(agentv1.Mount_KIND_WORKSPACE, v, s.paths)
		}, s.def.setWorkspace)(n, path)
	}
	m, err := s.mount(agentv1.Mount_KIND_WORKSPACE, n, path)
	if err == nil {
		s.def.setWorkspace(m)
	}
	return err
}

// data reads one data mount or a list of them.
func (s *specFile) data(n *yaml.Node, path string) error {
	return s.items(n, path, func(n *yaml.Node, path string) error {
		if n.Kind == yaml.ScalarNode {
			return parsed(s.reader, func(v string) (*agentv1.Mount, error) {
				return parseMount(agentv1.Mount_KIND_DATA, v, s.paths)
			}, s.def.addMount)(n, path)
		}
		m, err := s.mount(agentv1.Mount_KIND_DATA, n, path)
		if err == nil {
			s.def.addMount(m)
		}
		return err
	})
}

func (s *specFile) mount(kind agentv1.Mount_Kind, n *yaml.Node, path string) (*agentv1.Mount, error) {
	source, target, readOnly := "", "", false
	known := map[string]func(*yaml.Node, string) error{
		"path":   parsed(s.reader, nonEmpty, func(v string) { source = v }),
		"target": parsed(s.reader, nonEmpty, func(v string) { target = v }),

		"exclude": s.exclude,
	}
	if kind == agentv1.Mount_KIND_WORKSPACE {
		known["read_only"] = s.flag(&readOnly)
		source = "." // a workspace is the file's own folder
	}
	if err := s.fields(n, path, known); err != nil {
		return nil, err
	}
	m, err := newMount(kind, source, target, readOnly, s.paths)
	return m, s.at(n, join(path, "path"), err)
}

func (s *specFile) ports(n *yaml.Node, path string) error {
	return s.items(n, path, func(n *yaml.Node, path string) error {
		if n.Kind == yaml.ScalarNode {
			return parsed(s.reader, parsePort, s.def.addPort)(n, path)
		}
		p := &agentv1.Port{Protocol: agentv1.Protocol_PROTOCOL_TCP}
		number := func(low uint64) func(string) (uint32, error) {
			return func(v string) (uint32, error) { return parsePortNumber(v, low) }
		}
		err := s.fields(n, path, map[string]func(*yaml.Node, string) error{
			"name":     parsed(s.reader, nonEmpty, func(v string) { p.Name = v }),
			"guest":    parsed(s.reader, number(1), func(v uint32) { p.GuestPort = v }),
			"host":     parsed(s.reader, number(0), func(v uint32) { p.HostPort = v }),
			"protocol": parsed(s.reader, parseProtocol, func(v agentv1.Protocol) { p.Protocol = v }),
			"bind":     parsed(s.reader, nonEmpty, func(v string) { p.BindAddress = v }),
		})
		if err == nil && p.GetGuestPort() == 0 {
			return s.errorf(n, join(path, "guest"), "is missing: the port inside the sandbox")
		}
		s.def.addPort(p)
		return err
	})
}

// secrets reads NAME: SOURCE lines, or a list of mappings.
func (s *specFile) secrets(n *yaml.Node, path string) error {
	if n.Kind == yaml.MappingNode {
		return s.entries(n, path, func(name string, _, value *yaml.Node) error {
			return parsed(s.reader, s.paths.secretSource, func(v string) {
				s.def.addSecret(&agentv1.SecretRef{Name: name, Source: v})
			})(value, join(path, name))
		})
	}
	return s.items(n, path, func(n *yaml.Node, path string) error {
		if n.Kind == yaml.ScalarNode {
			return parsed(s.reader, func(v string) (*agentv1.SecretRef, error) { return parseSecret(v, s.paths) }, s.def.addSecret)(n, path)
		}
		ref := &agentv1.SecretRef{}
		err := s.fields(n, path, map[string]func(*yaml.Node, string) error{
			"name":     parsed(s.reader, nonEmpty, func(v string) { ref.Name = v }),
			"source":   parsed(s.reader, s.paths.secretSource, func(v string) { ref.Source = v }),
			"file":     s.flag(&ref.File),
			"optional": s.flag(&ref.Optional),
		})
		if err == nil && (ref.GetName() == "" || ref.GetSource() == "") {
			return s.errorf(n, path, "needs a name and a source")
		}
		s.def.addSecret(ref)
		return err
	})
}

func (s *specFile) ready(n *yaml.Node, path string) error {
	r := s.def.readiness()
	only := func(probe func(*yaml.Node, string) error) func(*yaml.Node, string) error {
		return func(n *yaml.Node, path string) error {
			if r.GetProbe() != nil {
				return s.errorf(n, path, "is a second probe; give one of exec, http and tcp")
			}
			return probe(n, path)
		}
	}
	return s.fields(n, path, map[string]func(*yaml.Node, string) error{
		"exec": only(s.words(func(v []string) {
			r.Probe = &agentv1.Readiness_Exec{Exec: &agentv1.ExecProbe{Command: v}}
		})),
		"http": only(s.http),
		"tcp": only(parsed(s.reader, func(v string) (uint32, error) { return parsePortNumber(v, 1) }, func(v uint32) {
			r.Probe = &agentv1.Readiness_Tcp{Tcp: &agentv1.TcpProbe{Port: v}}
		})),
		"timeout":  parsed(s.reader, positive, func(v *durationpb.Duration) { r.Timeout = v }),
		"interval": parsed(s.reader, positive, func(v *durationpb.Duration) { r.Interval = v }),
	})
}

// http reads PORT[/PATH] or {port, path}.
func (s *specFile) http(n *yaml.Node, path string) error {
	set := func(p *agentv1.HttpProbe) { s.def.readiness().Probe = &agentv1.Readiness_Http{Http: p} }
	if n.Kind == yaml.ScalarNode {
		return parsed(s.reader, parseHTTP, set)(n, path)
	}
	p := &agentv1.HttpProbe{Path: "/"}
	err := s.fields(n, path, map[string]func(*yaml.Node, string) error{
		"port": parsed(s.reader, func(v string) (uint32, error) { return parsePortNumber(v, 1) }, func(v uint32) { p.Port = v }),
		"path": parsed(s.reader, nonEmpty, func(v string) { p.Path = v }),
	})
	if err == nil && p.GetPort() == 0 {
		return s.errorf(n, join(path, "port"), "is missing")
	}
	set(p)
	return err
}

// idle reads DURATION[:stop|hibernate], off, or {after, action}.
func (s *specFile) idle(n *yaml.Node, path string) error {
	set := func(p *agentv1.IdlePolicy) { s.def.spec.Idle = p }
	if n.Kind == yaml.ScalarNode {
		return parsed(s.reader, parseIdle, set)(n, path)
	}
	p := &agentv1.IdlePolicy{Action: agentv1.IdlePolicy_ACTION_STOP}
	err := s.fields(n, path, map[string]func(*yaml.Node, string) error{
		"after":  parsed(s.reader, positive, func(v *durationpb.Duration) { p.Timeout = v }),
		"action": parsed(s.reader, parseIdleAction, func(v agentv1.IdlePolicy_Action) { p.Action = v }),
	})
	if err == nil && p.GetTimeout() == nil {
		return s.errorf(n, join(path, "after"), "is missing")
	}
	set(p)
	return err
}

// restart reads never, on-failure[:N], always[:N], or a mapping.
func (s *specFile) restart(n *yaml.Node, path string) error {
	set := func(p *agentv1.RestartPolicy) { s.def.spec.Restart = p }
	if n.Kind == yaml.ScalarNode {
		return parsed(s.reader, parseRestart, set)(n, path)
	}
	p := &agentv1.RestartPolicy{}
	err := s.fields(n, path, map[string]func(*yaml.Node, string) error{
		"mode":            parsed(s.reader, parseRestartMode, func(v agentv1.RestartPolicy_Mode) { p.Mode = v }),
		"max_retries":     parsed(s.reader, parseCount, func(v uint32) { p.MaxRetries = v }),
		"initial_backoff": parsed(s.reader, positive, func(v *durationpb.Duration) { p.InitialBackoff = v }),
		"max_backoff":     parsed(s.reader, positive, func(v *durationpb.Duration) { p.MaxBackoff = v }),
	})
	if err == nil && p.GetMode() == agentv1.RestartPolicy_MODE_UNSPECIFIED {
		return s.errorf(n, join(path, "mode"), "is missing: never, on-failure or always")
	}
	set(p)
	return err
}
