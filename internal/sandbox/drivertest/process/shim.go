package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/choiros/agent/internal/shim"
)

// life is one life of one sandbox, in its shim.
type life struct {
	*shim.Shim
	output  sync.WaitGroup // copying what the workload prints
	streams []*os.File
	cmd     *exec.Cmd // guestd

	console  *console
	requests chan request // to pause and to resume

	// Of the goroutine that supervises.
	paused bool
	halted []int // whom pausing has halted
}

// runShim is a shim's main program. Its one argument is the box's folder.
func runShim(args []string) int {
	// guestd is killed when the thread that started it ends, and that is to be
	// when this process does: prctl(2), PR_SET_PDEATHSIG.
	runtime.LockOSThread()
	s, err := shim.Enter(args[0])
	if err != nil {
		return 1
	}
	l := &life{Shim: s, console: newConsole(), requests: make(chan request)}
	if err := l.begin(); err != nil {
		s.Fail(err)
		return 1
	}
	if err := s.Started(); err != nil {
		return 1
	}
	if err := l.supervise(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// begin brings a new life to where its guestd runs.
func (l *life) begin() error {
	var m made
	if found, err := l.Box.Made(&m); err != nil {
		return err
	} else if !found {
		return errors.New("it was deleted")
	}
	guest, secrets := filepath.Join(m.Dir, "guest"), l.Box.Path("secrets")
	for _, dir := range []string{guest, secrets} {
		if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o700)); err != nil {
			return err
		}
	}
	if err := os.Remove(l.Box.Path(refusedRecord)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	delay, err := startDelay(m.Spec.DriverOptions)
	if err != nil {
		return err
	}
	time.Sleep(delay)
	if err := l.listen(); err != nil {
		return err
	}
	if err := becomeReaper(); err != nil {
		return err
	}
	return l.startGuestd(m, guest, secrets)
}

func (l *life) startGuestd(m made, guest, secrets string) error {
	folder, err := os.Open(guest)
	if err != nil {
		return err
	}
	defer folder.Close()
	if l.cmd, err = m.guestd(secrets, folder); err != nil {
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
		l.streams = append(l.streams, reader)
	}
	l.cmd.Stdout, l.cmd.Stderr = writers[0], writers[1]
	if err := l.cmd.Start(); err != nil {
		return err
	}
	for i, stream := range l.streams {
		l.output.Go(func() { l.Log.Copy(stream, i == 1) })
	}
	return nil
}

// supervise stops guestd when asked to, and returns when it has ended and that
// is written down.
func (l *life) supervise() error {
	ended := make(chan struct{})
	go func() {
		awaitExit(l.cmd.Process)
		close(ended)
	}()
	var deadline time.Time
	kill := time.NewTimer(0)
	<-kill.C
	for {
		select {
		case grace := <-l.Stops:
			if grace <= 0 {
				_ = l.cmd.Process.Kill()
				continue
			}
			if err := l.resume(); err != nil {
				return err
			}
			_ = l.cmd.Process.Signal(syscall.SIGTERM)
			if until := time.Now().Add(grace); deadline.IsZero() || until.Before(deadline) {
				deadline = until
				kill.Reset(grace)
			}
		case r := <-l.requests:
			r.done <- l.carryOut(r.order)
		case <-kill.C:
			_ = l.cmd.Process.Kill()
		case <-ended:
			return l.finish()
		}
	}
}

// finish writes down how guestd ended.
func (l *life) finish() error {
	err := l.cmd.Wait()
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
	for _, stream := range l.streams {
		_ = stream.SetReadDeadline(finished.Add(time.Second))
	}
	l.output.Wait()
	return l.Finish(shim.End{FinishedAt: finished, ExitCode: exitCode(l.cmd.ProcessState)})
}
