package shim

import (
	"context"
	"fmt"
	"os"
	"path"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
)

// scopeLimit is how long the service manager may take to make a scope.
const scopeLimit = 10 * time.Second

// leaveService moves this process from the service that started it, if a
// user's service manager did, to a scope of its own: a restart of that service
// ends what is left in its control group. It is to be called before anything is
// started that should come along. The scope goes when its last process does.
//
// Of a service of the system's nothing is done: only root may move processes
// there, and its unit says KillMode=process.
func leaveService(name string) error {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil //nolint:nilerr // No control groups, no services.
	}
	if !isUserService(string(text)) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), scopeLimit)
	defer cancel()
	conn, err := dbus.NewUserConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("ask the service manager for a scope: %w", err)
	}
	defer conn.Close()
	// Sandboxes of other agents may have the same name.
	unit := fmt.Sprintf("choiros-%s-%d.scope", name, os.Getpid())
	done := make(chan string, 1)
	_, err = conn.StartTransientUnitContext(ctx, unit, "fail", []dbus.Property{
		dbus.PropDescription("choiros sandbox " + name),
		dbus.PropPids(uint32(os.Getpid())), //nolint:gosec // The kernel's numbers have 22 bits.
		{Name: "CollectMode", Value: godbus.MakeVariant("inactive-or-failed")},
		// A shim takes no notice of SIGTERM: nothing is gained by waiting.
		{Name: "TimeoutStopUSec", Value: godbus.MakeVariant(uint64(2 * time.Second / time.Microsecond))},
	}, done)
	if err != nil {
		return fmt.Errorf("make a scope: %w", err)
	}
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("make the scope %s: the service manager says %s", unit, result)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("make the scope %s: %w", unit, ctx.Err())
	}
}

// isUserService reports whether the text of a /proc/PID/cgroup is that of a
// process in a service of a user's service manager.
func isUserService(cgroup string) bool {
	for line := range strings.Lines(cgroup) {
		group, unified := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !unified {
			continue
		}
		dir, unit := path.Split(group)
		return strings.HasSuffix(unit, ".service") && strings.Contains(dir, "/user@")
	}
	return false
}
