// Package version says which version of the project a binary is. It is one
// for all binaries, so that they can be compared.
package version

import "runtime/debug"

// stamped is set by the linker: -X github.com/choiros/agent/internal/version.stamped=v1.2.3.
var stamped string

// String is the version that this binary was stamped with, or else that of its
// module, or of the commit that it was built from.
func String() string {
	if stamped != "" {
		return stamped
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	revision, dirty := "", ""
	for _, setting := range info.Settings {
		switch {
		case setting.Key == "vcs.revision":
			revision = setting.Value[:min(12, len(setting.Value))]
		case setting.Key == "vcs.modified" && setting.Value == "true":
			dirty = "-dirty"
		}
	}
	if revision == "" {
		return "devel"
	}
	return "devel-" + revision + dirty
}
