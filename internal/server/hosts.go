package server

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"os"
	"runtime"
	"slices"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
)

type hostService struct {
	agentv1.UnimplementedHostServiceServer
	manager *manager.Manager
	version string
}

func (s *hostService) GetInfo(ctx context.Context, _ *agentv1.GetInfoRequest) (*agentv1.GetInfoResponse, error) {
	info, err := s.manager.Info(ctx)
	if err != nil {
		return nil, err
	}
	hostname, err := os.Hostname()
	if err != nil {
		hostname = "" // an answer without it beats none
	}
	w := &agentv1.GetInfoResponse{
		AgentVersion:       s.version,
		Hostname:           validUTF8(hostname),
		Os:                 runtime.GOOS,
		Arch:               runtime.GOARCH,
		Cpus:               uint32(runtime.NumCPU()),
		MemoryMib:          info.MemoryTotalMiB,
		DefaultDriver:      info.DefaultDriver,
		MachineClasses:     classesToWire(info.Classes),
		StartTime:          timeToWire(info.StartedAt),
		Draining:           info.Draining,
		MaxConcurrentBoots: uint32(info.MaxConcurrentBoots),
		MaxRunning:         uint32(info.MaxRunning),
		Reconciled:         info.Reconciled,
	}
	for _, driver := range info.Drivers {
		w.Drivers = append(w.Drivers, driverToWire(driver))
	}
	slices.SortFunc(w.Drivers, func(a, b *agentv1.DriverInfo) int { return cmp.Compare(a.GetName(), b.GetName()) })
	for _, record := range info.Quarantined {
		w.Quarantined = append(w.Quarantined, &agentv1.QuarantinedRecord{
			Name: validUTF8(record.Name), Path: validUTF8(record.Path), Reason: validUTF8(record.Reason),
		})
	}
	return w, nil
}

func driverToWire(driver manager.DriverInfo) *agentv1.DriverInfo {
	w := &agentv1.DriverInfo{
		Name:         driver.Name,
		Available:    driver.Err == nil,
		Version:      validUTF8(driver.Report.Version),
		Abilities:    driver.Abilities,
		LimitsCpu:    driver.Report.Limits.CPU,
		LimitsMemory: driver.Report.Limits.Memory,
		LimitsPids:   driver.Report.Limits.Pids,
	}
	for _, warning := range driver.Report.Warnings {
		w.Warnings = append(w.Warnings, validUTF8(warning))
	}
	if driver.Err != nil {
		w.Reason = validUTF8(driver.Err.Error())
		if broken, ok := errors.AsType[*sandbox.UnavailableError](driver.Err); ok {
			w.Cure = validUTF8(broken.Cure)
		}
	}
	return w
}

func (s *hostService) GetStats(context.Context, *agentv1.GetStatsRequest) (*agentv1.GetStatsResponse, error) {
	stats, err := s.manager.Stats()
	if err != nil {
		return nil, err
	}
	w := &agentv1.GetStatsResponse{
		MemoryTotalMib:     stats.MemoryTotalMiB,
		MemoryAvailableMib: stats.MemoryAvailableMiB,
		LoadAverage:        loadAverage(),
		BootsRunning:       uint32(stats.BootsRunning),
		BootsWaiting:       uint32(stats.BootsWaiting),
		AgentMemoryBytes:   residentMemory(),
	}
	for _, phase := range slices.Sorted(maps.Keys(stats.Phases)) {
		if count := stats.Phases[phase]; count > 0 {
			w.Sandboxes = append(w.Sandboxes, &agentv1.GetStatsResponse_PhaseCount{
				Phase: phaseToWire(phase), Count: uint32(count),
			})
		}
	}
	return w, nil
}

func (s *hostService) Drain(ctx context.Context, req *agentv1.DrainRequest) (*agentv1.DrainResponse, error) {
	grace, err := graceFromWire(req.GetGrace())
	if err != nil {
		return nil, err
	}
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, _ manager.Request) (*agentv1.DrainResponse, error) {
			stopped, err := s.manager.Drain(ctx, req.GetStopSandboxes(), grace)
			if err != nil {
				return nil, err
			}
			return &agentv1.DrainResponse{Stopped: uint32(stopped)}, nil
		})
}

func (s *hostService) Undrain(ctx context.Context, req *agentv1.UndrainRequest) (*agentv1.UndrainResponse, error) {
	return once(ctx, s.manager, req.GetRequestId(), req,
		func(ctx context.Context, _ manager.Request) (*agentv1.UndrainResponse, error) {
			if err := s.manager.Undrain(ctx); err != nil {
				return nil, err
			}
			return &agentv1.UndrainResponse{}, nil
		})
}
