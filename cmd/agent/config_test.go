package main

import (
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/choiros/agent/internal/location"
)

// TestEverySettingHasAFlagAndIsDocumented ties the struct, the flags and the
// manual together.
func TestEverySettingHasAFlagAndIsDocumented(t *testing.T) {
	t.Parallel()
	var paths []string
	var walk func(prefix string, typ reflect.Type)
	walk = func(prefix string, typ reflect.Type) {
		for field := range typ.Fields() {
			name := prefix + field.Tag.Get("toml")
			if field.Type.Kind() == reflect.Struct {
				walk(name+".", field.Type)
			} else {
				paths = append(paths, name)
			}
		}
	}
	walk("", reflect.TypeFor[Config]())
	var keys []string
	for _, k := range new(Config).keys() {
		keys = append(keys, k.path)
	}
	slices.Sort(paths)
	slices.Sort(keys)
	if !slices.Equal(paths, keys) {
		t.Errorf("settings %v\nkeys %v", paths, keys)
	}
	manual, err := os.ReadFile(filepath.Join("..", "..", "docs", "agent.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		if !strings.Contains(string(manual), "`"+path+"`") {
			t.Errorf("docs/agent.md does not tell of %s", path)
		}
	}
}

func TestEveryFlagIsSetWhereItBelongs(t *testing.T) {
	t.Parallel()
	for _, k := range new(Config).keys() {
		var value, want string
		switch k.at.(type) {
		case *bool:
			value, want = "true", "true"
		case *int, *uint64:
			value, want = "17", "17"
		case *duration:
			value, want = "17s", "17s"
		default:
			value, want = "/some/where", "/some/where"
		}
		given, err := parseFlags([]string{"--" + k.flag() + "=" + value})
		if err != nil {
			t.Fatal(err)
		}
		var cfg Config
		for _, at := range cfg.keys() {
			if value, ok := given.values[at.flag()]; ok {
				if err := at.set(value); err != nil {
					t.Error(err)
				}
			}
			if got := at.String(); (at.path == k.path) != (got == want) {
				t.Errorf("--%s %s makes %s %q", k.flag(), value, at.path, got)
			}
		}
	}
}

func TestDefaultsAreValid(t *testing.T) {
	t.Parallel()
	env := map[string]string{"HOME": "/home/ada"}
	for goos, driver := range map[string]string{"linux": "podman", "darwin": "vm"} {
		cfg := Default(goos, func(name string) string { return env[name] }, 1000)
		if err := cfg.validate(); err != nil || cfg.DefaultDriver != driver {
			t.Errorf("on %s: driver %s, %v", goos, cfg.DefaultDriver, err)
		}
	}
	homeless := Default(runtime.GOOS, func(string) string { return "" }, 1000)
	if err := homeless.validate(); err == nil || !strings.Contains(err.Error(), "state_dir: is missing") {
		t.Errorf("without a home: %v", err)
	}
}

func TestNATIsOfMacsAlone(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ network, goos, want string }{
		{"stack", "linux", ""},
		{"stack", "darwin", ""},
		{"nat", "darwin", ""},
		{"nat", "linux", "nat is Virtualization.framework's; use stack"},
		{"bridge", "darwin", `"bridge" is neither stack nor nat`},
		{"", "linux", `"" is neither stack nor nat`},
	} {
		if got := networkProblem(c.network, c.goos); got != c.want {
			t.Errorf("%q on %s: %q, want %q", c.network, c.goos, got, c.want)
		}
	}
}

func TestFileOfTheUserIsRead(t *testing.T) {
	t.Parallel()
	env := map[string]string{"HOME": t.TempDir()}
	getenv := func(name string) string { return env[name] }
	path := location.Here(getenv, 1000).Config
	cfg, file, err := loadConfig(nil, getenv, 1000)
	if err != nil || file != "" || cfg.MaxRunning != 200 {
		t.Errorf("without a file: %+v, %q, %v", cfg, file, err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("max_running = 7\nlog_level = \"warn\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, file, err = loadConfig([]string{"--log-level", "error"}, getenv, 1000)
	if err != nil || file != path || cfg.MaxRunning != 7 || cfg.LogLevel != "error" {
		t.Errorf("with a file: %+v, %q, %v", cfg, file, err)
	}
}

func TestClosest(t *testing.T) {
	t.Parallel()
	candidates := []string{"socket", "socket_group", "tls.listen", "metrics.listen", "max_running"}
	for word, want := range map[string]string{
		"sokcet": "socket", "socketgroup": "socket_group", "tls.lsten": "tls.listen",
		"listen": "tls.listen", "zzz": "", "max-running": "max_running",
	} {
		if got := closestTo(word, candidates); got != want {
			t.Errorf("closest to %s is %q, want %q", word, got, want)
		}
	}
}

func FuzzReadConfig(f *testing.F) {
	f.Add("log_level = \"info\"\n[tls]\nlisten = \":1\"\n")
	f.Add("[class.small]\npids = 5\n")
	f.Fuzz(func(t *testing.T, text string) {
		path := filepath.Join(t.TempDir(), "config.toml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var cfg Config
		if _, err := readConfig(&cfg, path, true); err == nil {
			_ = cfg.validate()
		}
		_, _ = readClasses(path)
	})
}
