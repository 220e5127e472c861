// Package location says where the agent's socket, configuration and state are
// when nobody said otherwise, so that agent and agentctl find each other.
//
// It is arithmetic on its arguments: it neither reads the environment nor
// looks at the disk, and makes nothing.
package location

import (
	"path/filepath"
	"runtime"
	"strconv"
)

// name is the folder that everything of the agent's is kept in.
const name = "choiros-agent"

// Socket is the agent's unix socket: of root /run/choiros-agent/agent.sock, of
// an ordinary user $XDG_RUNTIME_DIR/choiros-agent/agent.sock, and, where that
// variable is not set, agent.sock in the state directory. On macOS it is
// ~/.choiros-agent/agent.sock, because a socket's path may have 103 bytes there
// (sun_path in unix(4)). Never empty.
func Socket(getenv func(string) string, uid int) string {
	return socket(runtime.GOOS, getenv, uid)
}

// Config is the agent's configuration file: of root
// /etc/choiros-agent/config.toml, of an ordinary user
// $XDG_CONFIG_HOME/choiros-agent/config.toml (~/.config if not set), on macOS
// below ~/Library/Application Support. Empty if not even HOME is set.
func Config(getenv func(string) string, uid int) string {
	return config(runtime.GOOS, getenv, uid)
}

// State is the agent's state directory: of root /var/lib/choiros-agent, of an
// ordinary user $XDG_STATE_HOME/choiros-agent (~/.local/state if not set), on
// macOS below ~/Library/Application Support. Empty if not even HOME is set.
func State(getenv func(string) string, uid int) string {
	return state(runtime.GOOS, getenv, uid)
}

func socket(goos string, getenv func(string) string, uid int) string {
	if goos == "darwin" {
		if uid == 0 {
			return "/var/run/" + name + "/agent.sock"
		}
		if home := absolute(getenv("HOME")); home != "" {
			return filepath.Join(home, "."+name, "agent.sock")
		}
		return "/tmp/" + name + "-" + strconv.Itoa(uid) + "/agent.sock"
	}
	if uid == 0 {
		return "/run/" + name + "/agent.sock"
	}
	if dir := absolute(getenv("XDG_RUNTIME_DIR")); dir != "" {
		return filepath.Join(dir, name, "agent.sock")
	}
	if dir := state(goos, getenv, uid); dir != "" {
		return filepath.Join(dir, "agent.sock")
	}
	return "/run/user/" + strconv.Itoa(uid) + "/" + name + "/agent.sock"
}

func config(goos string, getenv func(string) string, uid int) string {
	if uid == 0 {
		return "/etc/" + name + "/config.toml"
	}
	return below(userDir(goos, getenv, "XDG_CONFIG_HOME", ".config"), "config.toml")
}

func state(goos string, getenv func(string) string, uid int) string {
	if uid != 0 {
		return below(userDir(goos, getenv, "XDG_STATE_HOME", ".local/state"), "")
	}
	if goos == "darwin" {
		return "/Library/Application Support/" + name
	}
	return "/var/lib/" + name
}

// userDir is a user's base directory of one kind, or empty.
func userDir(goos string, getenv func(string) string, variable, fallback string) string {
	home := absolute(getenv("HOME"))
	if goos == "darwin" {
		fallback = "Library/Application Support"
	} else if dir := absolute(getenv(variable)); dir != "" {
		return dir
	}
	if home == "" {
		return ""
	}
	return filepath.Join(home, fallback)
}

func below(dir, file string) string {
	if dir == "" {
		return ""
	}
	return filepath.Join(dir, name, file)
}

// absolute drops relative paths, as the XDG Base Directory Specification asks.
func absolute(path string) string {
	if !filepath.IsAbs(path) {
		return ""
	}
	return path
}
