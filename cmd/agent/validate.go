package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// validate refuses a configuration that cannot work on any host. It returns
// all that is wrong, a line each, that begins with the key.
func (c *Config) validate() error {
	var errs []error
	refuse := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: "+format, append([]any{key}, args...)...))
	}
	lasting := func(key string, d duration, low, high time.Duration) {
		if time.Duration(d) < low || time.Duration(d) > high {
			refuse(key, "%s is not from %s to %s", d, low, high)
		}
	}
	if problem := pathProblem(c.StateDir); problem != "" {
		refuse("state_dir", "%s", problem)
	}
	if problem := socketProblem(c.Socket); problem != "" {
		refuse("socket", "%s", problem)
	}
	if c.DefaultDriver == "" {
		refuse("default_driver", "is missing")
	}
	if _, err := logLevel(c.LogLevel); err != nil {
		refuse("log_level", "%q is none of debug, info, warn and error", c.LogLevel)
	}
	if !slices.Contains([]string{"text", "json"}, c.LogFormat) {
		refuse("log_format", "%q is neither text nor json", c.LogFormat)
	}
	if !slices.Contains([]string{"auto", "kvm", "tcg"}, c.VM.Accelerator) {
		refuse("vm.accelerator", "%q is none of auto, kvm and tcg", c.VM.Accelerator)
	}
	if problem := networkProblem(c.VM.Network, runtime.GOOS); problem != "" {
		refuse("vm.network", "%s", problem)
	}
	for _, k := range []key{
		{path: "machine_classes", at: &c.MachineClasses},
		{path: "podman.socket", at: &c.Podman.Socket},
		{path: "guestd", at: &c.Guestd},
		{path: "vm.guest_kit", at: &c.VM.GuestKit},
		{path: "vm.bundles", at: &c.VM.Bundles},
		{path: "secrets.age_identities", at: &c.Secrets.AgeIdentities},
	} {
		if problem := pathProblem(k.String()); k.String() != "" && problem != "" {
			refuse(k.path, "%s", problem)
		}
	}
	for i, root := range c.MountRoots {
		if problem := pathProblem(root); problem != "" {
			refuse(fmt.Sprintf("mount_roots[%d]", i), "%s", problem)
		}
	}
	for i, root := range c.Secrets.Roots {
		if problem := pathProblem(root); problem != "" {
			refuse(fmt.Sprintf("secrets.roots[%d]", i), "%s", problem)
		}
	}
	lasting("secrets.timeout", c.Secrets.Timeout, 100*time.Millisecond, 5*time.Minute)
	between(refuse, "ports.first", c.Ports.First, 1, 65535)
	between(refuse, "ports.last", c.Ports.Last, c.Ports.First, 65535)
	between(refuse, "max_concurrent_boots", c.MaxConcurrentBoots, 1, 1000)
	between(refuse, "max_running", c.MaxRunning, 1, 100_000)
	between(refuse, "min_free_memory_mib", c.MinFreeMemoryMiB, 0, 64<<20)
	between(refuse, "max_archive_mib", c.MaxArchiveMiB, 1, 1<<20)
	lasting("idle_scan", c.IdleScan, 100*time.Millisecond, time.Hour)
	lasting("stop_timeout", c.StopTimeout, 0, 10*time.Minute)
	c.validateListeners(refuse)
	return errors.Join(errs...)
}

func (c *Config) validateListeners(refuse refusal) {
	files := []struct{ key, path string }{
		{"tls.cert", c.TLS.Cert}, {"tls.key", c.TLS.Key}, {"tls.client_ca", c.TLS.ClientCA},
	}
	for _, file := range files {
		switch {
		case c.TLS.Listen == "" && file.path != "":
			refuse(file.key, "is given without tls.listen")
		case c.TLS.Listen != "" && file.path == "":
			refuse(file.key, "is missing; TCP is served with mutual TLS only, never plain")
		case file.path != "" && pathProblem(file.path) != "":
			refuse(file.key, "%s", pathProblem(file.path))
		}
	}
	if c.TLS.Listen != "" {
		if _, err := hostOf(c.TLS.Listen); err != nil {
			refuse("tls.listen", "%v", err)
		}
	}
	if c.Metrics.Listen != "" {
		host, err := hostOf(c.Metrics.Listen)
		switch {
		case err != nil:
			refuse("metrics.listen", "%v", err)
		case !c.Metrics.AllowRemote && !loopback(host):
			refuse("metrics.listen", "%q is not a loopback address; anybody who reaches it may read the metrics, "+
				"so set metrics.allow_remote too if that is meant", c.Metrics.Listen)
		}
	}
	if c.Traces.OTLPEndpoint != "" {
		u, err := url.Parse(c.Traces.OTLPEndpoint)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			refuse("traces.otlp_endpoint", "%q is neither http://HOST:PORT nor https://HOST:PORT", c.Traces.OTLPEndpoint)
		}
	}
}

// refusal notes what is wrong with a key.
type refusal func(key, format string, args ...any)

func between[N int | uint64](refuse refusal, key string, n, low, high N) {
	if n < low || n > high {
		refuse(key, "%d is not from %d to %d", n, low, high)
	}
}

// networkProblem says why machines cannot have a network on a system by its
// GOOS; empty: they can.
func networkProblem(network, goos string) string {
	switch {
	case network == networkStack || network == networkNAT && goos == "darwin":
		return ""
	case network == networkNAT:
		return "nat is Virtualization.framework's; use stack"
	}
	return fmt.Sprintf("%q is neither stack nor nat", network)
}

func pathProblem(path string) string {
	switch {
	case path == "":
		return "is missing; give an absolute path"
	case !filepath.IsAbs(path):
		return fmt.Sprintf("%q is not an absolute path", path)
	case strings.ContainsRune(path, 0):
		return "has a NUL byte"
	default:
		return ""
	}
}

// socketProblem knows an address when it sees one: whoever gives it means
// plain TCP.
func socketProblem(path string) string {
	_, _, err := net.SplitHostPort(path)
	if strings.Contains(path, "://") || err == nil && !filepath.IsAbs(path) {
		return fmt.Sprintf("%q is not a path; plain TCP is not served, anybody could call: "+
			"use tls.listen with tls.cert, tls.key and tls.client_ca", path)
	}
	return pathProblem(path)
}

// hostOf returns the host of a host:port; empty: all addresses.
func hostOf(address string) (string, error) {
	host, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return "", fmt.Errorf("%q is not of the form host:port", address)
	}
	return host, nil
}

func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback()
}

func logLevel(name string) (slog.Level, error) {
	switch name {
	case "debug", "info", "warn", "error":
		var level slog.Level
		return level, level.UnmarshalText([]byte(name))
	default:
		return 0, errors.New("no such level")
	}
}
