package container

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/choiros/agent/internal/sandbox"
)

// header is that of a program for this machine, which is all of it.
func header(kind elf.Type, machine elf.Machine, segments ...elf.Prog64) []byte {
	var b bytes.Buffer
	_ = binary.Write(&b, binary.LittleEndian, elf.Header64{
		Ident:   [16]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:    uint16(kind),
		Machine: uint16(machine),
		Version: uint32(elf.EV_CURRENT), Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: uint16(len(segments)),
		Shentsize: 64,
	})
	_ = binary.Write(&b, binary.LittleEndian, segments)
	return b.Bytes()
}

func hostMachine() elf.Machine {
	if runtime.GOARCH == "arm64" {
		return elf.EM_AARCH64
	}
	return elf.EM_X86_64
}

// fakeGuestd returns a folder with what looks like guestd.
func fakeGuestd(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	plantGuestd(t, dir, header(elf.ET_EXEC, hostMachine()), 0o755)
	return dir
}

func plantGuestd(t *testing.T, dir string, content []byte, mode os.FileMode) {
	t.Helper()
	name := filepath.Join(dir, guestdName)
	if err := errors.Join(os.WriteFile(name, content, mode), os.Chmod(name, mode)); err != nil {
		t.Fatal(err)
	}
}

func TestCheckGuestd(t *testing.T) {
	t.Parallel()
	good := header(elf.ET_EXEC, hostMachine())
	other := elf.EM_AARCH64
	if hostMachine() == other {
		other = elf.EM_X86_64
	}
	for name, test := range map[string]struct {
		plant func(t *testing.T, dir string)
		says  string // empty: it is good
	}{
		"good":        {func(t *testing.T, dir string) { plantGuestd(t, dir, good, 0o755) }, ""},
		"position":    {func(t *testing.T, dir string) { plantGuestd(t, dir, header(elf.ET_DYN, hostMachine()), 0o755) }, ""},
		"missing":     {func(*testing.T, string) {}, "no such file"},
		"mode":        {func(t *testing.T, dir string) { plantGuestd(t, dir, good, 0o700) }, "mode 0700"},
		"a script":    {func(t *testing.T, dir string) { plantGuestd(t, dir, []byte("#!/bin/sh\nexec sleep 1000\n"), 0o755) }, "no program for Linux"},
		"empty":       {func(t *testing.T, dir string) { plantGuestd(t, dir, nil, 0o755) }, "EOF"},
		"other host":  {func(t *testing.T, dir string) { plantGuestd(t, dir, header(elf.ET_EXEC, other), 0o755) }, "is a program for"},
		"object file": {func(t *testing.T, dir string) { plantGuestd(t, dir, header(elf.ET_REL, hostMachine()), 0o755) }, "ET_REL"},
		"dynamic": {func(t *testing.T, dir string) {
			plantGuestd(t, dir, header(elf.ET_DYN, hostMachine(), elf.Prog64{Type: uint32(elf.PT_INTERP)}), 0o755)
		}, "CGO_ENABLED=0"},
		"a folder": {func(t *testing.T, dir string) { mkdir(t, dir, guestdName) }, "not a regular file"},
		"a link": {func(t *testing.T, dir string) {
			if err := os.Symlink("/bin/true", filepath.Join(dir, guestdName)); err != nil {
				t.Fatal(err)
			}
		}, "not a regular file"},
	} {
		dir := mkdir(t, t.TempDir(), "guestd")
		test.plant(t, dir)
		err := checkGuestd(dir)
		if test.says == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		var unavailable *sandbox.UnavailableError
		if !errors.As(err, &unavailable) || unavailable.Cure != guestdCure || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v, want unavailable, %q and the cure", name, err, test.says)
		}
	}
	for _, dir := range []string{"", "relative", "/no/such/folder"} {
		if err := checkGuestd(dir); !errors.Is(err, sandbox.ErrUnavailable) {
			t.Errorf("folder %q: %v, want unavailable", dir, err)
		}
	}
}
