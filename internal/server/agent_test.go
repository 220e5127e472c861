package server_test

import (
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/choiros/agent/internal/forward"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/server"
	"github.com/choiros/agent/internal/store"
)

var agents atomic.Uint32

// testAgent is store, manager and server of one state directory, on a real unix
// socket, in this process.
type testAgent struct {
	Manager *manager.Manager
	Server  *server.Server
	Socket  string
	Store   *store.Store
}

// agentOptions are what a test wants different.
type agentOptions struct {
	// Dir is the state directory; empty: a new one.
	Dir string
	// Drivers makes the drivers; owner is the store's.
	Drivers func(owner string) map[string]sandbox.Driver
	// Manager, Server: the rest of their configuration.
	Manager manager.Config
	Server  server.Config
	// Log; nil: none.
	Log io.Writer
}

// startAgent runs an agent until the test ends.
func startAgent(t testing.TB, opts agentOptions) *testAgent {
	t.Helper()
	dir, err := os.MkdirTemp("", "st") // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if opts.Dir == "" {
		opts.Dir = filepath.Join(dir, "state")
	}
	log := slog.New(slog.DiscardHandler)
	if opts.Log != nil {
		log = slog.New(slog.NewTextHandler(opts.Log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	a := &testAgent{Socket: filepath.Join(dir, "s", "agent.sock")}
	if a.Store, err = store.Open(opts.Dir); err != nil {
		t.Fatal(err)
	}
	config := opts.Manager
	// Ports of its own, for tests are parallel.
	first := uint16(16000 + 10*agents.Add(1))
	config.Ports = forward.Config{First: first, Last: first + 9}
	config.Store, config.Log = a.Store, log
	config.Drivers = opts.Drivers(a.Store.Owner())
	if config.MinFreeMemoryMiB == 0 {
		config.MinFreeMemoryMiB = 1
	}
	if a.Manager, err = manager.Open(config); err != nil {
		t.Fatal(err)
	}
	if opts.Server.Access == (server.Access{}) {
		if opts.Server.Access, err = server.NewAccess(""); err != nil {
			t.Fatal(err)
		}
	}
	listener, err := server.ListenUnix(t.Context(), a.Socket, opts.Server.Access)
	if err != nil {
		t.Fatal(err)
	}
	opts.Server.Manager, opts.Server.Log = a.Manager, log
	a.Server = server.New(opts.Server)
	a.run(t, listener)
	return a
}

func (a *testAgent) run(t testing.TB, listener net.Listener) {
	ctx, cancel := context.WithCancel(context.Background())
	served, managed := make(chan error, 1), make(chan error, 1)
	go func() { served <- a.Server.Serve(listener) }()
	go func() { managed <- a.Manager.Run(ctx) }()
	t.Cleanup(func() {
		patience, give := context.WithTimeout(context.Background(), 10*time.Second)
		defer give()
		a.Server.Shutdown(patience)
		cancel()
		for _, ended := range []chan error{served, managed} {
			if err := <-ended; err != nil {
				t.Errorf("agent: %v", err)
			}
		}
		if err := a.Store.Close(); err != nil {
			t.Errorf("agent: %v", err)
		}
	})
}

// Dial connects a client, until the test ends.
func (a *testAgent) Dial(t testing.TB) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+a.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}
