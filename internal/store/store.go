// Package store keeps what was asked for: one record per sandbox, the answers
// given to identified requests, and the host's own intent. Everything is JSON
// in files that a person can read with cat, written so that after a crash or
// a power cut each file holds its old content or its new one.
//
// It holds intent only, never what was observed of a running sandbox, and
// never a secret's value. It does not interpret records: what an intent means
// is package manager's business.
//
// Layout of a state directory (0700):
//
//	lock               held by the agent that owns the directory
//	owner              a random id, made with the directory
//	host.json          the host's intent (draining)
//	answers.jsonl      answers to identified requests, appended
//	records/NAME.json  one sandbox each
//	sandboxes/NAME/    the driver's directory of a sandbox (sandbox.Ref.Dir)
//	quarantine/        records that could not be read
package store

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// ErrLocked says that another process owns the state directory.
var ErrLocked = errors.New("in use by another agent")

var ownerPattern = regexp.MustCompile(`^[0-9a-f]{8}$`)

// Store is an open state directory. Its methods are safe for concurrent use;
// writes of one record are the caller's to order.
type Store struct {
	dir     string
	owner   string
	lock    *os.File
	answers *answerLog

	mu          sync.Mutex
	quarantined []Quarantined
}

// Quarantined is a record that could not be read and was set aside.
type Quarantined struct {
	Name   string // the sandbox's, as far as the file's name tells
	Path   string // where it is now
	Reason string
}

// Open opens, or makes, a state directory and locks it for this process. If
// another process holds it the error wraps ErrLocked.
func Open(dir string) (*Store, error) {
	s := &Store{dir: dir}
	if err := s.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("open state directory %s: %w", dir, err), s.Close())
	}
	return s, nil
}

func (s *Store) open() error {
	for _, sub := range []string{"", "records", "sandboxes", "quarantine"} {
		if err := os.MkdirAll(filepath.Join(s.dir, sub), 0o700); err != nil {
			return err
		}
	}
	info, err := os.Stat(s.dir)
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("its mode is %v; others may not see it: try: chmod 0700 %s", info.Mode().Perm(), s.dir)
	}
	if s.lock, err = lockFile(filepath.Join(s.dir, "lock")); err != nil {
		return err
	}
	if s.owner, err = s.loadOwner(); err != nil {
		return err
	}
	s.removeTemporaries()
	s.answers, err = openAnswers(filepath.Join(s.dir, "answers.jsonl"), time.Now())
	return err
}

// Close releases the directory.
func (s *Store) Close() error {
	var errs []error
	if s.answers != nil {
		errs = append(errs, s.answers.close())
	}
	if s.lock != nil {
		// By itself closing releases the lock only once no child that is just
		// being forked has the file open any more; see flock(2).
		errs = append(errs, syscall.Flock(int(s.lock.Fd()), syscall.LOCK_UN), s.lock.Close())
	}
	return errors.Join(errs...)
}

// Owner is the random id of this state directory, 8 lower-case hex digits:
// drivers mark their artefacts with it.
func (s *Store) Owner() string { return s.owner }

// Dir is the state directory.
func (s *Store) Dir() string { return s.dir }

// SandboxDir is a sandbox's own directory, for sandbox.Ref.Dir.
func (s *Store) SandboxDir(name string) string { return filepath.Join(s.dir, "sandboxes", name) }

func (s *Store) recordPath(name string) string {
	return filepath.Join(s.dir, "records", name+".json")
}

// loadOwner reads the id, or makes it. The file is written atomically, so one
// that is there and wrong was changed by somebody: guessing a new id would
// orphan every sandbox, so it is an error.
func (s *Store) loadOwner() (string, error) {
	path := filepath.Join(s.dir, "owner")
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		var id [4]byte
		_, _ = rand.Read(id[:]) // never fails, see crypto/rand
		owner := hex.EncodeToString(id[:])
		return owner, writeFile(path, []byte(owner+"\n"))
	}
	if err != nil {
		return "", err
	}
	owner := strings.TrimSpace(string(data))
	if !ownerPattern.MatchString(owner) {
		return "", fmt.Errorf("%s does not hold 8 hex digits", path)
	}
	return owner, nil
}

// removeTemporaries removes what a crash left between write and rename.
func (s *Store) removeTemporaries() {
	for _, pattern := range []string{"*" + temporarySuffix, "records/*" + temporarySuffix} {
		paths, _ := filepath.Glob(filepath.Join(s.dir, pattern)) // errs on bad patterns only
		for _, path := range paths {
			_ = os.Remove(path)
		}
	}
}

// Load reads every record, in the order of their names. One that cannot be
// read is moved to quarantine and reported; its sandbox's directory stays.
func (s *Store) Load() ([]Record, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, "records"))
	if err != nil {
		return nil, fmt.Errorf("read records: %w", err)
	}
	var records []Record
	for _, entry := range entries {
		name, isRecord := strings.CutSuffix(entry.Name(), ".json")
		if !isRecord {
			continue
		}
		rec, err := readRecord(s.recordPath(name), name)
		if err != nil {
			if err := s.quarantine(name, err); err != nil {
				return nil, fmt.Errorf("set aside the record of %s: %w", name, err)
			}
			continue
		}
		records = append(records, rec)
	}
	return records, s.loadQuarantine()
}

func readRecord(path, name string) (Record, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Record{}, err
	}
	return decodeRecord(data, name)
}

// quarantine moves a record aside, keeping its reason beside it.
func (s *Store) quarantine(name string, reason error) error {
	base := filepath.Join(s.dir, "quarantine", fmt.Sprintf("%s.%d", name, time.Now().UnixNano()))
	if err := os.WriteFile(base+".reason", []byte(reason.Error()+"\n"), 0o600); err != nil {
		return err
	}
	return os.Rename(s.recordPath(name), base+".json")
}

// loadQuarantine lists what is set aside now, of earlier starts too: their
// sandboxes may still run, and nobody else knows of them.
func (s *Store) loadQuarantine() error {
	paths, err := filepath.Glob(filepath.Join(s.dir, "quarantine", "*.json"))
	if err != nil {
		return err
	}
	found := make([]Quarantined, 0, len(paths))
	for _, path := range paths {
		reason, _ := os.ReadFile(strings.TrimSuffix(path, ".json") + ".reason")
		name, _, _ := strings.Cut(filepath.Base(path), ".")
		found = append(found, Quarantined{Name: name, Path: path, Reason: strings.TrimSpace(string(reason))})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.quarantined = found
	return nil
}

// Quarantined returns the records that are set aside, as of Load.
func (s *Store) Quarantined() []Quarantined {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.quarantined)
}

// Put writes a record durably: once it returns nil the record survives
// anything. On an error the old record stands.
func (s *Store) Put(rec Record) error {
	rec.Format = recordFormat
	data, err := json.MarshalIndent(rec, "", "  ")
	if err != nil {
		return fmt.Errorf("record of %s: %w", rec.Name, err)
	}
	if err := os.MkdirAll(s.SandboxDir(rec.Name), 0o700); err != nil {
		return fmt.Errorf("record of %s: %w", rec.Name, err)
	}
	if err := writeFile(s.recordPath(rec.Name), append(data, '\n')); err != nil {
		return fmt.Errorf("record of %s: %w", rec.Name, err)
	}
	return nil
}

// Remove removes a sandbox's directory and then, durably, its record. Of one
// that is absent it succeeds.
func (s *Store) Remove(name string) error {
	if err := os.RemoveAll(s.SandboxDir(name)); err != nil {
		return fmt.Errorf("directory of %s: %w", name, err)
	}
	if err := os.Remove(s.recordPath(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("record of %s: %w", name, err)
	}
	return syncDir(filepath.Join(s.dir, "records"))
}

// StrayDirs returns the names of sandbox directories that have no record and
// are not of a quarantined one.
func (s *Store) StrayDirs() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, "sandboxes"))
	if err != nil {
		return nil, err
	}
	kept := map[string]bool{}
	for _, q := range s.Quarantined() {
		kept[q.Name] = true
	}
	var stray []string
	for _, entry := range entries {
		_, err := os.Stat(s.recordPath(entry.Name()))
		if errors.Is(err, fs.ErrNotExist) && !kept[entry.Name()] {
			stray = append(stray, entry.Name())
		}
	}
	return stray, nil
}

// RemoveStray removes the directory of a sandbox that has no record.
func (s *Store) RemoveStray(name string) error { return os.RemoveAll(s.SandboxDir(name)) }

// Host is the host's own intent.
type Host struct {
	Draining bool `json:"draining"`
}

// Host returns the host's intent; the zero Host if none was ever put.
func (s *Store) Host() (Host, error) {
	data, err := os.ReadFile(filepath.Join(s.dir, "host.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return Host{}, nil
	}
	if err != nil {
		return Host{}, err
	}
	var host Host
	if err := json.Unmarshal(data, &host); err != nil {
		return Host{}, fmt.Errorf("%s: %w", filepath.Join(s.dir, "host.json"), err)
	}
	return host, nil
}

// PutHost writes the host's intent durably.
func (s *Store) PutHost(host Host) error {
	data, err := json.Marshal(host)
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(s.dir, "host.json"), append(data, '\n'))
}
