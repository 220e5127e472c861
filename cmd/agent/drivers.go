package main

import (
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/choiros/agent/internal/container"
	"github.com/choiros/agent/internal/sandbox"
)

// drivers are those of the product; owner tells this agent's sandboxes from
// those of others.
func drivers(cfg Config, owner string, log *slog.Logger) (map[string]sandbox.Driver, error) {
	guestd, err := installGuestd(cfg.Guestd, cfg.StateDir)
	if err != nil {
		// Drivers say so when they are asked for something. What runs goes on.
		log.Error("guestd not installed", "err", err)
	}
	podman, err := container.New(container.Config{
		Socket: cfg.Podman.Socket, RuntimeDir: os.Getenv("XDG_RUNTIME_DIR"), Owner: owner, GuestdDir: guestd,
	})
	if err != nil {
		return nil, err
	}
	all := map[string]sandbox.Driver{"podman": podman}
	return all, addMachines(all, cfg, owner, shimCommand)
}

// names lists drivers for people.
func names(drivers map[string]sandbox.Driver) string {
	return strings.Join(slices.Sorted(maps.Keys(drivers)), ", ")
}
