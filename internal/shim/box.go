package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// Boxes are the sandboxes of one owner.
type Boxes struct {
	// Root is a folder; made when first needed.
	Root string
}

// Box is one sandbox. Its folder holds, beside whatever else its driver and
// its shim put there:
//
//	made.json   what was asked for; the sandbox exists while this file does
//	life.json   the present or last life
//	end.json    how a life ended, the last that did
//	alive       locked by the shim for as long as that lives
//	life-N      FIFO whose writing end life N's shim holds: readers see its end
//	stop-N      FIFO from which life N's shim reads requests to stop
//	reserve     room for a record, should the disk be full
//	log         what the workload printed
//	shim.log    what the shim itself printed: nothing, unless it has a fault
type Box struct {
	ID  string
	Dir string
	// mutex is the file that is locked during mutations. It is not in Dir,
	// which comes and goes with them.
	mutex string
}

// The records of a box.
const (
	madeRecord = "made.json"
	lifeRecord = "life.json"
	endRecord  = "end.json"
	aliveLock  = "alive"
	faultsFile = "shim.log"
	// reserveFile is given up for a record when there is no room for it: that
	// a disk is full is when there is something to tell.
	reserveFile  = "reserve"
	reserveBytes = 16 << 10
)

// Life is what a shim writes once its sandbox runs.
type Life struct {
	Number    int
	StartedAt time.Time
	Boot      string // the host's boot id
	Paused    bool   `json:",omitempty"`
	// Progress is what it is busy with before it can be spoken to, for people.
	Progress string `json:",omitempty"`
}

// End is how a life ended.
type End struct {
	FinishedAt time.Time
	ExitCode   int
	OOMKilled  bool
	Detail     string
}

// endOf is the record of an End.
type endOf struct {
	Life Life
	End
}

// Box returns where a sandbox is, or would be.
func (b Boxes) Box(id string) (Box, error) {
	if err := sandbox.ValidateName("id", id); err != nil {
		return Box{}, err
	}
	return Box{
		ID:    id,
		Dir:   filepath.Join(b.Root, "boxes", id),
		mutex: filepath.Join(b.Root, "locks", id),
	}, nil
}

// List returns the ids of all boxes, half-made ones included. Sorted.
func (b Boxes) List(ctx context.Context) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(filepath.Join(b.Root, "boxes"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	ids := make([]string, 0, len(entries)) // sorted, since ReadDir is
	for _, entry := range entries {
		ids = append(ids, entry.Name())
	}
	return ids, nil
}

// Path is that of a file in the box.
func (b Box) Path(name string) string { return filepath.Join(b.Dir, name) }

func (b Box) lifeFIFO(number int) string { return b.Path("life-" + strconv.Itoa(number)) }

func (b Box) stopFIFO(number int) string { return b.Path("stop-" + strconv.Itoa(number)) }

// Save writes a record, all or nothing. Only who holds the mutex, or the shim
// after that, may: so one name for the unfinished file is enough.
func (b Box) Save(name string, record any) error {
	data, err := json.Marshal(record)
	if err != nil {
		return err
	}
	err = b.replace(name, data)
	if errors.Is(err, syscall.ENOSPC) && os.Remove(b.Path(reserveFile)) == nil {
		err = b.replace(name, data)
		_ = b.reserve() // which may do now: the record before has gone
	}
	return err
}

func (b Box) replace(name string, data []byte) error {
	unfinished := b.Path(name + ".new")
	err := writeDurably(unfinished, data)
	if err == nil {
		err = os.Rename(unfinished, b.Path(name))
	}
	if err != nil {
		_ = os.Remove(unfinished) // or the next one overwrites it
	}
	return err
}

// reserve takes the room that Save gives up.
func (b Box) reserve() error {
	err := os.WriteFile(b.Path(reserveFile), make([]byte, reserveBytes), 0o600)
	if err != nil {
		_ = os.Remove(b.Path(reserveFile)) // of a part of it there is no use
	}
	return err
}

// DiskProblem says of an error whether the disk is full: then what it returns
// wraps sandbox.ErrExhausted.
func DiskProblem(err error) error {
	for _, full := range []error{syscall.ENOSPC, syscall.EDQUOT} {
		if errors.Is(err, full) && !errors.Is(err, sandbox.ErrExhausted) {
			return fmt.Errorf("%w: %w", sandbox.ErrExhausted, err)
		}
	}
	return err
}

func writeDurably(path string, data []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	return errors.Join(err, file.Sync(), file.Close())
}

// Load reads a record, and reports whether there is one.
func (b Box) Load(name string, record any) (bool, error) {
	data, err := os.ReadFile(b.Path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := json.Unmarshal(data, record); err != nil {
		return false, fmt.Errorf("%w: %s: %w", sandbox.ErrCorrupt, b.Path(name), err)
	}
	return true, nil
}

// Made reads what Make was given, and reports whether the sandbox exists.
func (b Box) Made(record any) (bool, error) { return b.Load(madeRecord, record) }
