package main

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/structpb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

// definition is a sandbox as a person described it, in a file, by flags, or
// both: flags are set on top of what a file said.
type definition struct {
	// file is the sandbox.yaml it was read from; empty: none.
	file string
	// folder is what its workspace is unless it says otherwise: the file's
	// folder, or the current one.
	folder string
	// workspaceChosen tells a workspace, or none, that was asked for from the
	// default.
	workspaceChosen bool

	name   string
	labels map[string]string
	spec   *agentv1.SandboxSpec

	// inline are the secrets whose values are to be read, by the NAME of their
	// source inline:NAME.
	inline []string
}

func newDefinition(folder string) *definition {
	return &definition{folder: folder, labels: map[string]string{}, spec: &agentv1.SandboxSpec{Env: map[string]string{}}}
}

// paths resolves the paths of one place: a file, or the command line.
type paths struct {
	base string // of relative ones; absolute
	home string // what ~ stands for; empty: nothing
}

func (p paths) resolve(s string) (string, error) {
	switch {
	case s == "":
		return "", fmt.Errorf("names no path")
	case p.home != "" && s == "~":
		s = p.home
	case p.home != "" && strings.HasPrefix(s, "~/"):
		s = filepath.Join(p.home, s[2:])
	}
	if !filepath.IsAbs(s) {
		s = filepath.Join(p.base, s)
	}
	return filepath.Clean(s), nil
}

const (
	workspaceTarget = "/workspace"
	dataTarget      = "/data"
)

// parseMount reads PATH[:TARGET][:rw|ro]. A workspace is writable unless it
// says ro; data always is.
func parseMount(kind agentv1.Mount_Kind, s string, p paths) (*agentv1.Mount, error) {
	form := "PATH[:TARGET][:rw|ro]"
	if kind == agentv1.Mount_KIND_DATA {
		form = "PATH[:TARGET]"
	}
	parts := strings.Split(s, ":")
	readOnly := false
	if last := len(parts) - 1; kind == agentv1.Mount_KIND_WORKSPACE && last > 0 && (parts[last] == "ro" || parts[last] == "rw") {
		readOnly = parts[last] == "ro"
		parts = parts[:last]
	}
	if len(parts) > 2 || len(parts) == 2 && parts[1] == "" {
		return nil, fmt.Errorf("%q is not of the form %s", s, form)
	}
	target := ""
	if len(parts) == 2 {
		target = parts[1]
	}
	return newMount(kind, parts[0], target, readOnly, p)
}

func newMount(kind agentv1.Mount_Kind, source, target string, readOnly bool, p paths) (*agentv1.Mount, error) {
	path, err := p.resolve(source)
	if err != nil {
		return nil, err
	}
	m := &agentv1.Mount{Kind: kind, Source: path, Target: target}
	if kind == agentv1.Mount_KIND_WORKSPACE {
		m.ReadWrite = !readOnly
		m.Target = orElse(target, workspaceTarget)
	} else {
		m.Target = orElse(target, dataTarget)
	}
	if !strings.HasPrefix(m.Target, "/") {
		return nil, fmt.Errorf("target %q is not absolute", m.Target)
	}
	return m, nil
}

// parseDisk reads PATH:TARGET:SIZE.
func parseDisk(s string, p paths) (*agentv1.Mount, error) {
	parts := strings.Split(s, ":")
	if len(parts) != 3 {
		return nil, fmt.Errorf("%q is not of the form PATH:TARGET:SIZE", s)
	}
	size, err := parseMemory(parts[2])
	if err != nil {
		return nil, err
	}
	return newDisk(parts[0], parts[1], size, p)
}

func newDisk(source, target string, sizeMiB uint64, p paths) (*agentv1.Mount, error) {
	path, err := p.resolve(source)
	if err != nil {
		return nil, err
	}
	if !strings.HasPrefix(target, "/") {
		return nil, fmt.Errorf("target %q is not absolute", target)
	}
	return &agentv1.Mount{Kind: agentv1.Mount_KIND_DISK, Source: path, Target: target, SizeMib: sizeMiB}, nil
}

func orElse(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// setWorkspace replaces the workspace; nil: there is none.
func (d *definition) setWorkspace(m *agentv1.Mount) {
	d.workspaceChosen = true
	d.spec.Mounts = slices.DeleteFunc(d.spec.Mounts, func(m *agentv1.Mount) bool {
		return m.GetKind() == agentv1.Mount_KIND_WORKSPACE
	})
	if m != nil {
		d.spec.Mounts = slices.Insert(d.spec.Mounts, 0, m)
	}
}

// addMount adds a data mount or a disk, in place of one of its kind with the
// same target.
func (d *definition) addMount(m *agentv1.Mount) {
	d.spec.Mounts = replace(d.spec.Mounts, m, func(o *agentv1.Mount) bool {
		return o.GetKind() == m.GetKind() && o.GetTarget() == m.GetTarget()
	})
}

func (d *definition) addPort(p *agentv1.Port) {
	d.spec.Ports = replace(d.spec.Ports, p, func(o *agentv1.Port) bool {
		return o.GetGuestPort() == p.GetGuestPort() && o.GetProtocol() == p.GetProtocol()
	})
}

// addSecret adds a secret, in place of one that is delivered under the same
// name; all that a source has replaces only what that source has.
func (d *definition) addSecret(s *agentv1.SecretRef) {
	d.spec.Secrets = replace(d.spec.Secrets, s, func(o *agentv1.SecretRef) bool {
		return o.GetName() == s.GetName() && (s.GetName() != sandbox.AllNames || o.GetSource() == s.GetSource())
	})
}

// setSecretValue makes a secret one whose value is given over the API, unless
// a file made it one already.
func (d *definition) setSecretValue(name string) error {
	if name, _, found := strings.Cut(name, "="); found {
		// The rest is not echoed: it may be the value.
		return fmt.Errorf("a value is not given as an argument, where others can read it; write %s alone", oneLine(name))
	}
	if name == "" {
		return fmt.Errorf("is empty")
	}
	if !slices.Contains(d.inline, name) {
		d.inline = append(d.inline, name)
	}
	source := inlinePrefix + name
	if !slices.ContainsFunc(d.spec.GetSecrets(), func(s *agentv1.SecretRef) bool { return s.GetSource() == source }) {
		d.addSecret(&agentv1.SecretRef{Name: name, Source: source})
	}
	return nil
}

// inlinePrefix begins the source of a secret whose value is given over the API.
const inlinePrefix = "inline:"

func (d *definition) autoForward() *agentv1.AutoForward {
	if d.spec.AutoForward == nil {
		d.spec.AutoForward = &agentv1.AutoForward{}
	}
	return d.spec.AutoForward
}

func replace[T any](list []T, with T, same func(T) bool) []T {
	if i := slices.IndexFunc(list, same); i >= 0 {
		list[i] = with
		return list
	}
	return append(list, with)
}

func (d *definition) setImage(s string)   { d.spec.Source = &agentv1.SandboxSpec_Image{Image: s} }
func (d *definition) setMachine(s string) { d.spec.Source = &agentv1.SandboxSpec_Machine{Machine: s} }

func (d *definition) resources() *agentv1.Resources {
	if d.spec.Resources == nil {
		d.spec.Resources = &agentv1.Resources{}
	}
	return d.spec.Resources
}

func (d *definition) readiness() *agentv1.Readiness {
	if d.spec.Readiness == nil {
		d.spec.Readiness = &agentv1.Readiness{}
	}
	return d.spec.Readiness
}

func (d *definition) setOption(key string, value *structpb.Value) {
	if d.spec.DriverOptions == nil {
		d.spec.DriverOptions = &structpb.Struct{Fields: map[string]*structpb.Value{}}
	}
	d.spec.DriverOptions.Fields[key] = value
}
