package container

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/choiros/agent/internal/sandbox"
)

// options are the spec's driver_options as this driver knows them.
type options struct {
	// CapAdd are capabilities to keep, by their names without CAP_.
	CapAdd []string `json:"cap_add"`
	// Network is "internet" (the default) or "none".
	Network networkMode `json:"network"`
	// ReadOnlyRootfs makes the image's files read-only; /tmp, /run, /dev/shm
	// and the like stay writable, in memory.
	ReadOnlyRootfs bool `json:"read_only_rootfs"`
	// Userns says which user inside is the host's: "auto" (the default), the
	// workload's; or "root", always the superuser, as with podman run.
	Userns usernsMode `json:"userns"`
}

type networkMode string

const (
	networkInternet networkMode = "internet"
	networkNone     networkMode = "none"
)

type usernsMode string

const (
	usernsAuto usernsMode = "auto"
	usernsRoot usernsMode = "root"
)

const optionsField = "spec.driver_options"

// parseOptions decodes driver_options strictly.
func parseOptions(raw json.RawMessage) (options, error) {
	opts := options{Network: networkInternet, Userns: usernsAuto}
	if trimmed := bytes.TrimSpace(raw); len(trimmed) == 0 || bytes.Equal(trimmed, []byte("null")) {
		return opts, nil
	}
	// Decoded key by key, so that an error can name the key.
	var keys map[string]json.RawMessage
	decoder := json.NewDecoder(bytes.NewReader(raw))
	if err := decoder.Decode(&keys); err != nil {
		return opts, sandbox.Invalidf(optionsField, "is not a JSON object: %s", jsonProblem(err))
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return opts, sandbox.Invalidf(optionsField, "has something behind its end")
	}
	known := map[string]any{
		"cap_add":          &opts.CapAdd,
		"network":          &opts.Network,
		"read_only_rootfs": &opts.ReadOnlyRootfs,
		"userns":           &opts.Userns,
	}
	for _, key := range sortedKeys(keys) {
		field := optionsField + "." + key
		target, ok := known[key]
		if !ok {
			return opts, sandbox.Invalidf(field, "is not known to this driver; it knows %s", strings.Join(sortedKeys(known), ", "))
		}
		if err := json.Unmarshal(keys[key], target); err != nil {
			return opts, sandbox.Invalidf(field, "%s", jsonProblem(err))
		}
	}
	return opts, opts.check()
}

// check refuses values that are of the right type and yet wrong, and brings
// the others into one form.
func (o *options) check() error {
	switch o.Network {
	case networkInternet, networkNone:
	default:
		return sandbox.Invalidf(optionsField+".network", "%q is neither %s nor %s", o.Network, networkInternet, networkNone)
	}
	switch o.Userns {
	case usernsAuto, usernsRoot:
	default:
		return sandbox.Invalidf(optionsField+".userns", "%q is neither %s nor %s", o.Userns, usernsAuto, usernsRoot)
	}
	for i, name := range o.CapAdd {
		field := fmt.Sprintf("%s.cap_add[%d]", optionsField, i)
		capability := strings.TrimPrefix(strings.ToUpper(name), "CAP_")
		if reason, refused := refusedCapabilities()[capability]; refused {
			return sandbox.Invalidf(field, "%s is refused: %s", capability, reason)
		}
		if !slices.Contains(grantableCapabilities(), capability) {
			return sandbox.Invalidf(field, "%q is not a capability that can be added; these can: %s",
				name, strings.Join(grantableCapabilities(), ", "))
		}
		o.CapAdd[i] = capability
	}
	slices.Sort(o.CapAdd)
	o.CapAdd = slices.Compact(o.CapAdd)
	return nil
}

// grantableCapabilities are those whose effect ends at the sandbox's own files,
// processes and network. See capabilities(7).
func grantableCapabilities() []string {
	return []string{
		"AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "IPC_LOCK", "KILL", "LEASE",
		"LINUX_IMMUTABLE", "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SETUID",
		"SYS_CHROOT", "SYS_NICE",
	}
}

// refusedCapabilities are those that are asked for most and not given, and why.
func refusedCapabilities() map[string]string {
	const kernel = "it opens parts of the kernel in which most escapes from containers were found"
	return map[string]string{
		"ALL":             "capabilities are added one by one",
		"SYS_ADMIN":       kernel + "; nearly everything that asks for it needs something smaller",
		"NET_ADMIN":       kernel + ", and it undoes what keeps the sandbox's network from the host",
		"NET_RAW":         kernel,
		"SYS_PTRACE":      "processes of the same user can be traced without it",
		"BPF":             kernel,
		"PERFMON":         kernel,
		"SYS_MODULE":      "it loads code into the host's kernel",
		"SYS_RAWIO":       "it opens the host's hardware",
		"SYS_BOOT":        "it restarts the host",
		"SYS_TIME":        "the host's clock is not the sandbox's",
		"SYSLOG":          "the kernel's log is the host's",
		"MKNOD":           "a sandbox has no devices",
		"DAC_READ_SEARCH": "it opens files by handle, past the sandbox's own root",
		"SYS_RESOURCE":    "it lifts the limits that the sandbox is given",
		"AUDIT_CONTROL":   "the audit system is the host's",
		"MAC_ADMIN":       "the host's security policy is not the sandbox's",
		"MAC_OVERRIDE":    "the host's security policy is not the sandbox's",
	}
}

// jsonProblem is a decoding error for people.
func jsonProblem(err error) string {
	if wrong, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return fmt.Sprintf("is a %s, and has to be a %s", wrong.Value, wrong.Type.Kind())
	}
	return "is malformed: " + err.Error()
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}
