package main

import (
	"log/slog"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/activation"

	"github.com/choiros/agent/internal/forward"
	"github.com/choiros/agent/internal/secrets"
)

// secretsConfig is how the resolver is told where secrets are.
func secretsConfig(cfg SecretsConfig) secrets.Config {
	return secrets.Config{
		CredentialsDir: os.Getenv("CREDENTIALS_DIRECTORY"), // systemd.exec(5), LoadCredential=
		AgeIdentities:  cfg.AgeIdentities, Roots: cfg.Roots, Forbidden: cfg.Forbidden,
		Timeout: time.Duration(cfg.Timeout),
		AWS:     secrets.AWSConfig{Endpoint: cfg.AWSEndpoint, Region: cfg.AWSRegion, Profile: cfg.AWSProfile},
	}
}

// portsConfig is how ports are forwarded. Under systemd the listening sockets
// are kept by it while the agent is restarted; see FileDescriptorStoreMax= in
// systemd.service(5).
func portsConfig(cfg PortsConfig, log *slog.Logger) forward.Config {
	config := forward.Config{First: uint16(cfg.First), Last: uint16(cfg.Last), Log: log} //nolint:gosec // Validated.
	if socket := os.Getenv("NOTIFY_SOCKET"); socket != "" {
		config.Keeper = forward.FDStore{Socket: socket}
		config.Inherited = activation.Files(true)
	}
	return config
}
