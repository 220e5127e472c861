package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/choiros/agent/internal/kit"
	"github.com/choiros/agent/internal/location"
)

func (a *app) guestKitCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "guest-kit",
		Short:   "Install what virtual machines boot images with",
		Long:    "Install the guest kit on this host: the kernel that images are booted with in\nvirtual machines.",
		Example: "  agentctl guest-kit install guest-kit-arm64.tar.gz",
	}
	cmd.AddCommand(a.guestKitInstall())
	return cmd
}

func (a *app) guestKitInstall() *cobra.Command {
	var sum, stateDir string
	cmd := &cobra.Command{
		Use:   "install FILE|URL",
		Short: "Install the guest kit of a release, once its checksum was verified",
		Long: `Install the guest kit of a release, guest-kit-ARCH.tar.gz, for this host's agent:
from a file, or an https URL. Its SHA-256 has to be the one that is given, or that
SHA256SUMS beside it says. That the file beside it was not exchanged as well only
a checksum from elsewhere tells.

The kit that was installed before is replaced in one step, or stays. Machines
boot with the new one from their next start on; the agent need not be restarted.
A kit beside the agent, and one that vm.guest_kit names, come first.`,
		Example: `  agentctl guest-kit install ~/Downloads/guest-kit-arm64.tar.gz
  agentctl guest-kit install https://example.com/v1/guest-kit-arm64.tar.gz --sha256 1f3c…`,
		Args: exactly("FILE|URL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if stateDir == "" {
				stateDir = location.On(a.on.goos, a.getenv, a.on.uid).State
			}
			if stateDir == "" {
				return withHint(errors.New("no place for the guest kit: HOME is not set"), "set HOME, or give --state-dir")
			}
			return a.installKit(cmd.Context(), args[0], sum, stateDir)
		},
	}
	cmd.Flags().StringVar(&sum, "sha256", "", "the archive's `checksum`, in hexadecimal (default: as SHA256SUMS beside it says)")
	cmd.Flags().StringVar(&stateDir, "state-dir", "", "`folder` that the agent's configuration has as state_dir, if it is not the usual one")
	return cmd
}

func (a *app) installKit(ctx context.Context, source, sum, stateDir string) error {
	dir, err := filepath.Abs(filepath.Join(stateDir, "guest-kit"))
	if err != nil {
		return err
	}
	shown := a.newProgress("guest kit")
	installed, err := kit.Install(ctx, kit.Options{
		Source: source, SHA256: sum, Dir: dir, Arch: runtime.GOARCH,
		Progress: func(done, of int64) { shown.say(fetchedText(done, of), false) },
	})
	shown.stop()
	if err != nil {
		return err
	}
	if program, err := findAgent(""); err == nil {
		if first := kitBeside(program); first != "" {
			a.notef("%s boots with %s, and not with this; remove that, or have vm.guest_kit name the other", program, first)
		}
	}
	return a.confirm(installed, fmt.Sprintf("installed the guest kit for %s, Linux %s, in %s", installed.Arch, oneLine(installed.KernelVersion), installed.Path))
}

func fetchedText(done, of int64) string {
	if of <= 0 {
		return "got " + size(uint64(max(done, 0)))
	}
	return fmt.Sprintf("got %d%% of %s", 100*done/of, size(uint64(of)))
}

// kitBeside is the kit beside an agent's program, which comes before what is
// installed. Empty: there is none.
func kitBeside(program string) string {
	program, err := filepath.EvalSymlinks(program)
	if err != nil {
		return ""
	}
	dir := filepath.Join(filepath.Dir(program), "guest-kit", runtime.GOARCH)
	if !exists(filepath.Join(dir, "guest.json")) {
		return ""
	}
	return dir
}
