package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

func TestSpecFilePolicies(t *testing.T) {
	t.Parallel()
	d, err := parseSpecFile([]byte(`
keyless: true
secret_rotation: {action: signal, signal: USR1}
auto_forward: {mode: forward, deny_ports: [5432, 6379]}
secrets:
  - {name: "*", source: "env-file:./a.env"}
  - {name: "*", source: "env-file:b.env"}
  - {name: KEY, source: "sops:keys.yaml#key"}
`), "sandbox.yaml", "/work", "/home/ada")
	if err != nil {
		t.Fatal(err)
	}
	want := &agentv1.SandboxSpec{
		Keyless:        true,
		SecretRotation: &agentv1.SecretRotation{Action: agentv1.SecretRotation_ACTION_SIGNAL, Signal: "USR1"},
		AutoForward:    &agentv1.AutoForward{Mode: agentv1.AutoForward_MODE_FORWARD, DenyPorts: []uint32{5432, 6379}},
		Secrets: []*agentv1.SecretRef{
			{Name: "*", Source: "env-file:/work/a.env"}, {Name: "*", Source: "env-file:/work/b.env"}, {Name: "KEY", Source: "sops:/work/keys.yaml#key"},
		},
	}
	if diff := cmp.Diff(want, d.spec, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	for text, problem := range map[string]string{
		"keyless: 1":                         "sandbox.yaml:1: keyless: is neither true nor false",
		"secret_rotation: never":             `secret_rotation: "never" is none of leave, signal and restart`,
		"secret_rotation: restart:HUP":       "restart takes no signal",
		"secret_rotation: {signal: HUP}":     "secret_rotation.action: is missing",
		"secret_rotation: signal:NOPE":       `"NOPE" is not a signal`,
		"auto_forward: on":                   `"on" is none of off, offer and forward`,
		"auto_forward: {deny_port: [1]}":     "auto_forward.deny_port: unknown key; did you mean deny_ports?",
		"auto_forward: {deny_ports: [0, 1]}": `auto_forward.deny_ports[0]: "0" is not a port from 1 to 65535`,
	} {
		_, err := parseSpecFile([]byte(text), "sandbox.yaml", "/work", "")
		if err == nil || !strings.Contains(err.Error(), problem) {
			t.Errorf("%s: %v, want %s", text, err, problem)
		}
	}
}
