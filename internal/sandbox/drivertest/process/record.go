package process

import (
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

// box is where a sandbox's artefacts are. Its folder holds:
//
//	made.json   what was asked for; the sandbox exists while this file does
//	life.json   the present or last life
//	end.json    how a life ended, the last that did
//	alive       locked by the shim for as long as that lives
//	life-N      FIFO whose writing end life N's shim holds: readers see its end
//	stop-N      FIFO from which life N's shim reads requests to stop
//	log         what the workload printed
//	secrets     where guestd looks for a tmpfs, and finds none
//	shim.log    what the shim itself printed: nothing, unless it has a fault
type box struct {
	id  string
	dir string
	// mutex is the file that is locked during mutations. It is not in dir,
	// which comes and goes with them.
	mutex string
}

// made is what Create writes.
type made struct {
	Dir  string // of the Ref
	Spec sandbox.Spec
}

// life is what a shim writes once its workload runs.
type life struct {
	Number    int
	StartedAt time.Time
	Boot      string // the host's boot id
}

// end is what a shim writes when its workload has ended.
type end struct {
	Life       life
	FinishedAt time.Time
	ExitCode   int
	Detail     string
}

func (b box) path(name string) string { return filepath.Join(b.dir, name) }

func (b box) lifeFIFO(number int) string { return b.path("life-" + strconv.Itoa(number)) }

func (b box) stopFIFO(number int) string { return b.path("stop-" + strconv.Itoa(number)) }

// save writes a record, all or nothing.
func (b box) save(name string, record any) error {
	data, err := json.Marshal(record)
	if err != nil {
		return err
	}
	// Only who holds the mutex, or the shim after that, writes a record, so
	// one name for the unfinished file is enough.
	unfinished := b.path(name + ".new")
	if err := os.WriteFile(unfinished, data, 0o600); err != nil {
		return err
	}
	return os.Rename(unfinished, b.path(name))
}

// load reads a record, and reports whether there is one.
func (b box) load(name string, record any) (bool, error) {
	data, err := os.ReadFile(b.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := json.Unmarshal(data, record); err != nil {
		return false, fmt.Errorf("%w: %s: %w", sandbox.ErrCorrupt, b.path(name), err)
	}
	return true, nil
}

// alive reports whether a shim lives, and which process the kernel says it is.
//
// The lock is one of fcntl(2)'s record locks: they belong to a process, end
// with it, are not inherited, and can be asked for without being taken.
func (b box) alive() (pid int, alive bool, err error) {
	f, err := os.Open(b.path("alive"))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	defer f.Close()
	lock := syscall.Flock_t{Type: syscall.F_WRLCK}
	if err := syscall.FcntlFlock(f.Fd(), syscall.F_GETLK, &lock); err != nil {
		return 0, false, fmt.Errorf("query %s: %w", f.Name(), err)
	}
	return int(lock.Pid), lock.Type != syscall.F_UNLCK, nil
}

// observe returns what is true of a sandbox and, if it runs, its life.
func (b box) observe() (sandbox.Observation, life, error) {
	none := func(s sandbox.State) (sandbox.Observation, life, error) {
		return sandbox.Observation{State: s}, life{}, nil
	}
	fail := func(err error) (sandbox.Observation, life, error) {
		return sandbox.Observation{}, life{}, err
	}
	if _, err := os.Stat(b.path("made.json")); errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(b.dir); errors.Is(err, fs.ErrNotExist) {
			return none(sandbox.StateAbsent)
		}
		return none(sandbox.StateBroken)
	} else if err != nil {
		return fail(err)
	}
	var present life
	if found, err := b.load("life.json", &present); err != nil {
		return fail(err)
	} else if !found {
		return none(sandbox.StateCreated)
	}
	if o, ended, err := b.ended(present); ended || err != nil {
		return o, life{}, err
	}
	if _, alive, err := b.alive(); err != nil {
		return fail(err)
	} else if alive {
		return sandbox.Observation{State: sandbox.StateRunning, StartedAt: present.StartedAt}, present, nil
	}
	// Between the two looks it may have written its end and gone.
	if o, ended, err := b.ended(present); ended || err != nil {
		return o, life{}, err
	}
	o := sandbox.Observation{
		State:     sandbox.StateExited,
		StartedAt: present.StartedAt,
		ExitCode:  128 + int(syscall.SIGKILL),
		Detail:    "the supervisor was killed",
	}
	if boot, err := bootID(); err == nil && boot != present.Boot {
		o.Detail = "the host was restarted"
	}
	if info, err := os.Stat(b.path("life.json")); err == nil {
		o.FinishedAt = info.ModTime() // no earlier than that is all that is known
	}
	return o, life{}, nil
}

// ended returns how a life, or a later one, ended, if it has.
func (b box) ended(l life) (sandbox.Observation, bool, error) {
	var e end
	if found, err := b.load("end.json", &e); err != nil || !found || e.Life.Number < l.Number {
		return sandbox.Observation{}, false, err
	}
	return sandbox.Observation{
		State:      sandbox.StateExited,
		StartedAt:  e.Life.StartedAt,
		FinishedAt: e.FinishedAt,
		ExitCode:   e.ExitCode,
		Detail:     e.Detail,
	}, true, nil
}

// bury writes the end of a life that was found to have ended, if its shim was
// not able to. The next life begins with a lock held, and until it has a
// record of its own it must not be taken for this one.
func (b box) bury(o sandbox.Observation) error {
	var last life
	if found, err := b.load("life.json", &last); err != nil || !found {
		return err
	}
	if _, ended, err := b.ended(last); err != nil || ended {
		return err
	}
	return b.save("end.json", end{Life: last, FinishedAt: o.FinishedAt, ExitCode: o.ExitCode, Detail: o.Detail})
}
