package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"strings"

	"github.com/BurntSushi/toml"

	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/server"
	"github.com/choiros/agent/internal/version"
)

// The exit statuses.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// run is the whole program.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return program{drivers: drivers}.run(args, stdin, stdout, stderr)
}

// shimCommand makes this program the shim of a virtual machine. It is not for
// people, and --help does not tell of it.
const shimCommand = "vm-shim"

// program is what tests exchange parts of.
type program struct {
	// drivers makes the drivers of an agent, by name; owner is its store's.
	drivers func(cfg Config, owner string, log *slog.Logger) (map[string]sandbox.Driver, error)
	// onStep is manager.Config.OnStep; may be nil.
	onStep func(step string)
}

func (p program) run(args []string, _ io.Reader, stdout, stderr io.Writer) int {
	command := "serve"
	if len(args) > 0 && (args[0] == "" || args[0][0] != '-') {
		command, args = args[0], args[1:]
	}
	var err error
	switch command {
	case shimCommand:
		return runShim(args, stderr)
	case "serve":
		err = p.serve(args, stderr)
	case "check-config":
		err = p.checkConfig(args, stdout)
	case "version":
		if err = noArguments(args); err == nil {
			fmt.Fprintf(stdout, "agent %s %s/%s\n", version.String(), runtime.GOOS, runtime.GOARCH)
		}
	case "help":
		err = errHelp
	default:
		err = &usageError{fmt.Errorf("unknown command %q; see agent --help", command)}
	}
	if errors.Is(err, errHelp) {
		usage(stdout, os.Getenv, os.Getuid())
		return exitOK
	}
	if err != nil {
		printErrors(stderr, err)
	}
	if _, ok := errors.AsType[*usageError](err); ok {
		return exitUsage
	}
	if err != nil {
		return exitFailed
	}
	return exitOK
}

func noArguments(args []string) error {
	given, err := parseFlags(args)
	switch {
	case errors.Is(err, errHelp):
		return err
	case err != nil:
		return &usageError{err}
	case given.file != "" || len(given.values) > 0:
		return &usageError{errors.New("version takes no flags")}
	default:
		return nil
	}
}

// printErrors writes an error, and of joined ones each on its line.
func printErrors(w io.Writer, err error) {
	for line := range strings.SplitSeq(err.Error(), "\n") {
		fmt.Fprintf(w, "agent: %s\n", line)
	}
}

// usageError is a mistake in the flags or the configuration.
type usageError struct{ error }

func (e *usageError) Unwrap() error { return e.error }

// load is loadConfig for this process.
func load(args []string) (cfg Config, file string, err error) {
	cfg, file, err = loadConfig(args, os.Getenv, os.Getuid())
	if err != nil && !errors.Is(err, errHelp) {
		err = &usageError{err}
	}
	return cfg, file, err
}

// checkConfig prints the settings in force. It also reads every file that they
// name, but opens nothing of the agent's.
func (p program) checkConfig(args []string, stdout io.Writer) error {
	cfg, file, err := load(args)
	if err != nil {
		return err
	}
	if _, err := readFiles(cfg, slog.New(slog.DiscardHandler)); err != nil {
		return &usageError{err}
	}
	if file == "" {
		file = "no configuration file"
	}
	fmt.Fprintf(stdout, "# %s\n", file)
	encoder := toml.NewEncoder(stdout)
	encoder.Indent = ""
	return encoder.Encode(cfg)
}

// files is what a configuration refers to, read.
type files struct {
	classes map[string]manager.Class
	access  server.Access
	tls     *server.TLS
}

func readFiles(cfg Config, log *slog.Logger) (files, error) {
	var f files
	var err error
	if f.classes, err = readClasses(cfg.MachineClasses); err != nil {
		return f, each("machine_classes", err)
	}
	if f.access, err = server.NewAccess(cfg.SocketGroup); err != nil {
		return f, fmt.Errorf("socket_group: %w", err)
	}
	if cfg.TLS.Listen != "" {
		if f.tls, err = server.LoadTLS(cfg.TLS.Cert, cfg.TLS.Key, cfg.TLS.ClientCA, log); err != nil {
			return f, err
		}
	}
	return f, nil
}

// each gives every one of joined errors the same prefix.
func each(prefix string, err error) error {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return fmt.Errorf("%s: %w", prefix, err)
	}
	var errs []error
	for _, err := range joined.Unwrap() {
		errs = append(errs, fmt.Errorf("%s: %w", prefix, err))
	}
	return errors.Join(errs...)
}

// newLog writes to w as configured.
func newLog(cfg Config, w io.Writer) *slog.Logger {
	level, _ := logLevel(cfg.LogLevel) // validated
	options := &slog.HandlerOptions{Level: level}
	if cfg.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}
