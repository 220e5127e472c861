package container

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/choiros/agent/internal/sandbox"
)

// guestdName is the name of the program in Config.GuestdDir.
const guestdName = "guestd"

const guestdCure = "install guestd, of the same release and with mode 0755, beside the agent"

// checkGuestd sees that a container would find in dir a guestd that it can run,
// whoever it runs as and whatever its image lacks.
func checkGuestd(dir string) error {
	if err := findGuestd(dir); err != nil {
		return &sandbox.UnavailableError{Err: fmt.Errorf("no guestd for sandboxes: %w", err), Cure: guestdCure}
	}
	return nil
}

func findGuestd(dir string) error {
	if !filepath.IsAbs(dir) {
		return fmt.Errorf("its folder %q is not absolute", dir)
	}
	folder, err := os.Stat(dir)
	if err != nil {
		return err
	}
	name := filepath.Join(dir, guestdName)
	// A link would lead nowhere inside.
	info, err := os.Lstat(name)
	switch {
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file", name)
	case info.Mode()&0o555 != 0o555:
		return fmt.Errorf("%s has mode %04o, so not everybody can execute it", name, info.Mode().Perm())
	case folder.Mode()&0o555 != 0o555:
		return fmt.Errorf("%s has mode %04o, so not everybody can enter it", dir, folder.Mode().Perm())
	}
	return checkProgram(name)
}

// checkProgram refuses what is no program of Linux's for this machine, or one
// that needs a dynamic linker.
func checkProgram(name string) error {
	file, err := elf.Open(name)
	if err != nil {
		if _, malformed := errors.AsType[*elf.FormatError](err); malformed {
			return fmt.Errorf("%s is no program for Linux: %w", name, err)
		}
		return err
	}
	defer file.Close()
	machine := map[string]elf.Machine{
		"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64, "riscv64": elf.EM_RISCV, "ppc64le": elf.EM_PPC64, "s390x": elf.EM_S390,
	}
	if want, known := machine[runtime.GOARCH]; known && file.Machine != want {
		return fmt.Errorf("%s is a program for %s, not for %s", name, file.Machine, want)
	}
	if file.Type != elf.ET_EXEC && file.Type != elf.ET_DYN {
		return fmt.Errorf("%s is no program but %s", name, file.Type)
	}
	for _, segment := range file.Progs {
		if segment.Type == elf.PT_INTERP {
			return fmt.Errorf("%s is linked dynamically, and images have no linker; build it with CGO_ENABLED=0", name)
		}
	}
	return nil
}
