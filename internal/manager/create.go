package manager

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/store"
)

// Deadlines of what is asked of a driver. A driver that does not answer in
// this time is taken not to answer at all.
const (
	inspectDeadline = 20 * time.Second
	createDeadline  = 2 * time.Minute
	startDeadline   = 2 * time.Minute
	deleteDeadline  = 2 * time.Minute
	// stopDeadline comes on top of the grace period.
	stopDeadline = time.Minute
	// rollbackGrace is for workloads whose boot failed.
	rollbackGrace = 2 * time.Second
	// DefaultGrace is between SIGTERM and SIGKILL where a caller gives none.
	DefaultGrace = 10 * time.Second
	// MaxGrace is the longest.
	MaxGrace = 10 * time.Minute
)

// CreateRequest is what Create makes a sandbox of.
type CreateRequest struct {
	Name   string
	Spec   sandbox.Spec
	Labels map[string]string
	// Start boots it as well.
	Start bool
	// SecretValues are for secrets whose source is inline:NAME, by that NAME.
	SecretValues map[string][]byte
	// ValidateOnly checks everything and makes nothing.
	ValidateOnly bool
	Request      Request
}

// Create records a sandbox and makes its artefacts. With Start set it boots it
// too and returns once it is ready; if the boot fails the sandbox stays.
func (m *Manager) Create(ctx context.Context, req CreateRequest) (*Sandbox, error) {
	rec, err := m.draft(ctx, req)
	if err != nil {
		return nil, err
	}
	if req.ValidateOnly {
		s := preview(rec)
		s.Exposures = m.look(ctx, rec.Spec.Mounts)()
		return s, nil
	}
	if req.Start {
		// Refused now rather than once half of it is done.
		if err := errors.Join(m.mayBoot(req.Name), m.roomForOne()); err != nil {
			return nil, err
		}
	}
	e, replay, err := m.reserve(ctx, req)
	if err != nil {
		return nil, err
	}
	if !replay && ctx.Err() != nil {
		// Left before anything was begun. Looked at only now that the name is
		// taken: a deletion that this caller asks for next finds either
		// nothing, or what to wait for.
		m.forget(e)
		e.unlock()
		return nil, ctx.Err()
	}
	e.keepInline(req.SecretValues)
	if !replay {
		err = m.detach(ctx, func(ctx context.Context) error {
			err := m.create(ctx, e, rec)
			e.unlock()
			if err == nil && req.Start {
				// Begun here, so that it is also if the caller has left.
				m.fly(e, func(ctx context.Context) error { return m.boot(ctx, e, byRequest) })
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	if req.Start {
		return m.Start(ctx, req.Name)
	}
	return m.Sandbox(ctx, req.Name)
}

// preview is a sandbox that was only checked.
func preview(rec store.Record) *Sandbox {
	return &Sandbox{
		Name: rec.Name, Spec: rec.Spec, Labels: rec.Labels, Resources: rec.Resources,
		Desired: Desired(rec.Desired), CreatedAt: rec.CreatedAt, UpdatedAt: rec.UpdatedAt, Phase: PhaseUnknown,
	}
}

// draft checks all of a request that can be checked beforehand, and returns
// the record that would be made.
func (m *Manager) draft(ctx context.Context, req CreateRequest) (store.Record, error) {
	spec := req.Spec.Clone()
	if spec.Driver == "" {
		spec.Driver = m.cfg.DefaultDriver
	}
	if err := sandbox.ValidateName("name", req.Name); err != nil {
		return store.Record{}, err
	}
	if err := sandbox.ValidateLabels("labels", req.Labels); err != nil {
		return store.Record{}, err
	}
	if err := spec.Validate(); err != nil {
		return store.Record{}, err
	}
	drv, err := m.driver(spec.Driver)
	if err != nil {
		return store.Record{}, err
	}
	if err := checkEgress(drv, spec); err != nil {
		return store.Record{}, err
	}
	if err := m.checkIdle(spec); err != nil {
		return store.Record{}, err
	}
	if err := m.checkSecrets(spec); err != nil {
		return store.Record{}, err
	}
	if err := checkInline(spec, req.SecretValues); err != nil {
		return store.Record{}, err
	}
	resources, err := m.resources(spec)
	if err != nil {
		return store.Record{}, err
	}
	if err := m.checkMounts(spec.Mounts); err != nil {
		return store.Record{}, err
	}
	if err := m.askDriver(ctx, drv, spec, resources); err != nil {
		return store.Record{}, err
	}
	now := time.Now()
	rec := store.Record{
		Name: req.Name, UID: newUID(), Spec: spec, Labels: maps.Clone(req.Labels),
		Desired: store.DesiredStopped, Pending: store.PendingCreate, Resources: resources,
		Created: req.Request, CreatedAt: now, UpdatedAt: now,
	}
	if req.Start {
		rec.Desired = store.DesiredRunning
	}
	return rec, nil
}

// askDriver lets the driver refuse a spec.
func (m *Manager) askDriver(ctx context.Context, drv sandbox.Driver, spec sandbox.Spec, resources sandbox.Resources) error {
	validator, ok := drv.(sandbox.Validator)
	if !ok {
		switch {
		case spec.DriverOptions != nil:
			return sandbox.Invalidf("spec.driver_options", "driver %s has no options", spec.Driver)
		case spec.Machine != "":
			return sandbox.Unsupportedf("spec.machine", "driver %s boots none; give spec.image", spec.Driver)
		}
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, inspectDeadline)
	defer cancel()
	spec.Resources = resources
	return deadlined(ctx, validator.Validate(ctx, spec))
}

// resources are those in force for a spec: its own, then its class's.
func (m *Manager) resources(spec sandbox.Spec) (sandbox.Resources, error) {
	if spec.MachineClass == "" {
		return spec.Resources, nil
	}
	class, ok := m.cfg.Classes[spec.MachineClass]
	if !ok {
		return sandbox.Resources{}, sandbox.Invalidf("spec.machine_class", "%q is not in this agent's table of classes", spec.MachineClass)
	}
	if class.Driver != "" && class.Driver != spec.Driver {
		return sandbox.Resources{}, sandbox.Invalidf("spec.machine_class", "%q is for driver %s, not %s",
			spec.MachineClass, class.Driver, spec.Driver)
	}
	return spec.Resources.Or(class.Resources), nil
}

// checkMounts refuses mounts whose source is not a folder that may be shown, or
// a disk's image that may be used or made.
func (m *Manager) checkMounts(mounts []sandbox.Mount) error {
	for i, mount := range mounts {
		field := fmt.Sprintf("spec.mounts[%d].source", i)
		find := realFolder
		if mount.Kind == sandbox.MountDisk {
			find = realImage
		}
		real, err := find(field, mount.Source)
		if err != nil {
			return err
		}
		if state := m.store.Dir(); within(real, state) || within(state, real) {
			return sandbox.Invalidf(field, "%q would show the agent's own state to the sandbox", mount.Source)
		}
		if !m.mayMount(real) {
			return sandbox.Invalidf(field, "%q is outside the folders that this agent may mount (%s)",
				mount.Source, strings.Join(m.cfg.MountRoots, ", "))
		}
	}
	return nil
}

// realFolder is a folder without symbolic links.
func realFolder(field, source string) (string, error) {
	real, err := filepath.EvalSymlinks(source)
	var info os.FileInfo
	if err == nil {
		info, err = os.Stat(real)
	}
	if err != nil {
		return "", sandbox.Invalidf(field, "%q cannot be used: %v", source, errors.Unwrap(err))
	}
	if !info.IsDir() {
		return "", sandbox.Invalidf(field, "%q is not a folder", source)
	}
	return real, nil
}

// realImage is a disk's image without symbolic links: a file, or one that is to
// be made in a folder that is there.
func realImage(field, source string) (string, error) {
	info, err := os.Lstat(source)
	if errors.Is(err, os.ErrNotExist) {
		folder, err := realFolder(field, filepath.Dir(source))
		return filepath.Join(folder, filepath.Base(source)), err
	}
	real := ""
	if err == nil {
		real, err = filepath.EvalSymlinks(source)
	}
	if err == nil {
		info, err = os.Stat(real)
	}
	if err != nil {
		return "", sandbox.Invalidf(field, "%q cannot be used: %v", source, errors.Unwrap(err))
	}
	if !info.Mode().IsRegular() {
		return "", sandbox.Invalidf(field, "%q is not a file; name that of a disk's image", source)
	}
	return real, nil
}

func (m *Manager) mayMount(real string) bool {
	for _, root := range m.cfg.MountRoots {
		if resolved, err := filepath.EvalSymlinks(root); err == nil && within(real, resolved) {
			return true
		}
	}
	return len(m.cfg.MountRoots) == 0
}

// within reports whether path is dir or below it; both in simplest form.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

// reserve puts a new entry, locked, in the place of its name. If the name is
// taken by a sandbox that this very request made before, replay is true.
func (m *Manager) reserve(ctx context.Context, req CreateRequest) (e *entry, replay bool, err error) {
	for {
		m.mu.Lock()
		old := m.entries[req.Name]
		if old == nil {
			e = newEntry(req.Name)
			m.entries[req.Name] = e
			m.mu.Unlock()
			return e, false, nil
		}
		m.mu.Unlock()
		snap := old.snap.Load()
		stays := snap != nil && snap.Desired != DesiredDeleted
		if stays && (req.Request.ID == "" || snap.created.ID != req.Request.ID) {
			return nil, false, fmt.Errorf("sandbox %s: %w", req.Name, sandbox.ErrExists)
		}
		// What is being done to it decides whether the name is free.
		err = old.lock(ctx)
		if errors.Is(err, sandbox.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, false, err
		}
		made, deleting := old.rec.Created, old.rec.Desired == store.DesiredDeleted
		old.unlock()
		switch {
		case deleting:
			return nil, false, fmt.Errorf("sandbox %s, which is being deleted: %w", req.Name, sandbox.ErrExists)
		case made.Fingerprint != req.Request.Fingerprint:
			return nil, false, reused(req.Request)
		}
		return old, true, nil
	}
}

// create writes the intent and makes the artefacts, or leaves nothing.
func (m *Manager) create(ctx context.Context, e *entry, rec store.Record) error {
	e.touch(time.Now())
	defer close(e.reconciled)
	var err error
	if rec.Leases, err = m.reservePorts(e.name, rec.Spec.Ports, specPort); err != nil {
		m.forget(e)
		return err
	}
	e.rec = rec
	if rec.Desired != store.DesiredRunning { // else the boot looks
		m.noteExposures(e, m.look(ctx, rec.Spec.Mounts)())
	}
	m.step("create:intent")
	if err := m.put(e, nil, enter(PhaseCreating, "", "")); err != nil {
		m.forward.ReleaseAll(e.name)
		m.forget(e)
		return errors.Join(fmt.Errorf("create %s: %w", e.name, err), m.store.Remove(e.name))
	}
	m.log.Info("creating", "sandbox", e.name, "driver", rec.Spec.Driver)
	if err := m.makeArtefacts(ctx, e); err != nil {
		m.log.Warn("create failed", "sandbox", e.name, "err", err)
		return errors.Join(err, m.rollback(ctx, e))
	}
	e.made = true
	m.settlePorts(e, rec.Leases)
	if rec.Desired == store.DesiredRunning {
		// The boot's own intent follows at once and implies this.
		m.publish(e, enter(PhaseStarting, "", ""))
		return nil
	}
	m.step("create:done")
	return m.put(e, func(r *store.Record) { r.Pending = store.PendingNone }, enter(PhaseStopped, "", ""))
}

func (m *Manager) makeArtefacts(ctx context.Context, e *entry) error {
	drv, err := m.driver(e.rec.Spec.Driver)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, createDeadline)
	defer cancel()
	spec := e.rec.Spec.Clone()
	spec.Resources = e.rec.Resources
	m.step("create:artefacts")
	return deadlined(ctx, drv.Create(ctx, m.ref(e.name), spec))
}

// rollback removes a sandbox whose creation failed. What cannot be removed now
// is left as a deletion, to be finished later.
func (m *Manager) rollback(ctx context.Context, e *entry) error {
	err := m.put(e, func(r *store.Record) {
		r.Desired, r.Pending, r.Grace = store.DesiredDeleted, store.PendingNone, 0
	}, enter(PhaseDeleting, "CREATE_FAILED", ""))
	if err == nil {
		err = m.finishDelete(ctx, e)
	}
	if err != nil && m.life.Err() == nil {
		m.retryLater(e)
		return fmt.Errorf("clean up after it, to be tried again: %w", err)
	}
	return nil
}

// forget takes an entry out of the map for good. It needs the operation lock.
func (m *Manager) forget(e *entry) {
	e.gone = true
	e.forgetSecrets()
	m.mu.Lock()
	if m.entries[e.name] == e {
		delete(m.entries, e.name)
	}
	m.mu.Unlock()
	if e.snap.Load() != nil {
		m.feed.remove(e)
	}
}

// deadlined adds what a bare context error leaves out: whose deadline it was.
func deadlined(ctx context.Context, err error) error {
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) && errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: the driver did not answer: %w", sandbox.ErrTimeout, err)
	}
	return err
}

// newUID returns a random UUID, version 4; see RFC 9562.
func newUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	text := hex.EncodeToString(b[:])
	return strings.Join([]string{text[:8], text[8:12], text[12:16], text[16:20], text[20:]}, "-")
}
