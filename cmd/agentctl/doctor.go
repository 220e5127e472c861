package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"time"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/version"
)

// verdict is how a check turned out.
type verdict string

const (
	fine   verdict = "ok"
	warn   verdict = "warn"
	failed verdict = "fail"
)

// finding is the outcome of one check.
type finding struct {
	Check  string  `json:"check"`
	Status verdict `json:"status"`
	Detail string  `json:"detail"`
	// Cure is the command, or the one step, that mends it.
	Cure string `json:"cure,omitempty"`
}

func (a *app) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Check what works on this host, and say what mends the rest",
		Long: `Check what works on this host, what does not, and which command mends it. It
works whether or not the agent runs. Run it as the user that the agent runs as.
It changes nothing.

Exit status: 1 if a check failed; warnings do not count.`,
		Example: "  agentctl doctor\n  agentctl doctor -q            # only what is wrong\n  agentctl doctor -o json",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			findings, err := a.examine(cmd.Context())
			if err != nil {
				return err
			}
			return a.showFindings(findings)
		},
	}
}

// examine makes all checks that apply here.
func (a *app) examine(ctx context.Context) ([]finding, error) {
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, readTimeout, gaveUp{readTimeout})
	defer cancel()
	findings := a.examineAgent(ctx, c)
	if c.address.network != "unix" {
		return findings, nil // it runs on another host
	}
	h := thisHost(a.getenv)
	switch a.on.goos {
	case "linux":
		findings = append(findings, h.examineLinux(ctx)...)
	case "darwin":
		findings = append(findings, h.examineMac()...)
	}
	return append(findings, h.disk()), nil
}

func thisHost(getenv func(string) string) *host {
	h := &host{
		root: os.DirFS("/"), getenv: getenv, uid: os.Getuid(),
		lookPath: exec.LookPath, podman: podmanVersion, free: freeBytes,
	}
	if me, err := user.Current(); err == nil {
		h.user = me.Username
	}
	return h
}

func (a *app) showFindings(findings []finding) error {
	bad := 0
	for _, f := range findings {
		if f.Status == failed {
			bad++
		}
	}
	if a.forPrograms() {
		if err := a.print(findings); err != nil {
			return err
		}
	} else if err := a.findingLines(a.stdout, findings); err != nil {
		return err
	}
	if bad > 0 {
		err := fmt.Errorf("%d of %d checks failed", bad, len(findings))
		if !a.quiet && !a.forPrograms() {
			fmt.Fprintf(a.stdout, "\n%s\n", err)
		}
		return &reported{err, exitFailed}
	}
	return nil
}

func (a *app) findingLines(w io.Writer, findings []finding) error {
	width := 0
	for _, f := range findings {
		width = max(width, len(f.Check))
	}
	for _, f := range findings {
		mark, paint := "ok  ", a.out.green
		switch f.Status {
		case warn:
			mark, paint = "warn", a.out.yellow
		case failed:
			mark, paint = "fail", a.out.red
		case fine:
			if a.quiet {
				continue
			}
		}
		if _, err := fmt.Fprintf(w, "%s  %-*s  %s\n", paint(mark), width, f.Check, oneLine(f.Detail)); err != nil {
			return err
		}
		if f.Cure != "" {
			if _, err := fmt.Fprintf(w, "%*s%s%s\n", len(mark)+2+width+2, "", a.out.bold(hintPrefix), oneLine(f.Cure)); err != nil {
				return err
			}
		}
	}
	return nil
}

// examineAgent checks the agent itself, and its drivers as it sees them.
func (a *app) examineAgent(ctx context.Context, c *client) []finding {
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Second, gaveUp{10 * time.Second})
	defer cancel()
	info, err := c.host.GetInfo(ctx, &agentv1.GetInfoRequest{})
	if err != nil {
		return []finding{{"agent", failed, agentProblem(c, err), hintOf(err)}}
	}
	findings := []finding{{"agent", fine, fmt.Sprintf("%s answers at %s", info.GetAgentVersion(), c.address), ""}}
	if mine := version.String(); mine != info.GetAgentVersion() {
		findings = append(findings, finding{
			"versions", warn,
			fmt.Sprintf("agentctl is %s and the agent is %s", mine, info.GetAgentVersion()),
			"install both from one release, and restart the agent; sandboxes go on running",
		})
	}
	if info.GetDraining() {
		findings = append(findings, finding{"draining", warn, "the host refuses boots", "agentctl host undrain"})
	}
	if !info.GetReconciled() {
		findings = append(findings, finding{"reconciled", warn, "the agent is still comparing its records with the host", "agentctl doctor, in a minute"})
	}
	for _, q := range info.GetQuarantined() {
		findings = append(findings, finding{
			"record " + q.GetName(), warn, "set aside at the last start: " + q.GetReason(),
			"mend " + q.GetPath() + " and restart the agent, or delete it",
		})
	}
	return append(findings, driverFindings(info)...)
}

func agentProblem(c *client, err error) string {
	if e, ok := errors.AsType[*connectError](err); ok {
		return e.problem() + ": " + c.address.String()
	}
	return message(err)
}

func driverFindings(info *agentv1.GetInfoResponse) []finding {
	var findings []finding
	works := 0
	for _, d := range info.GetDrivers() {
		if d.GetAvailable() {
			works++
		}
	}
	for _, d := range info.GetDrivers() {
		check := "driver " + d.GetName()
		if d.GetAvailable() {
			findings = append(findings, finding{check, fine, orElse(d.GetVersion(), "available"), ""})
			for _, warning := range d.GetWarnings() {
				findings = append(findings, finding{check, warn, warning, ""})
			}
			continue
		}
		status := warn
		if works == 0 || d.GetName() == info.GetDefaultDriver() {
			status = failed
		}
		findings = append(findings, finding{check, status, "unavailable: " + d.GetReason(), d.GetCure()})
	}
	if len(info.GetDrivers()) == 0 {
		findings = append(findings, finding{"drivers", failed, "the agent has none", "enable one in the agent's configuration"})
	}
	return findings
}
