package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

func (a *app) hostCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "host",
		Short:   "Show the host and its agent, drain and undrain it",
		Example: "  agentctl host info\n  agentctl host stats\n  agentctl host drain --stop",
	}
	cmd.AddCommand(a.hostInfo(), a.hostStats(), a.hostDrain(), a.hostUndrain())
	return cmd
}

func (a *app) hostInfo() *cobra.Command {
	return &cobra.Command{
		Use:     "info",
		Short:   "Show what the agent is and what its drivers can do",
		Example: "  agentctl host info\n  agentctl host info -o json | jq -r '.drivers[] | select(.available) | .name'",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			ctx, cancel := quick(cmd.Context())
			defer cancel()
			info, err := c.host.GetInfo(ctx, &agentv1.GetInfoRequest{})
			if err != nil {
				return err
			}
			if a.forPrograms() {
				return a.print(info)
			}
			return a.infoPage(info, time.Now()).write(a.stdout, a.out.bold)
		},
	}
}

func (a *app) infoPage(info *agentv1.GetInfoResponse, now time.Time) *page {
	p := &page{}
	p.add("Host", info.GetHostname())
	p.add("System", fmt.Sprintf("%s/%s, %d CPUs, %s", info.GetOs(), info.GetArch(), info.GetCpus(), size(info.GetMemoryMib()<<20)))
	p.add("Agent", info.GetAgentVersion())
	p.add("Started", moment(info.GetStartTime(), now))
	state := "takes boots"
	if info.GetDraining() {
		state = "draining: refuses boots"
	}
	if !info.GetReconciled() {
		state += ", still comparing its records with the host"
	}
	p.add("State", state)
	if n := info.GetMaxRunning(); n > 0 {
		p.add("Capacity", fmt.Sprintf("%d sandboxes, %d boots at once", n, info.GetMaxConcurrentBoots()))
	}
	for _, d := range info.GetDrivers() {
		p.each("Driver "+d.GetName(), driverLines(d, d.GetName() == info.GetDefaultDriver()))
	}
	for _, class := range info.GetMachineClasses() {
		text := resourceText(class.GetResources())
		if class.GetDriver() != "" {
			text += ", " + class.GetDriver() + " only"
		}
		p.add("Class "+class.GetName(), text)
	}
	for _, q := range info.GetQuarantined() {
		p.add("Set aside", fmt.Sprintf("%s: %s (%s)", q.GetName(), q.GetReason(), q.GetPath()))
	}
	return p
}

func driverLines(d *agentv1.DriverInfo, isDefault bool) []string {
	if !d.GetAvailable() {
		lines := []string{"unavailable: " + d.GetReason()}
		if d.GetCure() != "" {
			lines = append(lines, hintPrefix+d.GetCure())
		}
		return lines
	}
	head := "available"
	if d.GetVersion() != "" {
		head += ", version " + d.GetVersion()
	}
	if isDefault {
		head += ", the default"
	}
	lines := []string{head}
	if len(d.GetAbilities()) > 0 {
		lines = append(lines, "can: "+strings.Join(d.GetAbilities(), ", "))
	}
	var limits []string
	for _, l := range []struct {
		name string
		can  bool
	}{{"CPU", d.GetLimitsCpu()}, {"memory", d.GetLimitsMemory()}, {"processes", d.GetLimitsPids()}} {
		if l.can {
			limits = append(limits, l.name)
		}
	}
	if len(limits) == 0 {
		limits = []string{"nothing"}
	}
	lines = append(lines, "limits: "+strings.Join(limits, ", "))
	for _, warning := range d.GetWarnings() {
		lines = append(lines, "warning: "+warning)
	}
	return lines
}

func (a *app) hostStats() *cobra.Command {
	return &cobra.Command{
		Use:     "stats",
		Short:   "Show how busy the host is",
		Example: "  agentctl host stats\n  agentctl host stats -o json",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			ctx, cancel := quick(cmd.Context())
			defer cancel()
			stats, err := c.host.GetStats(ctx, &agentv1.GetStatsRequest{})
			if err != nil {
				return err
			}
			if a.forPrograms() {
				return a.print(stats)
			}
			return statsPage(stats).write(a.stdout, a.out.bold)
		},
	}
}

func statsPage(stats *agentv1.GetStatsResponse) *page {
	p := &page{}
	total, available := stats.GetMemoryTotalMib(), stats.GetMemoryAvailableMib()
	memory := size(available<<20) + " available of " + size(total<<20)
	if total > 0 {
		memory += fmt.Sprintf(" (%d%%)", 100*available/total)
	}
	p.add("Memory", memory)
	var load []string
	for _, l := range stats.GetLoadAverage() {
		load = append(load, fmt.Sprintf("%.2f", l))
	}
	p.add("Load", strings.Join(load, " "))
	var phases []string
	for _, s := range stats.GetSandboxes() {
		phases = append(phases, fmt.Sprintf("%d %s", s.GetCount(), phaseName(s.GetPhase())))
	}
	if len(phases) == 0 {
		phases = []string{"none"}
	}
	p.add("Sandboxes", strings.Join(phases, ", "))
	p.add("Boots", fmt.Sprintf("%d under way, %d waiting", stats.GetBootsRunning(), stats.GetBootsWaiting()))
	p.add("Agent", size(stats.GetAgentMemoryBytes()))
	return p
}

func (a *app) hostDrain() *cobra.Command {
	grace, stop := &graceFlag{}, false
	cmd := &cobra.Command{
		Use:   "drain",
		Short: "Refuse boots from now on",
		Long: `Refuse boots from now on, also after an agent restart, until "agentctl host
undrain". Sandboxes that run go on, or are stopped with --stop.`,
		Example: "  agentctl host drain\n  agentctl host drain --stop --grace 1m",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			wait, err := grace.value(cmd)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			shown := a.newProgress("drain")
			shown.say("waiting for the agent", false)
			answer, err := c.host.Drain(cmd.Context(), &agentv1.DrainRequest{StopSandboxes: stop, Grace: wait, RequestId: requestID()})
			shown.stop()
			if err != nil {
				return left(cmd.Context(), "drain", err)
			}
			line := "draining"
			if stop {
				line += fmt.Sprintf("; %d stopped", answer.GetStopped())
			}
			return a.confirm(answer, line)
		},
	}
	cmd.Flags().BoolVar(&stop, "stop", false, "stop the running sandboxes too, and wait until they are")
	grace.register(cmd)
	return cmd
}

func (a *app) hostUndrain() *cobra.Command {
	return &cobra.Command{
		Use:     "undrain",
		Short:   "Accept boots again",
		Long:    "Accept boots again. It starts nothing by itself.",
		Example: "  agentctl host undrain",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			answer, err := c.host.Undrain(cmd.Context(), &agentv1.UndrainRequest{RequestId: requestID()})
			if err != nil {
				return err
			}
			return a.confirm(answer, "accepting boots")
		},
	}
}
