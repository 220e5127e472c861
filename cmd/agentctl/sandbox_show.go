package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

func (a *app) sandboxShow() *cobra.Command {
	return &cobra.Command{
		Use:               "show NAME",
		Short:             "Show all that is known of a sandbox",
		Example:           "  agentctl sandbox show web\n  agentctl sandbox show web -o yaml",
		Args:              exactly("NAME"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			sb, err := c.sandbox(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if a.forPrograms() {
				return a.print(sb)
			}
			return sandboxPage(sb, time.Now()).write(a.stdout, a.out.bold)
		},
	}
}

func sandboxPage(sb *agentv1.Sandbox, now time.Time) *page {
	p := &page{}
	p.add("Name", sb.GetName())
	statusLines(p, sb, now)
	specLines(p, sb.GetSpec())
	p.each("Labels", pairs(sb.GetLabels()))
	p.add("Created", moment(sb.GetCreateTime(), now))
	p.add("Changed", moment(sb.GetUpdateTime(), now))
	p.add("UID", sb.GetUid())
	return p
}

func statusLines(p *page, sb *agentv1.Sandbox, now time.Time) {
	status := sb.GetStatus()
	phase := phaseText(sb, now)
	if message := status.GetMessage(); message != "" {
		phase += ": " + message
	}
	p.add("Phase", phase)
	desired := strings.ToLower(strings.TrimPrefix(sb.GetDesiredState().String(), "DESIRED_STATE_"))
	if sb.GetDesiredState() != agentv1.DesiredState_DESIRED_STATE_UNSPECIFIED {
		p.add("Wanted", desired)
	}
	p.add("Generation", fmt.Sprint(status.GetGeneration()))
	p.add("Started", moment(status.GetStartTime(), now))
	if ready, started := status.GetReadyTime(), status.GetStartTime(); ready != nil && started != nil {
		p.add("Ready", "after "+duration(max(0, ready.AsTime().Sub(started.AsTime()))))
	}
	p.add("Last used", moment(status.GetLastActivityTime(), now))
	if n := status.GetRestartCount(); n > 0 {
		p.add("Restarts", fmt.Sprint(n))
	}
	if exit := status.GetExit(); exit != nil {
		text := fmt.Sprintf("status %d", exit.GetCode())
		if code := exit.GetCode(); exit.GetSignal() != "" {
			text = exit.GetSignal()
		} else if code > exitSignal {
			text = fmt.Sprintf("signal %d", code-exitSignal)
		}
		if exit.GetOomKilled() {
			text += ", out of memory"
		}
		if at := moment(exit.GetTime(), now); at != "" {
			text += ", " + at
		}
		p.add("Last exit", text)
	}
	var endpoints, detected []string
	for _, e := range status.GetEndpoints() {
		endpoints = append(endpoints, endpointText(e))
	}
	p.each("Reachable", endpoints)
	for _, d := range status.GetDetectedPorts() {
		text := detectedText(d) + ", not forwarded"
		if d.GetRefusal() != "" {
			text += ": " + d.GetRefusal()
		}
		detected = append(detected, text)
	}
	p.each("Listens", detected)
	var exposed []string
	for _, x := range status.GetExposures() {
		exposed = append(exposed, x.GetTarget()+": "+exposureText(x))
	}
	p.each("Exposes", exposed)
	p.add("guestd", status.GetGuestdVersion())
	p.add("Resources", resourceText(status.GetResources()))
}

func specLines(p *page, spec *agentv1.SandboxSpec) {
	p.add("Image", spec.GetImage())
	p.add("Machine", spec.GetMachine())
	p.add("Class", spec.GetMachineClass())
	p.add("Driver", spec.GetDriver())
	p.add("Entrypoint", quoteWords(spec.GetEntrypoint()))
	p.add("Command", quoteWords(spec.GetCommand()))
	p.add("User", spec.GetUser())
	p.add("Work dir", spec.GetWorkingDir())
	p.each("Env", pairs(spec.GetEnv()))
	for _, m := range spec.GetMounts() {
		key, mode := "Workspace", "read-only"
		switch m.GetKind() {
		case agentv1.Mount_KIND_DATA:
			key, mode = "Data", "read-write"
		case agentv1.Mount_KIND_DISK:
			key, mode = "Disk", size(m.GetSizeMib()<<20)
		}
		if m.GetReadWrite() {
			mode = "read-write"
		}
		p.add(key, fmt.Sprintf("%s at %s (%s)", m.GetSource(), m.GetTarget(), mode))
	}
	var ports, secrets []string
	for _, port := range spec.GetPorts() {
		ports = append(ports, portText(port))
	}
	for _, s := range spec.GetSecrets() {
		secrets = append(secrets, secretText(s))
	}
	p.each("Ports", ports)
	p.each("Egress", egressWords(spec.GetEgress()))
	p.each("Secrets", secrets)
	if r := spec.GetSecretRotation(); r.GetAction() != agentv1.SecretRotation_ACTION_UNSPECIFIED {
		text := lowerName(r.GetAction().String(), "ACTION_")
		if r.GetAction() == agentv1.SecretRotation_ACTION_SIGNAL {
			text += " " + orElse(r.GetSignal(), "HUP")
		}
		p.add("On change", text)
	}
	if spec.GetKeyless() {
		p.add("Keyless", "refuses providers' keys")
	}
	if f := spec.GetAutoForward(); f.GetMode() != agentv1.AutoForward_MODE_UNSPECIFIED || len(f.GetDenyPorts()) > 0 {
		text := orElse(lowerName(f.GetMode().String(), "MODE_"), "offer")
		if denied := f.GetDenyPorts(); len(denied) > 0 {
			text += ", never " + strings.Trim(fmt.Sprint(denied), "[]")
		}
		p.add("Ports found", text)
	}
	p.add("Ready when", readinessText(spec.GetReadiness()))
	if d := spec.GetIdle().GetTimeout().AsDuration(); d > 0 {
		action := "stop"
		if spec.GetIdle().GetAction() == agentv1.IdlePolicy_ACTION_HIBERNATE {
			action = "hibernate"
		}
		p.add("When idle", fmt.Sprintf("%s after %s", action, duration(d)))
	}
	p.add("Restart", restartText(spec.GetRestart()))
	if options := spec.GetDriverOptions(); options != nil {
		if text, err := json.Marshal(options.AsMap()); err == nil {
			p.add("Options", string(text))
		}
	}
}

// secretText is a reference to a secret: never its value.
func secretText(s *agentv1.SecretRef) string {
	text := s.GetName() + " from " + s.GetSource()
	if s.GetName() == sandbox.AllNames {
		text = "all of " + s.GetSource()
	}
	if s.GetFile() {
		text += ", as a file"
	}
	if s.GetOptional() {
		text += ", optional"
	}
	return text
}

// moment is a time as people read it, where now is: 3m ago (2026-01-02
// 15:04:05). Of no time it is empty.
func moment(t *timestamppb.Timestamp, now time.Time) string {
	if t == nil {
		return ""
	}
	at := t.AsTime()
	return fmt.Sprintf("%s ago (%s)", age(now.Sub(at)), at.In(now.Location()).Format(time.DateTime))
}

func resourceText(r *agentv1.Resources) string {
	var parts []string
	if n := r.GetCpuMillis(); n > 0 {
		parts = append(parts, cpus(n)+" CPU")
	}
	if n := r.GetMemoryMib(); n > 0 {
		parts = append(parts, size(n<<20))
	}
	if n := r.GetPids(); n > 0 {
		parts = append(parts, fmt.Sprintf("%d processes", n))
	}
	if len(parts) == 0 {
		return "no limits"
	}
	return strings.Join(parts, ", ")
}

func readinessText(r *agentv1.Readiness) string {
	if r == nil {
		return ""
	}
	text := "it runs"
	switch probe := r.GetProbe().(type) {
	case *agentv1.Readiness_Exec:
		text = quoteWords(probe.Exec.GetCommand()) + " succeeds"
	case *agentv1.Readiness_Http:
		text = fmt.Sprintf("http :%d%s answers", probe.Http.GetPort(), probe.Http.GetPath())
	case *agentv1.Readiness_Tcp:
		text = fmt.Sprintf("tcp :%d accepts", probe.Tcp.GetPort())
	}
	if d := r.GetTimeout().AsDuration(); d > 0 {
		text += ", within " + duration(d)
	}
	return text
}

func restartText(r *agentv1.RestartPolicy) string {
	if r.GetMode() == agentv1.RestartPolicy_MODE_UNSPECIFIED {
		return ""
	}
	text := strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(r.GetMode().String(), "MODE_")), "_", "-")
	if n := r.GetMaxRetries(); n > 0 {
		text += fmt.Sprintf(", at most %d times", n)
	}
	return text
}

func portText(p *agentv1.Port) string {
	host := "any"
	if p.GetHostPort() > 0 {
		host = fmt.Sprint(p.GetHostPort())
	}
	text := fmt.Sprintf("%s:%s -> %d/%s", orElse(p.GetBindAddress(), "127.0.0.1"), host, p.GetGuestPort(), protocolName(p.GetProtocol()))
	if p.GetName() != "" {
		text += " (" + p.GetName() + ")"
	}
	return text
}

func protocolName(p agentv1.Protocol) string {
	if p == agentv1.Protocol_PROTOCOL_UDP {
		return "udp"
	}
	return "tcp"
}

// quoteWords prints a command such that parseWords reads it back.
func quoteWords(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		if w == "" || strings.ContainsAny(w, " \t\n'\"\\$&|;<>()*?#~`!") {
			w = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
		quoted[i] = w
	}
	return strings.Join(quoted, " ")
}
