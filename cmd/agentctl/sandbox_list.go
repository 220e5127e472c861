package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

func (a *app) sandboxList() *cobra.Command {
	selector, labels := "", false
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the sandboxes of this host",
		Example: `  agentctl sandbox list
  agentctl sandbox list -l tier=web,!old
  agentctl sandbox list -o json
  agentctl sandbox stop $(agentctl sandbox list -q -l tier=web)`,
		Args: exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			all, err := c.list(cmd.Context(), selector)
			if err != nil {
				return err
			}
			return a.showList(all, labels)
		},
	}
	cmd.Flags().StringVarP(&selector, "selector", "l", "", "only those with these labels: `key=value,key!=value,key,!key`")
	cmd.Flags().BoolVar(&labels, "labels", false, "show their labels too")
	return cmd
}

func (a *app) showList(all []*agentv1.Sandbox, labels bool) error {
	if a.forPrograms() {
		return a.print(messages(all))
	}
	if a.quiet {
		for _, sb := range all {
			fmt.Fprintln(a.stdout, sb.GetName())
		}
		return nil
	}
	if len(all) == 0 {
		fmt.Fprintln(a.stderr, "no sandboxes")
		return nil
	}
	return a.listTable(all, labels, time.Now())
}

func (a *app) listTable(all []*agentv1.Sandbox, labels bool, now time.Time) error {
	t := table{heads: []string{"NAME", "PHASE", "IMAGE", "UP", "AGE", "GENERATION", "PORTS"}}
	if labels {
		t.heads = append(t.heads, "LABELS")
	}
	for _, sb := range all {
		row := []cell{
			plain(sb.GetName()), a.phaseCell(sb, now), plain(sourceName(sb.GetSpec())), plain(uptime(sb, now)),
			plain(age(now.Sub(sb.GetCreateTime().AsTime()))), plain(fmt.Sprint(sb.GetStatus().GetGeneration())), plain(portsText(sb.GetStatus())),
		}
		if labels {
			row = append(row, plain(strings.Join(pairs(sb.GetLabels()), ",")))
		}
		t.add(row...)
	}
	return t.write(a.stdout, a.out.bold)
}

// portsText is where a sandbox's ports are reachable, shortly: 12000->8080 for
// one of 127.0.0.1.
func portsText(status *agentv1.SandboxStatus) string {
	var list []string
	for _, e := range status.GetEndpoints() {
		text := fmt.Sprintf("%s->%d", strings.TrimPrefix(e.GetAddress(), "127.0.0.1:"), e.GetGuestPort())
		if e.GetProtocol() == agentv1.Protocol_PROTOCOL_UDP {
			text += "/udp"
		}
		list = append(list, text)
	}
	return strings.Join(list, ",")
}

// detectedText is a port on which something listens inside: 3000/tcp (node).
func detectedText(d *agentv1.DetectedPort) string {
	text := fmt.Sprintf("%d/%s", d.GetGuestPort(), protocolName(d.GetProtocol()))
	if d.GetProgram() != "" {
		text += " (" + d.GetProgram() + ")"
	}
	return text
}

// phaseName is a phase as people read it: ready, starting, …
func phaseName(p agentv1.Phase) string {
	if p == agentv1.Phase_PHASE_UNSPECIFIED {
		return "unknown"
	}
	return strings.ToLower(strings.TrimPrefix(p.String(), "PHASE_"))
}

// phaseText is a sandbox's phase with what matters most about it.
func phaseText(sb *agentv1.Sandbox, now time.Time) string {
	status := sb.GetStatus()
	text := phaseName(status.GetPhase())
	switch status.GetPhase() {
	case agentv1.Phase_PHASE_STOPPED, agentv1.Phase_PHASE_FAILED:
		switch exit := status.GetExit(); {
		case status.GetReason() == "IDLE":
			text += " (idle)"
		case exit.GetOomKilled():
			text += " (out of memory)"
		case exit.GetSignal() != "":
			text += " (" + exit.GetSignal() + ")"
		case exit != nil && exit.GetCode() != 0:
			text += fmt.Sprintf(" (exit %d)", exit.GetCode())
		}
	case agentv1.Phase_PHASE_BACKOFF:
		if next := status.GetNextRestartTime(); next != nil {
			text += " (restart in " + age(next.AsTime().Sub(now)) + ")"
		}
	}
	return text
}

func (a *app) phaseCell(sb *agentv1.Sandbox, now time.Time) cell {
	return cell{phaseText(sb, now), phasePaint(a.out, sb.GetStatus().GetPhase())}
}

func phasePaint(t terminal, p agentv1.Phase) func(string) string {
	switch p {
	case agentv1.Phase_PHASE_READY:
		return t.green
	case agentv1.Phase_PHASE_FAILED, agentv1.Phase_PHASE_BACKOFF:
		return t.red
	case agentv1.Phase_PHASE_STOPPED, agentv1.Phase_PHASE_HIBERNATED, agentv1.Phase_PHASE_PAUSED:
		return t.dim
	}
	return t.yellow
}

// uptime is how long a sandbox has been running, or empty.
func uptime(sb *agentv1.Sandbox, now time.Time) string {
	status := sb.GetStatus()
	switch status.GetPhase() {
	case agentv1.Phase_PHASE_READY, agentv1.Phase_PHASE_STARTING, agentv1.Phase_PHASE_STOPPING, agentv1.Phase_PHASE_PAUSED:
		if started := status.GetStartTime(); started != nil {
			return age(now.Sub(started.AsTime()))
		}
	}
	return ""
}

// sourceName is what a sandbox boots, shortened as people say it.
func sourceName(spec *agentv1.SandboxSpec) string {
	if machine := spec.GetMachine(); machine != "" {
		return "machine " + machine
	}
	name := strings.TrimPrefix(spec.GetImage(), "docker.io/library/")
	name = strings.TrimPrefix(name, "docker.io/")
	if repo, digest, found := strings.Cut(name, "@sha256:"); found && len(digest) > 12 {
		return repo + "@" + digest[:12]
	}
	if id, found := strings.CutPrefix(name, "sha256:"); found && len(id) > 12 {
		return id[:12]
	}
	return name
}

// pairs are a map's key=value pairs, sorted.
func pairs(m map[string]string) []string {
	list := make([]string, 0, len(m))
	for _, key := range slices.Sorted(maps.Keys(m)) {
		list = append(list, key+"="+m[key])
	}
	return list
}

// shortID is as much of an image's id as people compare.
func shortID(id string) string {
	return strings.TrimPrefix(id, "sha256:")[:min(len(strings.TrimPrefix(id, "sha256:")), 12)]
}
