package vz

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/choiros/agent/internal/vm"
)

// HostError says that this Mac, or this program, cannot run machines, or not
// such a one.
type HostError struct {
	Problem string
	// Cure is what mends it, for people.
	Cure string
	// Err is what the framework said, if it was asked; may be nil.
	Err error
}

func (e *HostError) Error() string {
	text := e.Problem
	if e.Err != nil {
		text += ": " + e.Err.Error()
	}
	if e.Cure != "" {
		text += "; " + e.Cure
	}
	return text
}

func (e *HostError) Unwrap() error { return e.Err }

// Error domains and codes of the framework's: VZError.h.
const (
	vzDomain               = "VZErrorDomain"
	vzInvalidConfiguration = 2
	vzInvalidState         = 3
	vzLimitExceeded        = 6
	vzOutOfDiskSpace       = 8

	posixDomain        = "NSPOSIXErrorDomain"
	darwinENODEV       = 19 // of Darwin's sys/errno.h, wherever this runs
	darwinECONNRESET   = 54
	darwinECONNREFUSED = 61
)

// Errors that the framework's are explained with.
var (
	errStarted    = errors.New("the machine was started before")
	errNotRunning = errors.New("the machine does not run")
)

// hasCode reports whether err is one of the framework's with that code.
func hasCode(err error, domain string, codes ...int) bool {
	ns, ok := errors.AsType[*nsError](err)
	return ok && ns.Domain == domain && slices.Contains(codes, ns.Code)
}

// said shortens what the framework said to what is for people. Its own text has
// the user info in it, over several lines.
func said(err error) error {
	if ns, ok := errors.AsType[*nsError](err); ok {
		return &frameworkError{ns}
	}
	return err
}

// frameworkError is an *nsError with a text of one line.
type frameworkError struct{ ns *nsError }

func (e *frameworkError) Error() string {
	text := strings.Join(strings.Fields(e.ns.LocalizedDescription), " ")
	if text == "" {
		text = "no reason given"
	}
	return fmt.Sprintf("%s (%s %d)", text, e.ns.Domain, e.ns.Code)
}

func (e *frameworkError) Unwrap() error { return e.ns }

// explainConfiguration says why a configuration is refused. The framework has
// one code for whatever is wrong, and a text in the user's language. What it
// refuses for the Mac's or this program's sake it refuses of any machine.
func explainConfiguration(f framework, err error) error {
	if hasCode(err, vzDomain, vzInvalidConfiguration) {
		if host := checkHost(f); host != nil {
			return host
		}
	}
	return fmt.Errorf("macOS refuses such a machine: %w", said(err))
}

// explainStart says why a machine did not start.
func explainStart(c vm.Config, err error) error {
	if locked := checkLocks(c); locked != nil {
		return errors.Join(locked, said(err))
	}
	switch {
	case hasCode(err, vzDomain, vzLimitExceeded):
		return &HostError{Problem: "this Mac runs as many virtual machines as it can", Cure: "stop one of them", Err: said(err)}
	case hasCode(err, vzDomain, vzOutOfDiskSpace):
		return &HostError{Problem: "there is no space left on this Mac's disk", Cure: "make room there", Err: said(err)}
	}
	return said(err)
}

// checkLocks is an error if a writable disk's image is in use. The framework
// locks the image of a machine that runs, in another process, and so does
// hdiutil; a machine that is started with it all the same may be refused, or
// hang: github.com/cirruslabs/tart/issues/323.
func checkLocks(c vm.Config) error {
	for _, disk := range c.Disks {
		if disk.ReadOnly {
			continue
		}
		path := inDir(c, disk.Path)
		if locked, err := isLocked(path); err == nil && locked {
			return fmt.Errorf("disk %s: %s is in use by another machine, or attached to this Mac; stop that, or detach it with hdiutil", disk.Serial, path)
		}
	}
	return nil
}

// isLocked tries whether flock(2) has a file locked, and leaves it unlocked: a
// lock that stayed would be one that the framework meets. Darwin has the locks
// of flock and of fcntl(2) in one list, so that this finds either there.
func isLocked(path string) (bool, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	return false, err
}
