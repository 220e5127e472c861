package server

import (
	"math"
	"time"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
)

// Bounds of the pause between two rounds of samples.
const (
	defaultStatsInterval = time.Second
	minStatsInterval     = 100 * time.Millisecond
	maxStatsInterval     = time.Minute
)

type statsService struct {
	agentv1.UnimplementedStatsServiceServer
	manager *manager.Manager
}

func (s *statsService) StreamStats(req *agentv1.StreamStatsRequest, stream agentv1.StatsService_StreamStatsServer) error {
	if req.GetName() != "" {
		if err := sandbox.ValidateName("name", req.GetName()); err != nil {
			return err
		}
		if req.GetLabelSelector() != "" {
			return sandbox.Invalidf("label_selector", "is given together with name; give one")
		}
	}
	selector, err := manager.ParseSelector(req.GetLabelSelector())
	if err != nil {
		return err
	}
	interval, err := durationFromWire("interval", req.GetInterval())
	if err != nil {
		return err
	}
	if interval == 0 {
		interval = defaultStatsInterval
	}
	if interval < minStatsInterval || interval > maxStatsInterval {
		return sandbox.Invalidf("interval", "%s is not from %s to %s", interval, minStatsInterval, maxStatsInterval)
	}
	return s.manager.WatchUsage(stream.Context(), req.GetName(), selector, interval, req.GetOnce(), func(round []manager.Usage) error {
		w := &agentv1.StreamStatsResponse{}
		for _, usage := range round {
			w.Samples = append(w.Samples, usageToWire(usage))
		}
		return stream.Send(w)
	})
}

func usageToWire(u manager.Usage) *agentv1.StatsSample {
	g := u.Sample
	w := &agentv1.StatsSample{
		Name: u.Name, Generation: u.Generation, Time: g.GetTime(), CpuUsec: g.GetCpuUsec(), Cpus: g.GetCpus(),
		MemoryBytes: g.GetMemoryBytes(), MemoryLimitBytes: g.GetMemoryLimitBytes(), Processes: g.GetProcesses(),
		NetworkReceiveBytes: g.GetNetworkReceiveBytes(), NetworkTransmitBytes: g.GetNetworkTransmitBytes(),
		DiskReadBytes: g.GetDiskReadBytes(), DiskWriteBytes: g.GetDiskWriteBytes(),
		RootUsedBytes: g.GetRootUsedBytes(), RootSizeBytes: g.GetRootSizeBytes(), GuestdMemoryBytes: g.GetGuestdMemoryBytes(),
	}
	if u.CPUMillis >= 0 {
		millis := uint32(min(u.CPUMillis, math.MaxUint32)) //nolint:gosec // Bounded.
		w.CpuMillis = &millis
	}
	for _, p := range g.GetTop() {
		w.Top = append(w.Top, &agentv1.StatsProcess{
			Pid: p.GetPid(), Command: p.GetCommand(), CpuUsec: p.GetCpuUsec(), MemoryBytes: p.GetMemoryBytes(),
		})
	}
	return w
}
