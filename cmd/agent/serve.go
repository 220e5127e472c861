package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc/stats"

	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/secrets"
	"github.com/choiros/agent/internal/server"
	"github.com/choiros/agent/internal/store"
	"github.com/choiros/agent/internal/telemetry"
	"github.com/choiros/agent/internal/version"
)

// restTimeout is how long what is not a request may take to end.
const restTimeout = 5 * time.Second

// serve runs the agent until a signal, or until something it cannot do
// without fails. Sandboxes run on.
func (p program) serve(args []string, stderr io.Writer) (err error) {
	cfg, file, err := load(args)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(signals)
	// Without this a log whose reader has gone would end the agent, see
	// os/signal. Ignoring the signal would be inherited by children.
	broken := make(chan os.Signal, 1)
	signal.Notify(broken, syscall.SIGPIPE)
	defer signal.Stop(broken)
	if err := noCoreDumps(); err != nil {
		return err
	}
	log := newLog(cfg, stderr)
	log.Info("agent starts", "version", version.String(), "config", file, "state_dir", cfg.StateDir, "pid", os.Getpid())

	a, err := p.open(cfg, log)
	if err != nil {
		return err
	}
	failed := a.start()
	log.Info("agent serves", "socket", cfg.Socket, "tls", cfg.TLS.Listen, "metrics", cfg.Metrics.Listen)
	if err := notify("READY=1"); err != nil {
		log.Warn("service manager not told", "err", err)
	}
	select {
	case err = <-failed:
		log.Error("agent fails", "err", err)
	case sig := <-signals:
		log.Info("agent stops", "signal", sig.String())
	}
	if err := notify("STOPPING=1"); err != nil {
		log.Warn("service manager not told", "err", err)
	}
	stopped := make(chan error, 1)
	go func() { stopped <- a.stop(time.Duration(cfg.StopTimeout)) }()
	select {
	case stopping := <-stopped:
		err = errors.Join(err, stopping, a.close())
	case sig := <-signals:
		return fmt.Errorf("told to stop again (%s): stopped at once", sig)
	}
	log.Info("agent stopped")
	return err
}

// agent is one that runs.
type agent struct {
	log       *slog.Logger
	store     *store.Store
	drivers   map[string]sandbox.Driver
	manager   *manager.Manager
	server    *server.Server
	listeners []net.Listener
	metrics   *http.Server
	metricsOn net.Listener
	traces    *telemetry.Traces

	endManager context.CancelFunc
	tasks      sync.WaitGroup
	managed    chan struct{} // closed when the manager has ended
}

// open opens all that the agent needs and listens; it serves nothing yet and
// does nothing to any sandbox. On an error all is closed again.
func (p program) open(cfg Config, log *slog.Logger) (_ *agent, err error) {
	a := &agent{log: log, managed: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.close())
		}
	}()
	f, err := readFiles(cfg, log)
	if err != nil {
		return nil, &usageError{err}
	}
	if a.store, err = store.Open(cfg.StateDir); err != nil {
		return nil, err
	}
	a.drivers, err = p.drivers(cfg, a.store.Owner(), log)
	if err != nil {
		return nil, err
	}
	if err := checkDrivers(cfg, a.drivers, f.classes); err != nil {
		return nil, &usageError{err}
	}
	resolver, err := secrets.New(secretsConfig(cfg.Secrets))
	if err != nil {
		return nil, &usageError{err}
	}
	if a.manager, err = manager.Open(manager.Config{
		Store: a.store, Drivers: a.drivers, DefaultDriver: cfg.DefaultDriver,
		Classes: f.classes, MountRoots: cfg.MountRoots,
		MaxConcurrentBoots: cfg.MaxConcurrentBoots, MaxRunning: cfg.MaxRunning,
		MinFreeMemoryMiB: max(cfg.MinFreeMemoryMiB, 1), // zero means the default there
		IdleScan:         time.Duration(cfg.IdleScan),
		Secrets:          resolver, Ports: portsConfig(cfg.Ports, log),
		Log: log, OnStep: p.onStep,
	}); err != nil {
		return nil, err
	}
	requests, err := a.observe(cfg)
	if err != nil {
		return nil, err
	}
	if err := a.listen(cfg, f.access); err != nil {
		return nil, err
	}
	a.server = server.New(server.Config{
		Manager: a.manager, Log: log, Version: version.String(), Access: f.access, TLS: f.tls,
		MaxArchiveBytes: cfg.MaxArchiveMiB << 20, Stats: requests,
	})
	return a, nil
}

// checkDrivers refuses names of drivers that this agent does not have.
func checkDrivers(cfg Config, drivers map[string]sandbox.Driver, classes map[string]manager.Class) error {
	var errs []error
	check := func(key, name string) {
		if _, ok := drivers[name]; !ok {
			errs = append(errs, fmt.Errorf("%s: %q is none of this agent's drivers: %s", key, name, names(drivers)))
		}
	}
	check("default_driver", cfg.DefaultDriver)
	for name, class := range classes {
		if class.Driver != "" {
			check("machine_classes: class."+name+".driver", class.Driver)
		}
	}
	return errors.Join(errs...)
}

// observe sets metrics and traces up, if they are wanted.
func (a *agent) observe(cfg Config) ([]stats.Handler, error) {
	var handlers []stats.Handler
	if cfg.Metrics.Listen != "" {
		metrics := telemetry.NewMetrics(version.String(), a.sample)
		handlers = append(handlers, metrics.Requests())
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", metrics.Handler())
		a.metrics = &http.Server{
			Handler: mux, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
			MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(a.log.Handler(), slog.LevelDebug),
		}
	}
	if cfg.Traces.OTLPEndpoint != "" {
		var err error
		if a.traces, err = telemetry.NewTraces(context.Background(), cfg.Traces.OTLPEndpoint, version.String()); err != nil {
			return nil, err
		}
		handlers = append(handlers, a.traces.Requests())
	}
	return handlers, nil
}

func (a *agent) sample() (telemetry.Sample, error) {
	stats, err := a.manager.Stats()
	if err != nil {
		return telemetry.Sample{}, err
	}
	sample := telemetry.Sample{
		Sandboxes:    map[string]int{},
		BootsRunning: stats.BootsRunning, BootsWaiting: stats.BootsWaiting,
		MemoryTotalMiB: stats.MemoryTotalMiB, MemoryAvailableMiB: stats.MemoryAvailableMiB,
	}
	for phase, count := range stats.Phases {
		sample.Sandboxes[string(phase)] = count
	}
	return sample, nil
}

func (a *agent) listen(cfg Config, access server.Access) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	socket, err := server.ListenUnix(ctx, cfg.Socket, access)
	if err != nil {
		return err
	}
	a.listeners = append(a.listeners, socket)
	if cfg.TLS.Listen != "" {
		listener, err := server.ListenTCP(ctx, cfg.TLS.Listen)
		if err != nil {
			return fmt.Errorf("tls.listen: %w", err)
		}
		a.listeners = append(a.listeners, listener)
	}
	if cfg.Metrics.Listen != "" {
		if a.metricsOn, err = server.ListenTCP(ctx, cfg.Metrics.Listen); err != nil {
			return fmt.Errorf("metrics.listen: %w", err)
		}
	}
	return nil
}

// start serves first, so that callers wait instead of being turned away, and
// then has the manager compare records and host. What is returned tells of the
// first task that failed.
func (a *agent) start() <-chan error {
	failed := make(chan error, len(a.listeners)+2)
	run := func(what string, task func() error) {
		a.tasks.Go(func() {
			if err := task(); err != nil {
				failed <- fmt.Errorf("%s: %w", what, err)
			}
		})
	}
	for _, listener := range a.listeners {
		run("serve "+listener.Addr().String(), func() error { return a.server.Serve(listener) })
	}
	if a.metrics != nil {
		run("serve metrics", func() error {
			if err := a.metrics.Serve(a.metricsOn); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		})
	}
	ctx, cancel := context.WithCancel(context.Background())
	a.endManager = cancel
	go func() {
		defer close(a.managed)
		if err := a.manager.Run(ctx); err != nil {
			failed <- fmt.Errorf("manager: %w", err)
		}
	}()
	return failed
}

// stop ends what start began: the requests within timeout, the rest soon.
func (a *agent) stop(timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	a.server.Shutdown(ctx)
	cancel()
	a.endManager()
	ctx, cancel = context.WithTimeout(context.Background(), restTimeout)
	defer cancel()
	var errs []error
	if a.metrics != nil {
		errs = append(errs, a.metrics.Shutdown(ctx))
	}
	if a.traces != nil {
		if err := a.traces.Shutdown(ctx); err != nil {
			a.log.Warn("traces not sent", "err", err)
		}
	}
	a.tasks.Wait()
	select {
	case <-a.managed:
	case <-ctx.Done():
		// Its intents are written; the next agent goes on with them.
		errs = append(errs, errors.New("a driver did not let go of its work in time"))
	}
	return errors.Join(errs...)
}

// close closes what open opened and nobody else has closed.
func (a *agent) close() error {
	var errs []error
	for _, listener := range append(a.listeners, a.metricsOn) {
		if listener == nil {
			continue
		}
		if err := listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	if a.manager != nil {
		errs = append(errs, a.manager.Close())
	}
	errs = append(errs, a.closeDrivers())
	if a.store != nil {
		errs = append(errs, a.store.Close())
	}
	return errors.Join(errs...)
}

// closeDrivers closes the drivers that can be closed, and waits for them as
// long as for anything else that is not a request.
func (a *agent) closeDrivers() error {
	closed := make(chan error, 1)
	go func() {
		var errs []error
		for _, driver := range a.drivers {
			if c, ok := driver.(io.Closer); ok {
				errs = append(errs, c.Close())
			}
		}
		closed <- errors.Join(errs...)
	}()
	select {
	case err := <-closed:
		return err
	case <-time.After(restTimeout):
		return errors.New("a driver did not close in time")
	}
}
