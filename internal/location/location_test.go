package location

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPlaces(t *testing.T) {
	t.Parallel()
	const library = "/Users/ada/Library/Application Support/choiros-agent"
	for _, test := range []struct {
		name, goos string
		uid        int
		env        map[string]string
		want       Places
	}{
		{
			name: "root", goos: "linux", uid: 0,
			env: map[string]string{"HOME": "/root", "XDG_RUNTIME_DIR": "/run/user/0", "XDG_STATE_HOME": "/x"},
			want: Places{
				Socket: "/run/choiros-agent/agent.sock", Config: "/etc/choiros-agent/config.toml",
				State: "/var/lib/choiros-agent", Log: "/var/log/choiros-agent/agent.log",
			},
		},
		{
			name: "user", goos: "linux", uid: 1000,
			env: map[string]string{"HOME": "/home/ada", "XDG_RUNTIME_DIR": "/run/user/1000"},
			want: Places{
				Socket: "/run/user/1000/choiros-agent/agent.sock", Config: "/home/ada/.config/choiros-agent/config.toml",
				State: "/home/ada/.local/state/choiros-agent", Log: "/home/ada/.local/state/choiros-agent/agent.log",
			},
		},
		{
			name: "user with XDG set", goos: "linux", uid: 1000,
			env: map[string]string{
				"HOME": "/home/ada", "XDG_RUNTIME_DIR": "/r", "XDG_CONFIG_HOME": "/c", "XDG_STATE_HOME": "/s",
			},
			want: Places{
				Socket: "/r/choiros-agent/agent.sock", Config: "/c/choiros-agent/config.toml",
				State: "/s/choiros-agent", Log: "/s/choiros-agent/agent.log",
			},
		},
		{
			name: "relative XDG is ignored", goos: "linux", uid: 1000,
			env: map[string]string{
				"HOME": "/home/ada", "XDG_RUNTIME_DIR": "r", "XDG_CONFIG_HOME": "c", "XDG_STATE_HOME": "./s",
			},
			want: Places{
				Socket: "/home/ada/.local/state/choiros-agent/agent.sock", Config: "/home/ada/.config/choiros-agent/config.toml",
				State: "/home/ada/.local/state/choiros-agent", Log: "/home/ada/.local/state/choiros-agent/agent.log",
			},
		},
		{
			name: "nothing set", goos: "linux", uid: 1000,
			want: Places{Socket: "/run/user/1000/choiros-agent/agent.sock"},
		},
		{
			name: "mac", goos: "darwin", uid: 501,
			env: map[string]string{"HOME": "/Users/ada"},
			want: Places{
				Socket: "/Users/ada/.choiros-agent/agent.sock", Config: library + "/config.toml",
				State: library, Log: "/Users/ada/Library/Logs/choiros-agent/agent.log",
			},
		},
		{
			name: "mac with XDG set", goos: "darwin", uid: 501,
			env: map[string]string{
				"HOME": "/Users/ada", "XDG_RUNTIME_DIR": "/r", "XDG_CONFIG_HOME": "/c", "XDG_STATE_HOME": "/s",
			},
			want: Places{
				Socket: "/r/choiros-agent/agent.sock", Config: "/c/choiros-agent/config.toml",
				State: "/s/choiros-agent", Log: "/s/choiros-agent/agent.log",
			},
		},
		{
			name: "mac, nothing set", goos: "darwin", uid: 501,
			want: Places{Socket: "/tmp/choiros-agent-501/agent.sock"},
		},
		{
			name: "mac root", goos: "darwin", uid: 0,
			want: Places{
				Socket: "/var/run/choiros-agent/agent.sock", Config: "/etc/choiros-agent/config.toml",
				State: "/Library/Application Support/choiros-agent", Log: "/Library/Logs/choiros-agent/agent.log",
			},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			getenv := func(name string) string { return test.env[name] }
			if diff := cmp.Diff(test.want, On(test.goos, getenv, test.uid)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestPlacesOfThisHostFitASocketAddress(t *testing.T) {
	t.Parallel()
	here := Here(os.Getenv, os.Getuid())
	path := here.Socket
	if !strings.HasPrefix(path, "/") || len(path) > 103 {
		t.Errorf("socket = %q: not absolute, or longer than 103 bytes", path)
	}
	for _, place := range []string{here.Config, here.State, here.Log} {
		if place != "" && !strings.HasPrefix(place, "/") {
			t.Errorf("%q is not absolute", place)
		}
	}
}

func TestSocketsOfLongNamesFitOnAMac(t *testing.T) {
	t.Parallel()
	for length := range 300 {
		for _, variable := range []string{"HOME", "XDG_RUNTIME_DIR"} {
			getenv := func(name string) string {
				if name == variable {
					return "/Users/" + strings.Repeat("a", length)
				}
				return ""
			}
			path := On("darwin", getenv, 4_000_000_000).Socket
			if len(path) > 103 || !strings.HasPrefix(path, "/") {
				t.Errorf("%s of %d bytes: %q has %d", variable, length, path, len(path))
			}
			if short := strings.HasPrefix(path, "/tmp/"); short != (length > 70) && variable == "HOME" {
				t.Errorf("%s of %d bytes: %q", variable, length, path)
			}
		}
	}
}
