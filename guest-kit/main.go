// Command guest-kit builds what a virtual machine made from an image boots
// with: a kernel of Debian's, and an initramfs that is guestd, the kernel's
// modules that it loads, and little else. docs/guest-kit.md describes it.
//
// It needs apt, dpkg-deb and xz, so it runs on Debian and what descends
// from it, for any architecture that guests have. Nothing of the machine's own
// apt or dpkg is changed, and nothing that apt has not authenticated is used.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
)

func main() { os.Exit(run(os.Args[1:], os.Stderr)) }

// options is the command line.
type options struct {
	arch    string
	guestd  string
	cache   string
	out     string
	archive string
	refresh bool
}

func run(args []string, stderr io.Writer) int {
	var o options
	flags := flag.NewFlagSet("guest-kit", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&o.arch, "arch", "amd64", "of the guests: amd64 or arm64")
	flags.StringVar(&o.guestd, "guestd", "", "the guestd that is the initramfs's init, built for that architecture")
	flags.StringVar(&o.cache, "cache", ".cache/guest-kit", "a folder for what is downloaded")
	flags.StringVar(&o.out, "o", "", "the folder that the kit is put in")
	flags.StringVar(&o.archive, "archive", "", "a file that the kit is packed into as well, for a release")
	flags.BoolVar(&o.refresh, "refresh", false, "ask for newer packages than those in the cache")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := build(ctx, o, stderr)
	if err == nil && o.archive != "" {
		err = writeArchive(o.out, o.archive)
	}
	if err != nil {
		fmt.Fprintf(stderr, "guest-kit: %v\n", err)
		return 1
	}
	return 0
}

// build makes the kit, unless it is there and made of the same.
func build(ctx context.Context, o options, progress io.Writer) error {
	if o.arch != "amd64" && o.arch != "arm64" {
		return fmt.Errorf("no guests are %q: amd64 or arm64", o.arch)
	}
	if o.guestd == "" || o.out == "" {
		return errors.New("-guestd and -o are needed")
	}
	for _, program := range []string{"apt-get", "dpkg-deb", "xz"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("%w; it needs Debian or what descends from it, with apt, dpkg and xz-utils installed; "+
				"elsewhere a release has the kit: agentctl guest-kit install", err)
		}
	}
	guestd, err := os.ReadFile(o.guestd)
	if err != nil {
		return err
	}
	cache, err := filepath.Abs(o.cache)
	if err != nil {
		return err
	}
	d := debian{cache: cache, arch: o.arch, progress: progress}
	deb, err := d.kernel(ctx, o.refresh)
	if err != nil {
		return fmt.Errorf("get the kernel for %s: %w", o.arch, err)
	}
	inputs, err := fingerprint(deb, guestd)
	if err != nil {
		return err
	}
	if upToDate(o.out, inputs) {
		return nil
	}
	made, err := assemble(ctx, o.arch, deb, guestd)
	if err != nil {
		return err
	}
	made.manifest.Inputs = inputs
	if err := made.write(o.out); err != nil {
		return err
	}
	fmt.Fprintf(progress, "guest-kit: %s: Linux %s, kernel %.1f MB, initramfs %.1f MB\n", o.out, made.manifest.KernelVersion,
		float64(len(made.kernel))/1e6, float64(len(made.initramfs))/1e6)
	return nil
}
