package main

import (
	"fmt"
	"runtime"
	"strings"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/version"
)

// build is what `version` prints of a program.
type build struct {
	Version string `json:"version,omitempty"`
	Go      string `json:"go,omitempty"`
	OS      string `json:"os,omitempty"`
	Arch    string `json:"arch,omitempty"`
	Address string `json:"address,omitempty"`
	Error   string `json:"error,omitempty"`
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Show the versions of agentctl and of the agent",
		Long:    "Show the versions of agentctl and of the agent, if it can be reached.",
		Example: "  agentctl version\n  agentctl version -q   # agentctl's alone",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			mine := build{Version: version.String(), Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
			if a.quiet {
				_, err := fmt.Fprintln(a.stdout, mine.Version)
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			ctx, cancel := quick(cmd.Context())
			defer cancel()
			theirs := build{Address: c.address.String()}
			info, err := c.host.GetInfo(ctx, &agentv1.GetInfoRequest{})
			if err != nil {
				theirs.Error = oneLine(message(err))
			} else {
				theirs.Version, theirs.OS, theirs.Arch = info.GetAgentVersion(), info.GetOs(), info.GetArch()
			}
			if a.forPrograms() {
				return a.print(struct {
					Agentctl build `json:"agentctl"`
					Agent    build `json:"agent"`
				}{mine, theirs})
			}
			p := &page{}
			p.add("agentctl", strings.Join([]string{mine.Version, mine.OS + "/" + mine.Arch, mine.Go}, " "))
			if err != nil {
				p.add("agent", theirs.Error)
			} else {
				p.add("agent", fmt.Sprintf("%s %s/%s at %s", theirs.Version, theirs.OS, theirs.Arch, theirs.Address))
			}
			return p.write(a.stdout, a.out.bold)
		},
	}
}
