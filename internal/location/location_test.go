package location

import (
	"os"
	"strings"
	"testing"
)

func TestPlaces(t *testing.T) {
	t.Parallel()
	const library = "/Users/ada/Library/Application Support/choiros-agent"
	for _, test := range []struct {
		name, goos            string
		uid                   int
		env                   map[string]string
		socket, config, state string
	}{
		{
			name: "root", goos: "linux", uid: 0,
			env:    map[string]string{"HOME": "/root", "XDG_RUNTIME_DIR": "/run/user/0", "XDG_STATE_HOME": "/x"},
			socket: "/run/choiros-agent/agent.sock",
			config: "/etc/choiros-agent/config.toml",
			state:  "/var/lib/choiros-agent",
		},
		{
			name: "user", goos: "linux", uid: 1000,
			env:    map[string]string{"HOME": "/home/ada", "XDG_RUNTIME_DIR": "/run/user/1000"},
			socket: "/run/user/1000/choiros-agent/agent.sock",
			config: "/home/ada/.config/choiros-agent/config.toml",
			state:  "/home/ada/.local/state/choiros-agent",
		},
		{
			name: "user with XDG set", goos: "linux", uid: 1000,
			env: map[string]string{
				"HOME": "/home/ada", "XDG_RUNTIME_DIR": "/r", "XDG_CONFIG_HOME": "/c", "XDG_STATE_HOME": "/s",
			},
			socket: "/r/choiros-agent/agent.sock",
			config: "/c/choiros-agent/config.toml",
			state:  "/s/choiros-agent",
		},
		{
			name: "relative XDG is ignored", goos: "linux", uid: 1000,
			env: map[string]string{
				"HOME": "/home/ada", "XDG_RUNTIME_DIR": "r", "XDG_CONFIG_HOME": "c", "XDG_STATE_HOME": "./s",
			},
			socket: "/home/ada/.local/state/choiros-agent/agent.sock",
			config: "/home/ada/.config/choiros-agent/config.toml",
			state:  "/home/ada/.local/state/choiros-agent",
		},
		{
			name: "nothing set", goos: "linux", uid: 1000,
			socket: "/run/user/1000/choiros-agent/agent.sock",
		},
		{
			name: "mac", goos: "darwin", uid: 501,
			env:    map[string]string{"HOME": "/Users/ada", "XDG_RUNTIME_DIR": "/run/x", "XDG_CONFIG_HOME": "/c"},
			socket: "/Users/ada/.choiros-agent/agent.sock",
			config: library + "/config.toml",
			state:  library,
		},
		{
			name: "mac, nothing set", goos: "darwin", uid: 501,
			socket: "/tmp/choiros-agent-501/agent.sock",
		},
		{
			name: "mac root", goos: "darwin", uid: 0,
			socket: "/var/run/choiros-agent/agent.sock",
			config: "/etc/choiros-agent/config.toml",
			state:  "/Library/Application Support/choiros-agent",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			getenv := func(name string) string { return test.env[name] }
			if got := socket(test.goos, getenv, test.uid); got != test.socket {
				t.Errorf("socket = %q, want %q", got, test.socket)
			}
			if got := config(test.goos, getenv, test.uid); got != test.config {
				t.Errorf("config = %q, want %q", got, test.config)
			}
			if got := state(test.goos, getenv, test.uid); got != test.state {
				t.Errorf("state = %q, want %q", got, test.state)
			}
		})
	}
}

func TestPlacesOfThisHostFitASocketAddress(t *testing.T) {
	t.Parallel()
	path := Socket(os.Getenv, os.Getuid())
	if !strings.HasPrefix(path, "/") || len(path) > 103 {
		t.Errorf("socket = %q: not absolute, or longer than 103 bytes", path)
	}
	for _, place := range []string{Config(os.Getenv, os.Getuid()), State(os.Getenv, os.Getuid())} {
		if place != "" && !strings.HasPrefix(place, "/") {
			t.Errorf("%q is not absolute", place)
		}
	}
}
