package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/choiros/agent/internal/location"
	"github.com/choiros/agent/internal/secrets"
)

// Config is all that can be set, see docs/agent.md. One struct, made once,
// whose values are passed on as plain arguments.
type Config struct {
	StateDir      string `toml:"state_dir"`
	Socket        string `toml:"socket"`
	SocketGroup   string `toml:"socket_group"`
	DefaultDriver string `toml:"default_driver"`
	LogLevel      string `toml:"log_level"`
	LogFormat     string `toml:"log_format"`

	MachineClasses     string   `toml:"machine_classes"`
	MountRoots         []string `toml:"mount_roots"`
	MaxConcurrentBoots int      `toml:"max_concurrent_boots"`
	MaxRunning         int      `toml:"max_running"`
	MinFreeMemoryMiB   uint64   `toml:"min_free_memory_mib"`
	IdleScan           duration `toml:"idle_scan"`
	MaxArchiveMiB      uint64   `toml:"max_archive_mib"`
	StopTimeout        duration `toml:"stop_timeout"`
	Guestd             string   `toml:"guestd"`

	Ports   PortsConfig   `toml:"ports"`
	Secrets SecretsConfig `toml:"secrets"`
	TLS     TLSConfig     `toml:"tls"`
	Metrics MetricsConfig `toml:"metrics"`
	Traces  TracesConfig  `toml:"traces"`
	Podman  PodmanConfig  `toml:"podman"`
	VM      VMConfig      `toml:"vm"`
}

// TLSConfig is TCP with mutual TLS; off without Listen.
type TLSConfig struct {
	Listen   string `toml:"listen"`
	Cert     string `toml:"cert"`
	Key      string `toml:"key"`
	ClientCA string `toml:"client_ca"`
}

// MetricsConfig is the listener that Prometheus asks; off without Listen.
type MetricsConfig struct {
	Listen      string `toml:"listen"`
	AllowRemote bool   `toml:"allow_remote"`
}

// TracesConfig is where traces are sent; off without OTLPEndpoint.
type TracesConfig struct {
	OTLPEndpoint string `toml:"otlp_endpoint"`
}

// PortsConfig is which ports of the host are leased to sandboxes.
type PortsConfig struct {
	First int `toml:"first"`
	Last  int `toml:"last"`
}

// SecretsConfig is how secrets are read, and which ones keyless sandboxes may
// not have.
type SecretsConfig struct {
	Roots         []string `toml:"roots"`
	AgeIdentities string   `toml:"age_identities"`
	Forbidden     []string `toml:"forbidden"`
	Timeout       duration `toml:"timeout"`
	AWSEndpoint   string   `toml:"aws_endpoint"`
	AWSRegion     string   `toml:"aws_region"`
	AWSProfile    string   `toml:"aws_profile"`
}

// PodmanConfig is what the podman driver is told.
type PodmanConfig struct {
	// Socket is podman's; empty: the driver looks for it.
	Socket string `toml:"socket"`
}

// VMConfig is what the driver of virtual machines is told.
type VMConfig struct {
	// GuestKit is a folder; empty: as guestKit finds it.
	GuestKit string `toml:"guest_kit"`
	// Bundles is a folder; empty: bundles in the state directory.
	Bundles string `toml:"bundles"`
	// Accelerator is auto, kvm or tcg.
	Accelerator string `toml:"accelerator"`
	// Network is networkStack or networkNAT.
	Network string `toml:"network"`
}

// What machines' networks can be: the agent's own IP stack, which keeps egress
// policies, or the NAT of Virtualization.framework, which keeps none.
const (
	networkStack = "stack"
	networkNAT   = "nat"
)

// Default is the configuration of a user who set nothing, on a system by its
// GOOS. A Mac has no containers but in a virtual machine of Linux.
func Default(goos string, getenv func(string) string, uid int) Config {
	here := location.On(goos, getenv, uid)
	driver := "podman"
	if goos == "darwin" {
		driver = "vm"
	}
	return Config{
		StateDir:           here.State,
		Socket:             here.Socket,
		DefaultDriver:      driver,
		LogLevel:           "info",
		LogFormat:          "text",
		MaxConcurrentBoots: 10,
		MaxRunning:         200,
		MinFreeMemoryMiB:   1024,
		IdleScan:           duration(30 * time.Second),
		MaxArchiveMiB:      16 << 10,
		StopTimeout:        duration(10 * time.Second),
		VM:                 VMConfig{Accelerator: "auto", Network: networkStack},
		Ports:              PortsConfig{First: 12000, Last: 12999},
		Secrets:            SecretsConfig{Forbidden: secrets.DefaultForbidden(), Timeout: duration(15 * time.Second)},
	}
}

// key is one setting: its path in the file, which with dashes is its flag,
// and where it is kept.
type key struct {
	path, arg, help string
	at              any
}

// flag is the key's name on the command line.
func (k key) flag() string { return strings.NewReplacer(".", "-", "_", "-").Replace(k.path) }

// keys are all of them, in the order they are shown in.
func (c *Config) keys() []key {
	return []key{
		{"state_dir", "DIR", "keep records in this directory", &c.StateDir},
		{"socket", "PATH", "listen on this unix socket", &c.Socket},
		{"socket_group", "GROUP", "let members of this group use the socket", &c.SocketGroup},
		{"default_driver", "NAME", "driver of sandboxes that name none", &c.DefaultDriver},
		{"log_level", "LEVEL", "debug, info, warn or error", &c.LogLevel},
		{"log_format", "FORMAT", "text or json", &c.LogFormat},
		{"machine_classes", "FILE", "table of machine classes", &c.MachineClasses},
		{"mount_roots", "DIR:…", "mount only folders below these; none given: any", &c.MountRoots},
		{"max_concurrent_boots", "N", "boot at most this many sandboxes at once", &c.MaxConcurrentBoots},
		{"max_running", "N", "run at most this many sandboxes", &c.MaxRunning},
		{"min_free_memory_mib", "MIB", "boot nothing while less memory is free", &c.MinFreeMemoryMiB},
		{"idle_scan", "TIME", "pause between two looks for idle sandboxes", &c.IdleScan},
		{"max_archive_mib", "MIB", "refuse longer image archives", &c.MaxArchiveMiB},
		{"stop_timeout", "TIME", "wait this long for requests when stopping", &c.StopTimeout},
		{"guestd", "PATH", "run this guestd in sandboxes; none given: the one beside the agent", &c.Guestd},
		{"ports.first", "N", "first of the host ports that sandboxes are given", &c.Ports.First},
		{"ports.last", "N", "last of them", &c.Ports.Last},
		{"secrets.roots", "DIR:…", "read secrets from files below these only; none given: any", &c.Secrets.Roots},
		{"secrets.age_identities", "FILE", "age identities that age: and sops: secrets are decrypted with", &c.Secrets.AgeIdentities},
		{"secrets.forbidden", "PATTERN,…", "names that keyless sandboxes may not have", &c.Secrets.Forbidden},
		{"secrets.timeout", "TIME", "wait this long for a source of secrets", &c.Secrets.Timeout},
		{"secrets.aws_endpoint", "URL", "AWS Secrets Manager's endpoint, if not the region's own", &c.Secrets.AWSEndpoint},
		{"secrets.aws_region", "NAME", "AWS region; none given: as the AWS SDK finds it", &c.Secrets.AWSRegion},
		{"secrets.aws_profile", "NAME", "AWS profile; none given: as the AWS SDK finds it", &c.Secrets.AWSProfile},
		{"tls.listen", "ADDR", "also listen on this host:port, with mutual TLS", &c.TLS.Listen},
		{"tls.cert", "FILE", "the agent's certificate (PEM)", &c.TLS.Cert},
		{"tls.key", "FILE", "the certificate's key (PEM)", &c.TLS.Key},
		{"tls.client_ca", "FILE", "CA that clients' certificates are signed by (PEM)", &c.TLS.ClientCA},
		{"metrics.listen", "ADDR", "serve metrics to Prometheus on this host:port", &c.Metrics.Listen},
		{"metrics.allow_remote", "", "serve metrics beyond the loopback interface", &c.Metrics.AllowRemote},
		{"traces.otlp_endpoint", "URL", "send traces to this OpenTelemetry collector", &c.Traces.OTLPEndpoint},
		{"podman.socket", "PATH", "podman's API socket; none given: looked for", &c.Podman.Socket},
		{"vm.guest_kit", "DIR", "boot images in virtual machines with this; none given: the one beside the agent, or the one installed", &c.VM.GuestKit},
		{"vm.bundles", "DIR", "machines are bundles in this folder; none given: bundles in the state directory", &c.VM.Bundles},
		{"vm.accelerator", "NAME", "kvm, tcg (emulation) or auto, which is what works", &c.VM.Accelerator},
		{"vm.network", "NAME", "network of virtual machines: stack, or on a Mac nat, which keeps no egress policy", &c.VM.Network},
	}
}

// duration is a time.Duration that reads "30s".
type duration time.Duration

func (d *duration) UnmarshalText(text []byte) error {
	parsed, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%q is not a duration such as 30s or 2m", text)
	}
	*d = duration(parsed)
	return nil
}

func (d duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

func (d duration) String() string { return time.Duration(d).String() }

// absolute makes a path given on the command line independent of the folder
// that the agent was started in.
func absolute(path string) (string, error) {
	if path == "" || filepath.IsAbs(path) || strings.Contains(path, "://") {
		return path, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, path), nil
}
