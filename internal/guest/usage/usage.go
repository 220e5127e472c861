//go:build linux

package usage

import (
	"context"
	"fmt"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/wire"
)

const minInterval = 100 * time.Millisecond

// Service answers WatchStats.
type Service struct {
	proc, cgroup string // where they are mounted
}

// New returns a Service that looks at the sandbox it runs in.
func New() *Service { return &Service{proc: "/proc", cgroup: "/sys/fs/cgroup"} }

// WatchStats sends what is used, at once and at each interval, until ctx ends.
func (s *Service) WatchStats(ctx context.Context, conn *wire.Conn, call *guestv1.WatchStats) error {
	sampler, err := s.open()
	if err != nil {
		return err
	}
	defer sampler.close()
	if err := sampler.sample(); err != nil {
		return err
	}
	if err := conn.Send(&guestv1.Response{Protocol: wire.Protocol}); err != nil {
		return err
	}
	defer conn.Bind(ctx)()
	ticks := time.NewTicker(max(time.Duration(call.GetIntervalMillis())*time.Millisecond, minInterval))
	defer ticks.Stop()
	for {
		if err := conn.Send(&sampler.stats); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticks.C:
		}
		if err := sampler.sample(); err != nil {
			return fmt.Errorf("usage: %w", err)
		}
	}
}
