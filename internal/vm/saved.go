package vm

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/shim"
)

// Names of what a hibernated machine has in its box.
const (
	savedRecord = "saved.json"
	savedFile   = "saved"
)

const (
	// holdLimit is how long a guest may take to write its disks and to be still.
	holdLimit = 30 * time.Second
	// saveLimit is how long it may take to write the memory, restoreLimit to
	// read it.
	saveLimit    = 10 * time.Minute
	restoreLimit = 5 * time.Minute
)

// saved is the record of a machine whose memory was saved. It exists while that
// has not been used: whoever restores it removes it first.
type saved struct {
	// Fits is what the memory belongs to; see fits.
	Fits string
	// KeyFile has the key that the memory is sealed with; empty: there is none.
	// It is on a tmpfs, so a restart of the host leaves nothing to be opened.
	KeyFile string
	// GuestKey is the SHA-256 of the key of the life that was saved, which its
	// guestd shows when it calls the next.
	GuestKey []byte
}

// readSaved returns the record, if there is one whose memory can be opened.
func readSaved(b shim.Box) (saved, bool, error) {
	var s saved
	found, err := b.Load(savedRecord, &s)
	if err != nil || !found {
		return saved{}, false, err
	}
	if s.KeyFile != "" {
		if _, err := os.Stat(s.KeyFile); err != nil {
			return saved{}, false, nil //nolint:nilerr // It is as good as gone.
		}
	}
	return s, true, nil
}

// discardSaved removes what was saved; nothing of it can be used any more once
// the first of it is gone.
func discardSaved(b shim.Box) error {
	var s saved
	_, _ = b.Load(savedRecord, &s) // one that cannot be read goes too
	var errs []error
	for _, path := range []string{s.KeyFile, b.Path(savedRecord), b.Path(savedFile)} {
		if path == "" {
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// fits tells apart all that a memory depends on: what was booted, the size of
// the machine, and what its disks are like. A disk that was written since does
// not fit, or old memory would overwrite what is new.
func fits(b shim.Box, p plan, boot booted) (string, error) {
	p.Spec.Egress = sandbox.Egress{} // the policy is not in the memory
	files := []string{boot.Kernel, boot.Vmlinux, boot.Initrd}
	if p.Image != nil {
		files = append(files, p.Image.Root, b.Path(layerFile))
	}
	for _, d := range p.Disks {
		files = append(files, d.Source)
	}
	for _, d := range boot.Disks {
		files = append(files, d.path(b))
	}
	type file struct {
		Path string
		Size int64
		Time time.Time
	}
	var found []file
	for _, path := range files {
		if path == "" {
			continue
		}
		info, err := os.Stat(path)
		if err != nil {
			return "", err
		}
		found = append(found, file{path, info.Size(), info.ModTime().UTC()})
	}
	text, err := json.Marshal(struct {
		Plan  plan
		Boot  booted
		Files []file
	}{p, boot, found})
	sum := sha256.Sum256(text)
	return fmt.Sprintf("%x", sum), err
}

// takeSaved returns what the new life is to go on from, if anything was saved
// that fits. It is nobody else's after that, nor this life's a second time.
func (l *life) takeSaved() (key []byte, found bool) {
	s, found, err := readSaved(l.Box)
	if err != nil || !found {
		return nil, false
	}
	now, err := fits(l.Box, l.plan, l.boot)
	if err == nil && now != s.Fits {
		err = errors.New("the machine or its disks are not what they were")
	}
	if err == nil && s.KeyFile != "" {
		key, err = os.ReadFile(s.KeyFile)
	}
	if err == nil {
		err = l.consume(s)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "what was saved is not restored:", err)
		return nil, false
	}
	l.savedKey = s.GuestKey
	return key, true
}

// consume removes what makes a saved memory one that can be restored, for good.
func (l *life) consume(s saved) error {
	if s.KeyFile != "" {
		if err := os.Remove(s.KeyFile); err != nil {
			return err
		}
	}
	if err := os.Remove(l.Box.Path(savedRecord)); err != nil {
		return err
	}
	dir, err := os.Open(l.Box.Dir)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// knows reports whether whoever calls showed the key of this life, or of the
// one that it goes on from: guestd has one of them, and nobody else does.
func (l *life) knows(key []byte) bool {
	sum := sha256.Sum256(key)
	return subtle.ConstantTimeCompare(key, l.key) == 1 || subtle.ConstantTimeCompare(sum[:], l.savedKey) == 1
}

// errStopped is a machine that cannot be saved any more: it is being stopped.
var errStopped = errors.New("it is being stopped")

// hibernate saves the machine's memory and has supervise end the life. On an
// error the machine goes on as it was, unless it is being stopped: that leaves
// nothing to be saved, so it goes on to be asked to end.
func (l *life) hibernate(keyFile string) error {
	if len(l.plan.Shares) > 0 {
		return fmt.Errorf("%w: it has shares", ErrCannotSave)
	}
	if l.plan.Image.rosetta(l.boot.Arch) {
		return fmt.Errorf("%w: its image is for linux/%s, and Rosetta is a share", ErrCannotSave, rosettaGuest)
	}
	l.changing.Lock()
	defer l.changing.Unlock()
	if l.guest.Load() == nil || l.asleep {
		return errors.New("the machine is starting or ending")
	}
	ctx, cancel := l.untilStopped()
	defer cancel()
	wasPaused := l.paused
	if wasPaused { // what holds its guestd is an order, which it has to get
		if err := l.halt(false); err != nil {
			return err
		}
	}
	err := l.hold(ctx)
	if err == nil {
		if err = l.halt(true); err == nil {
			err = l.save(ctx, keyFile)
		}
		if err != nil {
			err = errors.Join(err, l.halt(false))
		}
	}
	if err != nil {
		_ = l.send(&guestv1.MachineOrder{Action: guestv1.MachineOrder_ACTION_GO_ON}) // it may have called again, and needs none
		if wasPaused {
			err = errors.Join(err, l.halt(true))
		}
		return err
	}
	l.asleep = true
	l.slept <- keyFile
	return nil
}

// untilStopped is a context that ends when the machine is to be stopped.
func (l *life) untilStopped() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(context.Background())
	over := make(chan struct{})
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		select {
		case <-l.stopped:
			cancel(errStopped)
		case <-over:
		}
	}()
	return ctx, func() {
		close(over)
		<-watching
		cancel(nil)
	}
}

// hold has guestd write what is on disks and send nothing more.
func (l *life) hold(ctx context.Context) error {
	select {
	case <-l.held: // of an attempt before
	default:
	}
	if err := l.send(&guestv1.MachineOrder{Action: guestv1.MachineOrder_ACTION_HOLD}); err != nil {
		return fmt.Errorf("tell the guest to be still: %w", err)
	}
	select {
	case <-l.held:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(holdLimit):
		return errors.New("the guest did not come to be still")
	}
}

// save writes the memory and the key that it is sealed with.
func (l *life) save(ctx context.Context, keyFile string) error {
	if err := discardSaved(l.Box); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, saveLimit)
	defer cancel()
	key, err := l.machine.Save(ctx, l.Box.Path(savedFile))
	if err == nil && len(key) > 0 {
		err = writeKey(keyFile, key)
	}
	if err != nil {
		return errors.Join(err, discardSaved(l.Box))
	}
	return nil
}

// writeKey writes a key to a file on a tmpfs, and nowhere else.
func writeKey(path string, key []byte) error {
	dir := ""
	if path != "" {
		dir = filepath.Dir(path)
	}
	if err := checkKeyDir(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(path, key, 0o600)
}

// sleep ends the life of a machine whose memory was saved: from when it is off
// nothing changes its disks, and then what was saved counts.
func (l *life) sleep(keyFile string) shim.End {
	l.kill()
	<-l.machine.Done()
	sum := sha256.Sum256(l.key)
	s := saved{GuestKey: sum[:]}
	if _, err := os.Stat(keyFile); err == nil {
		s.KeyFile = keyFile
	}
	var err error
	if s.Fits, err = fits(l.Box, l.plan, l.boot); err == nil {
		err = l.Box.Save(savedRecord, s)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "what was saved is lost:", err)
		_ = os.Remove(keyFile)
		_ = discardSaved(l.Box)
		return shim.End{ExitCode: 128 + int(sigTerm), Detail: "its memory was lost: " + printable(err.Error())}
	}
	return shim.End{Detail: "hibernated"}
}

// CheckHibernate implements sandbox.Hibernator.
func (d *Driver) CheckHibernate(spec sandbox.Spec) error {
	for _, m := range spec.Mounts {
		if m.Kind != sandbox.MountDisk {
			return fmt.Errorf("%s is a share, whose open files a memory that is restored cannot find again; keep data on a disk: %w", m.Target, sandbox.ErrUnsupported)
		}
	}
	if d.usesRosetta(spec) {
		return fmt.Errorf("%s is for linux/%s, and Rosetta is a share, whose open files a memory that is restored cannot find again: %w",
			spec.Image, rosettaGuest, sandbox.ErrUnsupported)
	}
	if err := checkKeyDir(d.cfg.KeyDir); err != nil {
		return fmt.Errorf("%w: %w", sandbox.ErrUnsupported, err)
	}
	return nil
}

// keyFile is where the key of a sandbox's memory is to be; empty: nowhere.
func (d *Driver) keyFile(id string) string {
	if d.cfg.KeyDir == "" {
		return ""
	}
	return filepath.Join(d.cfg.KeyDir, id)
}

// discard removes what was saved of a sandbox, also by a shim that was killed
// before it had written a record of it.
func (d *Driver) discard(b shim.Box) error {
	err := discardSaved(b)
	if name := d.keyFile(b.ID); name != "" {
		if removed := os.Remove(name); removed != nil && !errors.Is(removed, fs.ErrNotExist) {
			err = errors.Join(err, removed)
		}
	}
	return err
}

// Hibernate implements sandbox.Hibernator.
func (d *Driver) Hibernate(ctx context.Context, ref sandbox.Ref) error {
	return failed("hibernate", ref, d.hibernate(ctx, ref))
}

func (d *Driver) hibernate(ctx context.Context, ref sandbox.Ref) error {
	o := order{Op: opHibernate, KeyFile: d.keyFile(ref.ID)}
	if err := d.order(ctx, ref, o, nil); err != nil {
		return err
	}
	b, err := d.boxes().Box(ref.ID)
	if err != nil {
		return err
	}
	seen, err := b.Wait(ctx)
	if err != nil {
		return err
	}
	if _, found, err := readSaved(b); err != nil || !found {
		return errors.Join(err, fmt.Errorf("it ended, and was not saved: %s", seen.Detail))
	}
	return nil
}
