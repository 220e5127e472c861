package vz

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/vm"
)

func TestBlueprintOfEverything(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	s.rosetta = rosettaInstalled
	config, options := setup(t)
	config.Rosetta = true
	work, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	folder := t.TempDir()
	config.Shares = []vm.Share{{Tag: "share0", Path: folder}, {Tag: "share1", Path: folder, ReadOnly: true}}
	config.Network, config.MAC = work, net.HardwareAddr{0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xee}
	config.Console = work
	made(t, s, config, options)
	in := func(name string) string { return filepath.Join(config.Dir, name) }
	want := blueprint{
		Kernel: in("kernel"), Initrd: in("initrd"), CommandLine: "console=hvc0", CPUs: 2, MemorySize: 1 << 30,
		MachineIdentifier: []byte("id1"),
		Disks: []blockDevice{
			{Identifier: "image", Path: in("root.img"), ReadOnly: true, CachingMode: cached, SyncMode: syncFsync},
			{Identifier: "layer", Path: in("layer.img"), CachingMode: cached, SyncMode: syncFsync},
		},
		Shares:     []directoryShare{{Tag: "share0", Path: folder}, {Tag: "share1", Path: folder, ReadOnly: true}},
		RosettaTag: "rosetta", Network: work, MAC: config.MAC, Console: work,
	}
	if diff := cmp.Diff([]blueprint{want}, s.blueprints, cmpopts.EquateComparable(&os.File{})); diff != "" {
		t.Error(diff)
	}
}

func TestBlueprintOnTheNAT(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	config, options := setup(t)
	config.NAT, config.MAC = true, net.HardwareAddr{0x5a, 0, 0, 0, 0, 1}
	b, err := draw(s, config, options)
	if err != nil || !b.NAT || b.Network != nil || b.MAC.String() != config.MAC.String() {
		t.Errorf("NAT %v, a socket %v, %s, %v", b.NAT, b.Network, b.MAC, err)
	}
	config.MAC = nil
	_, err = draw(s, config, options)
	wantText(t, err, "no address of an Ethernet device")
}

func TestMachineIsNoSmallerThanTheFrameworkAllows(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	config, options := setup(t)
	config.MemoryMiB = 1
	b, err := draw(s, config, options)
	if err != nil || b.MemorySize != smallestMemory || b.CPUs != 2 {
		t.Errorf("%d processors and %d bytes, %v", b.CPUs, b.MemorySize, err)
	}
}

func TestIdentifierStaysTheSame(t *testing.T) {
	t.Parallel()
	s := newStandIn()
	config, options := setup(t)
	for range 2 {
		b, err := draw(s, config, options)
		if err != nil || string(b.MachineIdentifier) != "id1" {
			t.Fatalf("%q, %v", b.MachineIdentifier, err)
		}
	}
	entries, err := os.ReadDir(options.Home)
	if err != nil || len(entries) != 1 {
		t.Errorf("left in the machine's home: %v, %v", entries, err)
	}
	// A file that was cut off is none.
	if err := os.Truncate(filepath.Join(options.Home, identifierFile), 0); err != nil {
		t.Fatal(err)
	}
	if b, err := draw(s, config, options); err != nil || string(b.MachineIdentifier) != "id2" {
		t.Errorf("%q, %v", b.MachineIdentifier, err)
	}
}

func TestMachineWithoutKernelBootsWithEFI(t *testing.T) {
	t.Parallel()
	config, options := setup(t)
	config.Kernel, config.Initrd, config.Cmdline = "", "", ""
	variables := filepath.Join(options.Home, variablesFile)
	b, err := draw(newStandIn(), config, options)
	if err != nil || b.Kernel != "" || b.EFIVariableStore != variables || !b.CreateEFIVariableStore {
		t.Errorf("%+v, %v", b, err)
	}
	if err := os.WriteFile(variables, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err = draw(newStandIn(), config, options); err != nil || b.CreateEFIVariableStore {
		t.Errorf("its variables are made anew: %+v, %v", b, err)
	}
	config.Cmdline = "quiet"
	_, err = draw(newStandIn(), config, options)
	wantText(t, err, "no kernel")
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(*testing.T, *standIn, *vm.Config, *Options)
		says   []string
		is     error
	}{
		"old macOS":              {func(_ *testing.T, s *standIn, _ *vm.Config, _ *Options) { s.version = "12.7.1" }, []string{"macOS 12.7.1 is too old", "macOS 13", "Software Update"}, nil},
		"a version that is none": {func(_ *testing.T, s *standIn, _ *vm.Config, _ *Options) { s.version = "beta" }, []string{`"beta" is none`}, nil},
		"processors":             {func(_ *testing.T, _ *standIn, c *vm.Config, _ *Options) { c.CPUs = 9 }, []string{"9 processors", "give it 8 or fewer"}, nil},
		"memory":                 {func(_ *testing.T, _ *standIn, c *vm.Config, _ *Options) { c.MemoryMiB = 20480 }, []string{"20480 MiB", "give it 16384 or less"}, nil},
		"no processor":           {func(_ *testing.T, _ *standIn, c *vm.Config, _ *Options) { c.CPUs = -1 }, []string{"too little"}, nil},
		"x86-64 on Apple silicon": {func(_ *testing.T, s *standIn, c *vm.Config, _ *Options) {
			c.Arch, s.rosetta = "amd64", rosettaInstalled
		}, []string{"x86-64 machine cannot run", "use arm64", "has Rosetta"}, nil},
		"x86-64 without Rosetta": {func(_ *testing.T, s *standIn, c *vm.Config, _ *Options) {
			c.Arch, s.rosetta = "amd64", rosettaNotInstalled
		}, []string{"x86-64 machine cannot run", "\n", "softwareupdate --install-rosetta"}, nil},
		"arm64 on Intel": {func(_ *testing.T, s *standIn, _ *vm.Config, _ *Options) { s.goarch = "amd64" }, []string{"arm64 cannot run", "use amd64"}, nil},
		"Rosetta is not installed": {func(_ *testing.T, s *standIn, c *vm.Config, _ *Options) {
			c.Rosetta, s.rosetta = true, rosettaNotInstalled
		}, []string{"not installed", "softwareupdate --install-rosetta"}, nil},
		"Rosetta is not there": {func(_ *testing.T, _ *standIn, c *vm.Config, _ *Options) { c.Rosetta = true }, []string{"no Rosetta", "use an arm64 image"}, nil},
		"Rosetta on Intel": {func(_ *testing.T, s *standIn, c *vm.Config, _ *Options) {
			c.Rosetta, s.goarch, c.Arch = true, "amd64", "amd64"
		}, []string{"Apple silicon"}, nil},
		"a share that vanished": {func(t *testing.T, _ *standIn, c *vm.Config, _ *Options) {
			c.Shares = []vm.Share{{Tag: "share0", Path: filepath.Join(t.TempDir(), "gone")}}
		}, []string{"share share0", "is gone", "make it again"}, fs.ErrNotExist},
		"a share that is a file": {func(_ *testing.T, _ *standIn, c *vm.Config, _ *Options) {
			c.Shares = []vm.Share{{Tag: "share0", Path: "kernel"}}
		}, []string{"not a folder"}, nil},
		"a tag twice": {func(_ *testing.T, _ *standIn, c *vm.Config, _ *Options) {
			c.Shares = []vm.Share{{Tag: "a", Path: c.Dir}, {Tag: "a", Path: c.Dir}}
		}, []string{`share tag "a"`}, nil},
		"Rosetta's tag": {func(_ *testing.T, s *standIn, c *vm.Config, _ *Options) {
			s.rosetta, c.Rosetta, c.Shares = rosettaInstalled, true, []vm.Share{{Tag: "rosetta", Path: c.Dir}}
		}, []string{`share tag "rosetta"`}, nil},
		"a serial":                {func(_ *testing.T, _ *standIn, c *vm.Config, _ *Options) { c.Disks[0].Serial = "Über" }, []string{`disk serial "Über"`}, nil},
		"a disk that is gone":     {func(_ *testing.T, _ *standIn, c *vm.Config, _ *Options) { c.Disks[1].Path = "gone.img" }, []string{"disk layer", "gone.img"}, fs.ErrNotExist},
		"a disk that is a folder": {func(_ *testing.T, _ *standIn, c *vm.Config, _ *Options) { c.Disks[1].Path = c.Dir }, []string{"disk layer", "not a regular file"}, nil},
		"a disk in use":           {func(t *testing.T, _ *standIn, c *vm.Config, _ *Options) { lock(t, c.Disks[1].Path) }, []string{"disk layer", "in use by another machine", "stop that"}, nil},
		"no kernel there":         {func(_ *testing.T, _ *standIn, c *vm.Config, _ *Options) { c.Kernel = "vmlinuz" }, []string{"kernel", "vmlinuz"}, fs.ErrNotExist},
		"a kernel in gzip": {func(t *testing.T, _ *standIn, c *vm.Config, _ *Options) {
			kernel(t, c, map[int]string{0: "\x1f\x8b\x08"})
		}, []string{"kernel is not an uncompressed Image for arm64", "compressed with gzip", "gzip -dc"}, nil},
		"a kernel in zstd": {func(t *testing.T, _ *standIn, c *vm.Config, _ *Options) {
			kernel(t, c, map[int]string{0: "\x28\xb5\x2f\xfd"})
		}, []string{"compressed with zstd", "zstd -dc"}, nil},
		"a kernel that EFI unpacks": {func(t *testing.T, _ *standIn, c *vm.Config, _ *Options) {
			kernel(t, c, map[int]string{0: "MZ", 4: "zimg", 24: "gzip"})
		}, []string{"an EFI program with the Image packed in it", "take that out with tail"}, nil},
		"a kernel for x86-64": {func(t *testing.T, _ *standIn, c *vm.Config, _ *Options) {
			kernel(t, c, map[int]string{0x202: "HdrS"})
		}, []string{"is not an uncompressed Image for arm64: it is a bzImage for amd64"}, nil},
		"a kernel for arm64, on Intel": {func(_ *testing.T, s *standIn, c *vm.Config, _ *Options) {
			s.goarch, c.Arch = "amd64", "amd64"
		}, []string{"is not a bzImage for amd64: it is an Image for arm64"}, nil},
		"a kernel that was cut off": {func(t *testing.T, s *standIn, c *vm.Config, _ *Options) {
			kernel(t, c, map[int]string{0x1f1: "\x20", 0x202: "HdrS"})
			s.goarch, c.Arch = "amd64", "amd64"
		}, []string{"is not all there"}, nil},
		"a kernel of large pages": {func(t *testing.T, _ *standIn, c *vm.Config, _ *Options) {
			kernel(t, c, map[int]string{24: "\x0e", 56: "ARM\x64"})
		}, []string{"pages of 64 KiB", "none above 16", "CONFIG_ARM64_4K_PAGES"}, nil},
		"no initrd there":            {func(_ *testing.T, _ *standIn, c *vm.Config, _ *Options) { c.Initrd = "initramfs" }, []string{"initrd"}, fs.ErrNotExist},
		"a zero in the command line": {func(_ *testing.T, _ *standIn, c *vm.Config, _ *Options) { c.Cmdline = "a\x00b" }, []string{"zero byte"}, nil},
		"a group's address":          {func(_ *testing.T, _ *standIn, c *vm.Config, _ *Options) { c.MAC = net.HardwareAddr{1, 0, 0, 0, 0, 0} }, []string{"no address of an Ethernet device"}, nil},
		"two networks":               {func(_ *testing.T, _ *standIn, c *vm.Config, _ *Options) { c.NAT = true }, []string{"two networks"}, nil},
		"no home":                    {func(_ *testing.T, _ *standIn, _ *vm.Config, o *Options) { o.Home = "" }, []string{"no folder"}, nil},
		"no state to restore":        {func(_ *testing.T, _ *standIn, c *vm.Config, _ *Options) { c.Restore = "saved" }, []string{"state to restore"}, fs.ErrNotExist},
		"a state, on macOS 13":       {func(_ *testing.T, s *standIn, c *vm.Config, _ *Options) { s.version, c.Restore = "13.6", "kernel" }, []string{"restore", "macOS 13.6 is too old", "macOS 14"}, vm.ErrCannotSave},
		"a state, on Intel": {func(t *testing.T, s *standIn, c *vm.Config, _ *Options) {
			kernel(t, c, map[int]string{0x202: "HdrS"})
			s.goarch, c.Arch, c.Restore = "amd64", "amd64", "kernel"
		}, []string{"Apple silicon alone"}, vm.ErrCannotSave},
		"a state that no machine like this has": {func(_ *testing.T, s *standIn, c *vm.Config, _ *Options) {
			s.unsavable, c.Restore = errors.New("shares"), "kernel"
		}, []string{"restore", "shares"}, vm.ErrCannotSave},
		"a device": {func(_ *testing.T, s *standIn, _ *vm.Config, _ *Options) {
			s.configureErr = &nsError{Domain: vzDomain, Code: 5, LocalizedDescription: "Invalid disk image."}
		}, []string{"Invalid disk image. (VZErrorDomain 5)"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStandIn()
			config, options := setup(t)
			network, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			config.Network, config.MAC = network, net.HardwareAddr{0x5a, 0, 0, 0, 0, 1}
			c.change(t, s, &config, &options)
			_, err = newMachine(s, config, options)
			wantText(t, err, c.says...)
			if c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("%v is not %v", err, c.is)
			}
			if s.machine != nil {
				t.Error("a machine was made all the same")
			}
			if err := network.Close(); !errors.Is(err, os.ErrClosed) {
				t.Errorf("the network was not taken over: %v", err)
			}
		})
	}
}

// kernel replaces the kernel of a machine.
func kernel(t *testing.T, c *vm.Config, marks map[int]string) {
	t.Helper()
	writeKernel(t, filepath.Join(c.Dir, c.Kernel), marks)
}

func TestKernelsOfAppleSilicon(t *testing.T) {
	t.Parallel()
	for _, flags := range []string{"\x00", "\x0a", "\x0c"} { // that do not say, of 4 KiB, of 16
		config, options := setup(t)
		kernel(t, &config, map[int]string{24: flags, 56: "ARM\x64"})
		if _, err := draw(newStandIn(), config, options); err != nil {
			t.Errorf("flags %q: %v", flags, err)
		}
	}
}

// lock locks a file as the framework does, until the test ends.
func lock(t *testing.T, path string) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Fatal(err)
	}
}

func TestReadOnlyDiskMayBeInUse(t *testing.T) {
	t.Parallel()
	config, options := setup(t)
	lock(t, filepath.Join(config.Dir, "root.img"))
	if _, err := draw(newStandIn(), config, options); err != nil {
		t.Error(err)
	}
}

func TestLookingForALockLeavesNone(t *testing.T) {
	t.Parallel()
	config, options := setup(t)
	if _, err := draw(newStandIn(), config, options); err != nil {
		t.Fatal(err)
	}
	lock(t, config.Disks[1].Path)
}
