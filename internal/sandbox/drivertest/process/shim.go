package process

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// shim is the process that runs one life of one sandbox.
type shim struct {
	box      box
	life     life
	alive    *os.File // locked
	ending   *os.File // closing it, by ending, tells that this life is over
	requests *os.File
	log      *logWriter
	output   sync.WaitGroup // copying what the workload prints
	streams  []*os.File
	cmd      *exec.Cmd // guestd
}

// runShim is a shim's main program. Its one argument is the box's folder.
func runShim(args []string) int {
	// guestd is killed when the thread that started it ends, and that is to be
	// when this process does: prctl(2), PR_SET_PDEATHSIG.
	runtime.LockOSThread()
	// Handled and dropped rather than ignored, for that guestd would inherit.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM)
	syscall.CloseOnExec(mutexDescriptor)
	syscall.CloseOnExec(reportDescriptor)
	mutex := os.NewFile(mutexDescriptor, "mutex")
	report := os.NewFile(reportDescriptor, "report")

	s := &shim{box: box{dir: args[0]}}
	if err := s.begin(); err != nil {
		_, _ = report.WriteString(err.Error())
		return 1
	}
	mutex.Close()
	// Whoever is to read it may be gone.
	_, _ = report.WriteString(started)
	report.Close()
	if err := s.supervise(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// begin brings a new life to where its guestd runs.
func (s *shim) begin() error {
	var m made
	if found, err := s.box.load("made.json", &m); err != nil {
		return err
	} else if !found {
		return errors.New("it was deleted")
	}
	var err error
	if s.alive, err = os.OpenFile(s.box.path("alive"), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	// Waits for the shim of the life before, which has written its end and has
	// nothing left to do but to exit.
	lock := syscall.Flock_t{Type: syscall.F_WRLCK}
	if err := syscall.FcntlFlock(s.alive.Fd(), syscall.F_SETLKW, &lock); err != nil {
		return fmt.Errorf("lock %s: %w", s.alive.Name(), err)
	}
	if err := s.makeFIFOs(); err != nil {
		return err
	}
	if s.log, err = openLog(s.box); err != nil {
		return err
	}
	guest, secrets := filepath.Join(m.Dir, "guest"), s.box.path("secrets")
	for _, dir := range []string{guest, secrets} {
		if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o700)); err != nil {
			return err
		}
	}
	delay, err := startDelay(m.Spec.DriverOptions)
	if err != nil {
		return err
	}
	time.Sleep(delay)
	if err := becomeReaper(); err != nil {
		return err
	}
	if err := s.startGuestd(m, guest, secrets); err != nil {
		return err
	}
	s.life.StartedAt = time.Now()
	if s.life.Boot, err = bootID(); err != nil {
		return err
	}
	return s.box.save("life.json", s.life)
}

// makeFIFOs numbers this life and makes the FIFOs for it.
func (s *shim) makeFIFOs() error {
	var last life
	if _, err := s.box.load("life.json", &last); err != nil {
		return err
	}
	s.life.Number = last.Number + 1
	for number := last.Number; number <= s.life.Number; number++ {
		for _, name := range []string{s.box.lifeFIFO(number), s.box.stopFIFO(number)} {
			if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
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
	var err error
	if s.ending, err = open(s.box.lifeFIFO(s.life.Number)); err != nil {
		return err
	}
	s.requests, err = open(s.box.stopFIFO(s.life.Number))
	return err
}

func (s *shim) startGuestd(m made, guest, secrets string) error {
	folder, err := os.Open(guest)
	if err != nil {
		return err
	}
	defer folder.Close()
	if s.cmd, err = m.guestd(rootOf(s.box.dir), secrets, folder); err != nil {
		return err
	}
	var writers [2]*os.File
	for i := range writers {
		reader, writer, err := os.Pipe()
		if err != nil {
			return err
		}
		defer writer.Close()
		writers[i] = writer
		s.streams = append(s.streams, reader)
	}
	s.cmd.Stdout, s.cmd.Stderr = writers[0], writers[1]
	if err := s.cmd.Start(); err != nil {
		return err
	}
	for i, stream := range s.streams {
		s.output.Go(func() { s.log.copy(stream, i == 1) })
	}
	return nil
}

// supervise stops guestd when asked to, and returns when it has ended and that
// is written down.
func (s *shim) supervise() error {
	stops, ended := make(chan time.Duration), make(chan struct{})
	go func() {
		lines := bufio.NewScanner(s.requests)
		for lines.Scan() {
			if grace, err := strconv.ParseInt(strings.TrimSpace(lines.Text()), 10, 64); err == nil {
				stops <- time.Duration(grace)
			}
		}
	}()
	go func() {
		awaitExit(s.cmd.Process)
		close(ended)
	}()

	var deadline time.Time
	kill := time.NewTimer(0)
	<-kill.C
	for {
		select {
		case grace := <-stops:
			if grace <= 0 {
				_ = s.cmd.Process.Kill()
				continue
			}
			_ = s.cmd.Process.Signal(syscall.SIGTERM)
			if until := time.Now().Add(grace); deadline.IsZero() || until.Before(deadline) {
				deadline = until
				kill.Reset(grace)
			}
		case <-kill.C:
			_ = s.cmd.Process.Kill()
		case <-ended:
			return s.finish()
		}
	}
}

// finish writes down how guestd ended.
func (s *shim) finish() error {
	err := s.cmd.Wait()
	var status *exec.ExitError
	if err != nil && !errors.As(err, &status) {
		return err
	}
	finished := time.Now()
	// As in a container, nothing outlives the first process.
	if err := killDescendants(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	// Nobody is left who could hold the streams open.
	for _, stream := range s.streams {
		_ = stream.SetReadDeadline(finished.Add(time.Second))
	}
	s.output.Wait()
	if s.log.err != nil {
		fmt.Fprintln(os.Stderr, "write log:", s.log.err)
	}
	return s.box.save("end.json", end{Life: s.life, FinishedAt: finished, ExitCode: exitCode(s.cmd.ProcessState)})
}
