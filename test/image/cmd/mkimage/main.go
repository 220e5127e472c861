// Command mkimage writes the project's test images as archives for
// `podman load`:
//
//	mkimage -all DIR
//	mkimage -o FILE [-format oci|docker] [-arch GOARCH] [-user USER] [-name REFERENCE]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"

	"github.com/choiros/agent/test/image"
)

func main() { os.Exit(run(os.Args[1:], os.Stderr)) }

func run(args []string, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()

	flags := flag.NewFlagSet("mkimage", flag.ContinueOnError)
	flags.SetOutput(stderr)
	all := flags.String("all", "", "write all default images into this folder")
	out := flags.String("o", "", "write one image to this file")
	format := flags.String("format", string(image.OCI), "oci or docker")
	arch := flags.String("arch", runtime.GOARCH, "the image's architecture, as Go names it")
	user := flags.String("user", "", "the image's USER (default root)")
	name := flags.String("name", "", "its reference (default "+image.RootName+", or with -user "+image.UserName+")")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	if (*all == "") == (*out == "") || flags.NArg() > 0 {
		fmt.Fprintln(stderr, "mkimage: give either -all DIR or -o FILE")
		return 2
	}

	var err error
	if *all != "" {
		err = image.Build(ctx, *all)
	} else {
		spec := image.Spec{Name: *name, User: *user, Arch: *arch, Format: image.Format(*format)}
		if spec.Name == "" {
			spec.Name = image.RootName
			if spec.User != "" {
				spec.Name = image.UserName
			}
		}
		err = one(ctx, *out, spec)
	}
	if err != nil {
		fmt.Fprintf(stderr, "mkimage: %v\n", err)
		return 1
	}
	return 0
}

func one(ctx context.Context, file string, spec image.Spec) error {
	binary, err := image.BinaryFor(ctx, spec.Arch)
	if err != nil {
		return err
	}
	return image.WriteFile(file, binary, spec)
}
