//go:build linux

package machine

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path"

	"golang.org/x/sys/unix"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/guest/lease"
)

// Where things are before the root is made.
const (
	imageDir = "/image"
	layerDir = "/layer"
	rootDir  = "/root"
)

// maker makes a machine.
type maker struct {
	machine *guestv1.Machine
	// owner is who new disks are given to.
	owner func() (uid, gid uint32)
	note  func(stage string)
	// ownSystem: the system has a root of its own.
	ownSystem bool
	// freezable are folders in file systems that are to be left in order.
	freezable []*os.File
	// keeper is what keeps the address; nil: nobody has to.
	keeper *lease.Keeper
}

// Made is a machine that was made.
type Made struct {
	freezable []*os.File
	address   string
	keeper    *lease.Keeper
}

// Make makes the machine that its shim says: i is nil where the system has a
// root of its own. When it succeeds, the calling process's root is the
// machine's. owner, called then, says who is to have new disks; note is told what
// is being done. An error says which part could not be made.
func Make(m *guestv1.Machine, i *Initramfs, owner func() (uid, gid uint32), note func(stage string)) (*Made, error) {
	mk := &maker{machine: m, owner: owner, note: note, ownSystem: i == nil}
	mounts, err := mountsOf(m)
	if err != nil {
		return nil, err
	}
	if r := m.GetRosetta(); r != nil {
		if err := mk.rosetta(r, i); err != nil {
			return nil, fmt.Errorf("Rosetta: %w", err) //nolint:staticcheck // A name.
		}
	}
	if i != nil {
		if m.GetRoot() == nil {
			return nil, errors.New("it is started from the guest kit, and there is no image to make its root from")
		}
		// What is missing shows, and is told, where it is used.
		modules := i.LoadModules(stageRoot)
		if err := mk.root(m.GetRoot()); err != nil {
			return nil, errors.Join(fmt.Errorf("root: %w", err), modules)
		}
	} else if m.GetRoot() != nil {
		return nil, errors.New("the system has a root, and another is to be made: start guestd as the init of the guest kit")
	}
	for _, m := range mounts {
		if err := mk.mount(m); err != nil {
			return nil, err
		}
	}
	if err := mk.network(); err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	made := &Made{freezable: mk.freezable, keeper: mk.keeper}
	if prefix, err := netip.ParsePrefix(m.GetNetwork().GetAddress()); err == nil {
		made.address = prefix.Addr().String()
	}
	if i != nil {
		made.Name("")
	}
	return made, nil
}

// root makes the image with the layer over it the root.
func (mk *maker) root(r *guestv1.Root) error {
	mk.note("make the root")
	if err := checkName("file system", r.GetImageType()); err != nil {
		return err
	}
	for _, dir := range []string{imageDir, layerDir, rootDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	device, err := mk.findDisk(r.GetImageSerial())
	if err == nil {
		err = damaged(unix.Mount(device, imageDir, r.GetImageType(), unix.MS_RDONLY|unix.MS_NODEV, ""))
	}
	if err != nil {
		return fmt.Errorf("the image's disk %q, %s: %w", r.GetImageSerial(), r.GetImageType(), err)
	}
	if err := mk.layer(r.GetLayerSerial()); err != nil {
		return fmt.Errorf("the disk of what is written %q: %w", r.GetLayerSerial(), err)
	}
	options := "lowerdir=" + imageDir + ",upperdir=" + layerDir + "/upper,workdir=" + layerDir + "/work,redirect_dir=on"
	if err := unix.Mount("overlay", rootDir, "overlay", unix.MS_NOATIME, options); err != nil {
		return fmt.Errorf("lay what is written over the image: %w", damaged(err))
	}
	return enter()
}

// layer makes the place for what is written.
func (mk *maker) layer(serial string) error {
	if serial == "" {
		if err := unix.Mount("layer", layerDir, "tmpfs", 0, "mode=0755,size=100%"); err != nil {
			return err
		}
	} else {
		device, err := mk.findDisk(serial)
		if err != nil {
			return err
		}
		if err := mountDisk(device, layerDir, false, true, mk.noteOf(serial)); err != nil {
			return err
		}
		if err := mk.keep(layerDir); err != nil {
			return err
		}
		if begun(layerDir) {
			renew(layerDir)
			if err := settleIn(layerDir); err != nil {
				return err
			}
		}
	}
	// The root's owner and mode are those of upper.
	var image unix.Stat_t
	if err := unix.Stat(imageDir, &image); err != nil {
		return err
	}
	for _, dir := range []string{"upper", "work"} {
		err := os.Mkdir(path.Join(layerDir, dir), 0o755)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := own(path.Join(layerDir, dir), &image); err != nil {
			return err
		}
	}
	return nil
}

// enter makes what was made the root of this process, and of all that it is
// going to start; see switch_root(8).
func enter() error {
	for _, fs := range early {
		target := rootDir + fs.target
		if info, err := os.Lstat(target); err == nil && !info.IsDir() {
			return fmt.Errorf("the image's %s is not a folder", fs.target)
		}
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(fs.target, target, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", fs.target, err)
		}
	}
	if err := os.Chdir(rootDir); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	for _, fs := range late {
		// The kernel may be without one of them; then there is none.
		if err := fs.mount(); err != nil && !errors.Is(err, unix.ENODEV) {
			return err
		}
	}
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, "/dev/"+name); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	// There are no modules in here that the kernel could ask for.
	_ = os.WriteFile("/proc/sys/kernel/modprobe", []byte("\n"), 0)
	return nil
}

func (mk *maker) noteOf(serial string) func(string) {
	return func(what string) { mk.note(what + " the disk " + serial) }
}

// keep remembers a file system that is to be left in order.
func (mk *maker) keep(dir string) error {
	file, err := os.Open(dir)
	if err == nil {
		mk.freezable = append(mk.freezable, file)
	}
	return err
}
