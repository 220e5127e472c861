package server

import (
	"context"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/stats"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/manager"
)

const (
	// maxRequest is the longest message taken: a chunk of an archive and what
	// is around it. No spec that passes validation is longer.
	maxRequest = 2 << 20
	// maxStreams is per connection; further requests wait at the client. A
	// router may have one for each person who waits for a boot.
	maxStreams = 4096
	maxHeaders = 64 << 10
)

// Config is what a Server is made of.
type Config struct {
	Manager *manager.Manager
	Log     *slog.Logger
	// Version is the agent's, as told to clients.
	Version string
	// Access says who may use a unix socket.
	Access Access
	// TLS admits callers over TCP; nil: none are.
	TLS *TLS
	// MaxArchiveBytes bounds LoadImage; zero: 16 GiB.
	MaxArchiveBytes uint64
	// Stats are told of every request: metrics, traces.
	Stats []stats.Handler
}

// Server serves the agent's API on any number of listeners.
type Server struct {
	log    *slog.Logger
	grpc   *grpc.Server
	health *health.Server

	serving  context.Context // ends when Shutdown begins
	stop     context.CancelFunc
	life     context.Context // ends when Shutdown waits no longer
	end      context.CancelFunc
	work     sync.WaitGroup
	services []string
}

// New makes a server. Its health is NOT_SERVING until Serve.
func New(cfg Config) *Server {
	s := &Server{log: cfg.Log, health: health.NewServer()}
	s.serving, s.stop = context.WithCancel(context.Background())
	s.life, s.end = context.WithCancel(context.Background())
	options := []grpc.ServerOption{
		grpc.Creds(&doors{access: cfg.Access, tls: cfg.TLS, log: cfg.Log}),
		grpc.InTapHandle(admit),
		grpc.ChainUnaryInterceptor(s.unary),
		grpc.ChainStreamInterceptor(s.stream),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
			MinTime: 10 * time.Second, PermitWithoutStream: true,
		}),
		// A client that vanished without a word is noticed within 80 s.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}),
	}
	for _, handler := range cfg.Stats {
		options = append(options, grpc.StatsHandler(handler))
	}
	s.grpc = grpc.NewServer(options...)
	agentv1.RegisterSandboxServiceServer(s.grpc, &sandboxService{manager: cfg.Manager})
	agentv1.RegisterImageServiceServer(s.grpc, &imageService{
		manager: cfg.Manager,
		limits:  loadLimits{bytes: cfg.MaxArchiveBytes}.orDefault(),
		life:    s.life,
		work:    &s.work,
	})
	agentv1.RegisterHostServiceServer(s.grpc, &hostService{manager: cfg.Manager, version: cfg.Version})
	agentv1.RegisterExecServiceServer(s.grpc, &execService{manager: cfg.Manager})
	agentv1.RegisterFileServiceServer(s.grpc, &fileService{manager: cfg.Manager})
	agentv1.RegisterSecretServiceServer(s.grpc, &secretService{manager: cfg.Manager})
	agentv1.RegisterPortServiceServer(s.grpc, &portService{manager: cfg.Manager})
	agentv1.RegisterStatsServiceServer(s.grpc, &statsService{manager: cfg.Manager})
	s.services = append(slices.Sorted(maps.Keys(s.grpc.GetServiceInfo())), "") // all of ours so far
	healthpb.RegisterHealthServer(s.grpc, s.health)
	reflection.Register(s.grpc)
	s.tell(healthpb.HealthCheckResponse_NOT_SERVING)
	return s
}

func (s *Server) tell(status healthpb.HealthCheckResponse_ServingStatus) {
	for _, service := range s.services {
		s.health.SetServingStatus(service, status)
	}
}

// Serve answers on a listener until Shutdown, which closes it. It returns nil
// then, and an error if the listener fails before.
func (s *Server) Serve(listener net.Listener) error {
	if s.serving.Err() == nil {
		s.tell(healthpb.HealthCheckResponse_SERVING)
	}
	return s.grpc.Serve(listener)
}

// Shutdown takes no more connections, ends the streams that would go on for
// ever, with UNAVAILABLE, and waits for requests until ctx ends; those still
// there are then cut off. Sandboxes run on.
func (s *Server) Shutdown(ctx context.Context) {
	s.health.Shutdown()
	s.stop()
	done := make(chan struct{})
	go func() {
		s.grpc.GracefulStop()
		s.work.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		s.end()
		s.grpc.Stop()
		<-done
	}
	s.end()
}
