package main

import (
	"encoding"
	"errors"
	"flag"
	"fmt"
	"io"
	"runtime"
	"strconv"
	"strings"

	"github.com/choiros/agent/internal/location"
)

// errHelp says that help was asked for, and given.
var errHelp = errors.New("help was asked for")

// loadConfig makes the configuration: the defaults, then the file, then the
// flags, then one look at whether it can work. file is the one that was read;
// empty: none.
func loadConfig(args []string, getenv func(string) string, uid int) (cfg Config, file string, err error) {
	cfg = Default(runtime.GOOS, getenv, uid)
	file = location.Here(getenv, uid).Config
	// The flags are read before the file, which one of them names, and laid
	// over it afterwards.
	given, err := parseFlags(args)
	if err != nil {
		return cfg, file, err
	}
	asked := given.file != ""
	if asked {
		if file, err = absolute(given.file); err != nil {
			return cfg, file, err
		}
	}
	found, err := readConfig(&cfg, file, asked)
	if err != nil {
		return cfg, file, err
	}
	if !found {
		file = ""
	}
	for _, k := range cfg.keys() {
		if value, ok := given.values[k.flag()]; ok {
			if err := k.set(value); err != nil {
				return cfg, file, fmt.Errorf("--%s: %w", k.flag(), err)
			}
		}
	}
	return cfg, file, cfg.validate()
}

// givenFlags is a command line, read and not yet understood.
type givenFlags struct {
	file   string
	values map[string]string
}

func parseFlags(args []string) (givenFlags, error) {
	given := givenFlags{values: map[string]string{}}
	set := flag.NewFlagSet("agent", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	set.StringVar(&given.file, "config", "", "")
	for _, k := range new(Config).keys() {
		name := k.flag()
		keep := func(value string) error {
			given.values[name] = value
			return nil
		}
		if _, ok := k.at.(*bool); ok {
			set.BoolFunc(name, "", keep)
		} else {
			set.Func(name, "", keep)
		}
	}
	if err := set.Parse(args); errors.Is(err, flag.ErrHelp) {
		return given, errHelp
	} else if err != nil {
		// The package prints one dash, this program's help two.
		return given, errors.New(strings.Replace(err.Error(), ": -", ": --", 1))
	}
	if set.NArg() > 0 {
		return given, fmt.Errorf("unexpected argument %q", set.Arg(0))
	}
	return given, nil
}

// pathList is the argument of keys that are lists of paths; the other lists
// are separated by commas.
const pathList = "DIR:…"

// set reads a flag's value into its place.
func (k key) set(value string) error {
	var err error
	switch at := k.at.(type) {
	case *string:
		*at = value
		if k.arg == "DIR" || k.arg == "FILE" || k.arg == "PATH" {
			*at, err = absolute(value)
		}
	case *[]string:
		*at = nil
		if k.arg != pathList {
			*at = strings.Split(value, ",")
			break
		}
		for part := range strings.SplitSeq(value, ":") {
			if part, err = absolute(part); err != nil {
				return err
			}
			*at = append(*at, part)
		}
	case *int:
		if *at, err = strconv.Atoi(value); err != nil {
			err = fmt.Errorf("%q is not a whole number", value)
		}
	case *uint64:
		if *at, err = strconv.ParseUint(value, 10, 64); err != nil {
			err = fmt.Errorf("%q is not a whole number from zero", value)
		}
	case *bool:
		if *at, err = strconv.ParseBool(value); err != nil {
			err = fmt.Errorf("%q is neither true nor false", value)
		}
	case encoding.TextUnmarshaler:
		err = at.UnmarshalText([]byte(value))
	default:
		panic(fmt.Sprintf("key %s: %T has no flag", k.path, k.at))
	}
	return err
}

// usage is what --help prints.
func usage(w io.Writer, getenv func(string) string, uid int) {
	fmt.Fprint(w, `agent keeps the sandboxes of this host and serves their API.

Usage:
  agent [flags]                serve until SIGTERM or SIGINT; sandboxes run on
  agent check-config [flags]   print the settings in force, or what is wrong
  agent version                print the version

Examples:
  agent
  agent --log-level debug --socket /tmp/agent.sock --state-dir /tmp/agent
  agent check-config --config /etc/choiros-agent/config.toml
  agent --tls-listen :7443 --tls-cert agent.pem --tls-key agent.key --tls-client-ca clients.pem

Each flag but --config is also a key of the configuration file, and wins over
it: --tls-client-ca is client_ca of [tls].

Flags:
`)
	cfg := Default(runtime.GOOS, getenv, uid)
	line := func(name, arg, help, fallback string) {
		if fallback != "" {
			help += " (" + fallback + ")"
		}
		fmt.Fprintf(w, "  %-30s %s\n", "--"+name+" "+arg, help)
	}
	line("config", "FILE", "read this configuration file", location.Here(getenv, uid).Config)
	for _, k := range cfg.keys() {
		line(k.flag(), k.arg, k.help, k.String())
	}
	fmt.Fprint(w, `
Exit status: 0 stopped as asked, 1 failed, 2 bad flags or configuration.
`)
}

// String is the key's value for people; empty for what is not set.
func (k key) String() string {
	switch at := k.at.(type) {
	case *string:
		return *at
	case *[]string:
		if k.arg != pathList {
			return strings.Join(*at, ",")
		}
		return strings.Join(*at, ":")
	case *int:
		return strconv.Itoa(*at)
	case *uint64:
		return strconv.FormatUint(*at, 10)
	case *bool:
		if !*at {
			return ""
		}
		return "true"
	case fmt.Stringer:
		return at.String()
	default:
		return ""
	}
}
