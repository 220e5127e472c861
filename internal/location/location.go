// Package location says where the agent's socket, configuration, state and log
// are when nobody said otherwise, so that agent and agentctl find each other.
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

// maxSocket is the longest path that a socket has on macOS: sun_path in unix(4)
// has 104 bytes, the last of them a NUL.
const maxSocket = 103

// Places is where the things of one user's agent are.
type Places struct {
	// Socket is the agent's unix socket: of root
	// /run/choiros-agent/agent.sock, of an ordinary user
	// $XDG_RUNTIME_DIR/choiros-agent/agent.sock, and, where that variable is not
	// set, agent.sock in the state directory. On macOS it is
	// ~/.choiros-agent/agent.sock where that variable is not set, and below /tmp
	// where either is too long for a socket. Never empty.
	Socket string
	// Config is the configuration file: of root /etc/choiros-agent/config.toml,
	// of an ordinary user $XDG_CONFIG_HOME/choiros-agent/config.toml (if not
	// set, below ~/.config, on macOS ~/Library/Application Support). Empty if not
	// even HOME is set.
	Config string
	// State is the state directory: of root /var/lib/choiros-agent (macOS:
	// below /Library/Application Support), of an ordinary user
	// $XDG_STATE_HOME/choiros-agent (if not set, below ~/.local/state, on macOS
	// ~/Library/Application Support). Empty if not even HOME is set.
	State string
	// Log is where the agent's log goes if it goes to a file: of root
	// /var/log/choiros-agent/agent.log (macOS: below /Library/Logs), of an
	// ordinary user agent.log in the state directory, and on macOS below
	// ~/Library/Logs where XDG_STATE_HOME is not set. Empty if not even HOME is
	// set.
	Log string
}

// Here is where things are on the system that this program was built for.
func Here(getenv func(string) string, uid int) Places { return On(runtime.GOOS, getenv, uid) }

// On is where things are on another system, by its GOOS.
func On(goos string, getenv func(string) string, uid int) Places {
	return Places{
		Socket: socket(goos, getenv, uid),
		Config: config(goos, getenv, uid),
		State:  state(goos, getenv, uid),
		Log:    log(goos, getenv, uid),
	}
}

func socket(goos string, getenv func(string) string, uid int) string {
	if goos == "darwin" {
		return macSocket(getenv, uid)
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

// macSocket is no longer than maxSocket whatever the user is called: the state
// directory's own name would leave little of that.
func macSocket(getenv func(string) string, uid int) string {
	if uid == 0 {
		return "/var/run/" + name + "/agent.sock"
	}
	var path string
	if dir := absolute(getenv("XDG_RUNTIME_DIR")); dir != "" {
		path = filepath.Join(dir, name, "agent.sock")
	} else if home := absolute(getenv("HOME")); home != "" {
		path = filepath.Join(home, "."+name, "agent.sock")
	}
	if path == "" || len(path) > maxSocket {
		return "/tmp/" + name + "-" + strconv.Itoa(uid) + "/agent.sock"
	}
	return path
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

func log(goos string, getenv func(string) string, uid int) string {
	const file = "agent.log"
	if goos != "darwin" {
		if uid == 0 {
			return "/var/log/" + name + "/" + file
		}
		return below(userDir(goos, getenv, "XDG_STATE_HOME", ".local/state"), file)
	}
	if uid == 0 {
		return "/Library/Logs/" + name + "/" + file
	}
	if dir := absolute(getenv("XDG_STATE_HOME")); dir != "" {
		return below(dir, file)
	}
	if home := absolute(getenv("HOME")); home != "" {
		return below(filepath.Join(home, "Library/Logs"), file)
	}
	return ""
}

// userDir is a user's base directory of one kind, or empty.
func userDir(goos string, getenv func(string) string, variable, fallback string) string {
	if dir := absolute(getenv(variable)); dir != "" {
		return dir
	}
	home := absolute(getenv("HOME"))
	if home == "" {
		return ""
	}
	if goos == "darwin" {
		fallback = "Library/Application Support"
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
