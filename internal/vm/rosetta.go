package vm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/choiros/agent/internal/image"
	"github.com/choiros/agent/internal/sandbox"
)

// RosettaTag is the tag of the share of Config.Rosetta.
const RosettaTag = "rosetta"

// Rosetta runs programs for amd64 in machines for arm64, and nothing else.
const (
	rosettaHost  = "arm64"
	rosettaGuest = "amd64"
)

// rosettaModule is the module that a guest kit has to have for it.
const rosettaModule = "binfmt_misc"

// others are the architectures whose images run in machines here beside their
// own.
func (d *Driver) others() []image.Other {
	if d.cfg.Rosetta == nil || d.cfg.Arch != rosettaHost {
		return nil
	}
	return []image.Other{{Arch: rosettaGuest, Missing: d.cfg.Rosetta}}
}

// checkRosetta says why an image for amd64 cannot run with a kit at present, and
// what mends that.
func (d *Driver) checkRosetta(kit bundle) error {
	if len(d.others()) == 0 {
		return fmt.Errorf("there is no Rosetta on this host; use an image for linux/%s", kit.Arch)
	}
	if err := d.cfg.Rosetta(); err != nil {
		return err
	}
	return kit.checkRosetta()
}

// checkRosetta refuses a kit from before there was Rosetta.
func (b bundle) checkRosetta() error {
	if slices.Contains(b.Modules, rosettaModule) {
		return nil
	}
	return errors.New("the guest kit is too old to have Rosetta; install a newer one with agentctl guest-kit install")
}

// reportRosetta adds to a report whether there is Rosetta.
func (d *Driver) reportRosetta(report *sandbox.Report, kit bundle) {
	if len(d.others()) == 0 {
		return
	}
	if err := d.checkRosetta(kit); err != nil {
		report.Warnings = append(report.Warnings, fmt.Sprintf("images for linux/%s cannot run here: %v", rosettaGuest, err))
		return
	}
	report.Version += ", images for linux/" + rosettaGuest + " by Rosetta"
}

// resolveLimit is how long an image may take to be looked up by who has no
// context.
const resolveLimit = 10 * time.Second

// usesRosetta reports whether the image that a spec means today runs by Rosetta.
func (d *Driver) usesRosetta(spec sandbox.Spec) bool {
	if spec.Machine != "" || len(d.others()) == 0 {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), resolveLimit)
	defer cancel()
	_, err := d.cfg.Images.Resolve(ctx, spec.Image, rosettaGuest)
	return err == nil
}

// rosetta reports whether an image runs by Rosetta in a machine for arch.
func (p *imagePlan) rosetta(arch string) bool {
	return p != nil && p.Arch == rosettaGuest && arch == rosettaHost
}
