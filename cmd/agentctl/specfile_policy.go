package main

import (
	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/types/known/structpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// rotation reads leave, signal[:SIGNAL], restart, or {action, signal}.
func (s *specFile) rotation(n *yaml.Node, path string) error {
	set := func(r *agentv1.SecretRotation) { s.def.spec.SecretRotation = r }
	if n.Kind == yaml.ScalarNode {
		return parsed(s.reader, parseRotation, set)(n, path)
	}
	r := &agentv1.SecretRotation{}
	err := s.fields(n, path, map[string]func(*yaml.Node, string) error{
		"action": parsed(s.reader, parseRotationAction, func(v agentv1.SecretRotation_Action) { r.Action = v }),
		"signal": parsed(s.reader, parseSignal, func(v string) { r.Signal = v }),
	})
	if err == nil && r.GetAction() == agentv1.SecretRotation_ACTION_UNSPECIFIED {
		return s.errorf(n, join(path, "action"), "is missing: leave, signal or restart")
	}
	if err == nil && r.GetSignal() != "" && r.GetAction() != agentv1.SecretRotation_ACTION_SIGNAL {
		return s.errorf(n, join(path, "signal"), "is given, but the action is not signal")
	}
	set(r)
	return err
}

// autoForward reads off, offer, forward, or {mode, deny_ports}.
func (s *specFile) autoForward(n *yaml.Node, path string) error {
	f := s.def.autoForward()
	mode := parsed(s.reader, parseAutoForward, func(v agentv1.AutoForward_Mode) { f.Mode = v })
	if n.Kind == yaml.ScalarNode {
		return mode(n, path)
	}
	return s.fields(n, path, map[string]func(*yaml.Node, string) error{
		"mode": mode,
		"deny_ports": func(n *yaml.Node, path string) error {
			return s.items(n, path, parsed(s.reader, func(v string) (uint32, error) { return parsePortNumber(v, 1) }, func(v uint32) {
				f.DenyPorts = append(f.DenyPorts, v)
			}))
		},
	})
}

// disks reads one disk or a list of them: PATH:TARGET:SIZE, or {path, target,
// size}.
func (s *specFile) disks(n *yaml.Node, path string) error {
	return s.items(n, path, func(n *yaml.Node, path string) error {
		if n.Kind == yaml.ScalarNode {
			return parsed(s.reader, func(v string) (*agentv1.Mount, error) { return parseDisk(v, s.paths) }, s.def.addMount)(n, path)
		}
		source, target, size := "", "", uint64(0)
		err := s.fields(n, path, map[string]func(*yaml.Node, string) error{
			"path":   parsed(s.reader, nonEmpty, func(v string) { source = v }),
			"target": parsed(s.reader, nonEmpty, func(v string) { target = v }),
			"size":   parsed(s.reader, parseMemory, func(v uint64) { size = v }),
		})
		if err == nil && (source == "" || target == "" || size == 0) {
			return s.errorf(n, path, "needs a path, a target and a size")
		}
		if err != nil {
			return err
		}
		m, err := newDisk(source, target, size, s.paths)
		if err == nil {
			s.def.addMount(m)
		}
		return s.at(n, path, err)
	})
}

// egress reads allow, deny, one rule or a list of such texts, or {mode, rules,
// deny_private}.
func (s *specFile) egress(n *yaml.Node, path string) error {
	switch n.Kind {
	case yaml.ScalarNode:
		return parsed(s.reader, parseEgress, func(e *agentv1.Egress) { s.def.spec.Egress = e })(n, path)
	case yaml.SequenceNode:
		var words []string
		err := s.items(n, path, parsed(s.reader, nonEmpty, func(v string) { words = append(words, v) }))
		if err != nil {
			return err
		}
		s.def.spec.Egress, err = egressOf(words)
		return s.at(n, path, err)
	}
	e := &agentv1.Egress{}
	err := s.fields(n, path, map[string]func(*yaml.Node, string) error{
		"mode":         parsed(s.reader, parseEgressMode, func(v agentv1.Egress_Mode) { e.Mode = v }),
		"deny_private": s.flag(&e.DenyPrivate),
		"rules": func(n *yaml.Node, path string) error {
			return s.items(n, path, func(n *yaml.Node, path string) error {
				rule, err := s.egressRule(n, path)
				e.Rules = append(e.Rules, rule)
				return err
			})
		},
	})
	switch {
	case err != nil:
		return err
	case e.GetMode() == agentv1.Egress_MODE_UNSPECIFIED && len(e.GetRules()) > 0:
		e.Mode = agentv1.Egress_MODE_LIST
	case e.GetMode() == agentv1.Egress_MODE_UNSPECIFIED:
		e.Mode = agentv1.Egress_MODE_ALLOW
	case e.GetMode() != agentv1.Egress_MODE_LIST && len(e.GetRules()) > 0:
		return s.errorf(n, join(path, "rules"), "is given, but the mode is not list")
	}
	s.def.spec.Egress = e
	return nil
}

// egressRule reads NAME_OR_CIDR[:PORTS][/tcp|udp], or {name, cidr, ports,
// protocol}.
func (s *specFile) egressRule(n *yaml.Node, path string) (rule *agentv1.EgressRule, err error) {
	if n.Kind == yaml.ScalarNode {
		err = parsed(s.reader, parseEgressRule, func(v *agentv1.EgressRule) { rule = v })(n, path)
		return rule, err
	}
	rule = &agentv1.EgressRule{}
	err = s.fields(n, path, map[string]func(*yaml.Node, string) error{
		"name":     parsed(s.reader, nonEmpty, func(v string) { rule.Name = v }),
		"cidr":     parsed(s.reader, nonEmpty, func(v string) { rule.Cidr = v }),
		"protocol": parsed(s.reader, parseEgressProtocol, func(v agentv1.EgressRule_Protocol) { rule.Protocol = v }),
		"ports": func(n *yaml.Node, path string) error {
			return s.items(n, path, parsed(s.reader, parsePortRange, func(v *agentv1.PortRange) { rule.Ports = append(rule.Ports, v) }))
		},
	})
	if err == nil && (rule.GetName() == "") == (rule.GetCidr() == "") {
		return rule, s.errorf(n, path, "needs either a name or a cidr")
	}
	return rule, err
}

// options reads anything that JSON can say; the driver decodes it.
func (s *specFile) options(n *yaml.Node, path string) error {
	return s.entries(n, path, func(name string, _, value *yaml.Node) error {
		var v any
		if err := value.Decode(&v); err != nil {
			return s.errorf(value, join(path, name), "is not valid")
		}
		option, err := structpb.NewValue(v)
		if err == nil {
			_, err = toJSON(option) // refuses what is not a number
		}
		if err != nil {
			return s.errorf(value, join(path, name), "cannot be said in JSON")
		}
		s.def.setOption(name, option)
		return nil
	})
}

func specFileTopic() *cobra.Command {
	return &cobra.Command{
		Use:   "sandbox-yaml",
		Short: "What a sandbox.yaml looks like",
		Long: `A sandbox.yaml describes one sandbox; "agentctl sandbox start" reads the one in
the current folder. Every key is optional but image (or machine). Relative
paths start at the file's folder. An unknown key is an error.

` + specFileExample,
	}
}

// specFileExample is also in docs/sandbox-yaml.md; a test keeps them the same.
const specFileExample = `# What it is
name: web                       # default: this folder's name
image: docker.io/library/node:22
labels: {team: apps, tier: web}

# What runs in it
command: [node, server.js]      # or one text: node server.js
user: "1000:1000"
workdir: /workspace
env:
  NODE_ENV: production
  PORT: 8080

# What it may use
cpus: 1.5
memory: 2GiB
pids: 512

# What it sees of the host
workspace: ./                   # read-write at /workspace; "./:ro" for read-only
data:
  - path: ~/data/web            # always writable
    target: /data

# How it is reached
ports:
  - 8080                        # on a host port that the agent leases
  - {name: debug, guest: 9229, host: 9229}

# What it needs to know, and nobody else
secrets:
  OPENAI_API_KEY: env-file:~/.config/keys.env

# Its life
ready:
  http: {port: 8080, path: /health}
  timeout: 45s
idle: 30m
restart: on-failure:5
`
