//go:build linux

package machine

import (
	"errors"
	"fmt"
	"os"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

const (
	// rosettaDir is where the share is. The image's root will cover it, so that
	// nothing of an image is in its way, and nothing of it in the image's.
	rosettaDir     = "/rosetta"
	rosettaProgram = rosettaDir + "/rosetta"

	binfmtDir = "/proc/sys/fs/binfmt_misc"
)

// rosetta has the kernel run programs for x86-64 with the one in a share, before
// there is a root. The kernel opens that here and now, so that it is found in
// whatever root something is started later.
func (mk *maker) rosetta(r *guestv1.Rosetta, i *Initramfs) error {
	if i == nil {
		return errors.New("the system has a root of its own, and its kernel is left as it is")
	}
	mk.note("prepare Rosetta")
	modules := i.LoadModules(stageRosetta) // told where the file system is missed
	if err := os.MkdirAll(rosettaDir, 0o755); err != nil {
		return err
	}
	share := mount{share: &guestv1.Share{Tag: r.GetTag(), ReadOnly: true}}
	if err := mountShare(share, rosettaDir); err != nil {
		return fmt.Errorf("mount the share %s: %w", r.GetTag(), err)
	}
	if info, err := os.Stat(rosettaProgram); err != nil || !info.Mode().IsRegular() {
		return errors.Join(fmt.Errorf("the share %s has no program called rosetta in it", r.GetTag()), err)
	}
	binfmt := kernelFS{binfmtDir, "binfmt_misc", noFiles, ""}
	if err := binfmt.mount(); err != nil {
		return errors.Join(err, modules)
	}
	if err := os.WriteFile(binfmtDir+"/register", []byte(rosettaRule(rosettaProgram)), 0); err != nil {
		return fmt.Errorf("have the kernel run programs for x86-64 with it: %w", err)
	}
	return nil
}
