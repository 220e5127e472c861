package shim

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Shim is the process that runs one life of one sandbox, as that process sees
// itself.
type Shim struct {
	Box Box
	// Log is where what the workload prints goes.
	Log *Log
	// Stops are the requests to stop, with the grace that each gives; zero:
	// at once. They come again and again.
	Stops <-chan time.Duration

	mu      sync.Mutex
	started bool // life is on record
	life    Life

	alive  *os.File // locked
	ending *os.File // closing it, by ending, tells that this life is over
	mutex  *os.File
	report *os.File
}

// Enter makes this process, which Mutex.Start has started for the box at dir,
// the shim of that box's next life. It does nothing of that twice. On an error
// it has told whoever started it; the process is to exit.
func Enter(dir string) (*Shim, error) {
	// Handled and dropped rather than ignored, for that children would inherit.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM)
	syscall.CloseOnExec(mutexDescriptor)
	syscall.CloseOnExec(reportDescriptor)
	s := &Shim{
		Box:   Box{Dir: dir},
		mutex: os.NewFile(mutexDescriptor, "mutex"), report: os.NewFile(reportDescriptor, "report"),
	}
	if err := s.enter(); err != nil {
		s.Fail(err)
		return nil, err
	}
	return s, nil
}

func (s *Shim) enter() error {
	var err error
	if err = leaveService(filepath.Base(s.Box.Dir)); err != nil {
		// It runs all the same, until its service is restarted.
		fmt.Fprintln(os.Stderr, err)
	}
	if s.alive, err = os.OpenFile(s.Box.Path(aliveLock), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	// Waits for the shim of the life before, which has written its end and has
	// nothing left to do but to exit.
	lock := syscall.Flock_t{Type: syscall.F_WRLCK}
	if err := syscall.FcntlFlock(s.alive.Fd(), syscall.F_SETLKW, &lock); err != nil {
		return fmt.Errorf("lock %s: %w", s.alive.Name(), err)
	}
	if err := s.Box.reserve(); err != nil {
		return err
	}
	requests, err := s.makeFIFOs()
	if err != nil {
		return err
	}
	s.Stops = readStops(requests)
	s.Log, err = openLog(s.Box)
	return err
}

// makeFIFOs numbers this life and makes the FIFOs for it.
func (s *Shim) makeFIFOs() (requests *os.File, err error) {
	var last Life
	if _, err := s.Box.Load(lifeRecord, &last); err != nil {
		return nil, err
	}
	s.life.Number = last.Number + 1
	for number := last.Number; number <= s.life.Number; number++ {
		for _, name := range []string{s.Box.lifeFIFO(number), s.Box.stopFIFO(number)} {
			if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
		}
	}
	open := func(name string) (*os.File, error) {
		if err := syscall.Mkfifo(name, 0o600); err != nil {
			return nil, fmt.Errorf("make %s: %w", name, err)
		}
		// For both directions, so that there is always an other end: fifo(7).
		return os.OpenFile(name, os.O_RDWR|syscall.O_NONBLOCK, 0)
	}
	if s.ending, err = open(s.Box.lifeFIFO(s.life.Number)); err != nil {
		return nil, err
	}
	return open(s.Box.stopFIFO(s.life.Number))
}

// readStops reads requests for as long as this process lives.
func readStops(requests *os.File) <-chan time.Duration {
	stops := make(chan time.Duration)
	go func() {
		lines := bufio.NewScanner(requests)
		for lines.Scan() {
			if grace, err := strconv.ParseInt(strings.TrimSpace(lines.Text()), 10, 64); err == nil {
				stops <- time.Duration(grace)
			}
		}
	}()
	return stops
}

// Started says that the sandbox runs, to whoever waits for that and in the
// record. On an error the sandbox is to be ended, as if it had never run.
func (s *Shim) Started() error {
	s.mu.Lock()
	s.life.StartedAt = time.Now()
	var err error
	if s.life.Boot, err = BootID(); err == nil {
		err = s.Box.Save(lifeRecord, s.life)
	}
	s.started = err == nil
	s.mu.Unlock()
	if err != nil {
		s.Fail(err)
		return err
	}
	s.mutex.Close()
	// Whoever is to read it may be gone.
	_, _ = s.report.WriteString(started)
	s.report.Close()
	return nil
}

// SetPaused writes down whether the sandbox, which runs, is halted.
func (s *Shim) SetPaused(paused bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.life.Paused = paused
	return s.Box.Save(lifeRecord, s.life)
}

// SetProgress writes down what the sandbox is busy with before it can be spoken
// to; empty: it can be.
func (s *Shim) SetProgress(what string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.life.Progress == what {
		return nil
	}
	s.life.Progress = what
	if !s.started {
		return nil
	}
	return s.Box.Save(lifeRecord, s.life)
}

// Fail says that the sandbox does not come to run, and why.
func (s *Shim) Fail(err error) {
	_, _ = s.report.WriteString(encodeReport(DiskProblem(err)))
	s.report.Close()
	s.mutex.Close()
}

// Finish writes down how the life ended; the process is to exit next. Its
// FinishedAt is now, unless it says another time.
func (s *Shim) Finish(end End) error {
	// Nothing else needs s once the record is being written, and the garbage
	// collector would close what it holds: a life that seems over, and left no word.
	defer runtime.KeepAlive(s)
	if end.FinishedAt.IsZero() {
		end.FinishedAt = time.Now()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return errors.Join(s.Log.fault(), s.Box.Save(endRecord, endOf{s.life, end}))
}

// Killed is the end of a sandbox that was killed.
func Killed(detail string) End {
	return End{ExitCode: 128 + int(syscall.SIGKILL), Detail: detail}
}
