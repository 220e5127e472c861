package drivertest

import (
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// Harness ties the suite to one driver. Its functions are called on the
// goroutine of the test they are given, and may call t.Fatal. A backend that is
// missing is for whoever calls Run to skip, or to fail, for.
type Harness struct {
	// Open opens the driver, always on the same backend and for the same
	// owner, who has no sandboxes when Run begins. The suite closes what it
	// returns if that is an io.Closer.
	Open func(t *testing.T) sandbox.Driver

	// OpenAs opens the driver on the same backend for another owner, whose
	// name is of the form [a-z0-9]{1,16}. nil: there are no owners to tell
	// apart on the way to this driver.
	OpenAs func(t *testing.T, owner string) sandbox.Driver

	// Spec says how a workload is run on this driver. It is valid, sets Driver,
	// Image or Machine, and whatever the workload asks for.
	Spec func(t *testing.T, w Workload) sandbox.Spec

	// GuestDir is the folder inside where the sockets of the guest channel are
	// to be: DIR of the workload guest-echo. Needed but for Without.Dial.
	GuestDir string

	// Root is a folder in which the suite makes those that it mounts, and
	// those of Refs. Its path should be short, for sockets have little room.
	// Empty: one of the system's temporary folders.
	Root string

	// Kill runs one verb in a process of its own, kills that process with
	// SIGKILL once it was at the verb for the given time, and returns when it
	// is gone; it reports whether the verb had returned without an error
	// before. VerbProcess makes one. nil: there is no such process, and the
	// tests of it are left out.
	Kill func(t *testing.T, call VerbCall, after time.Duration) (done bool)

	// Leaks reports with t.Error what is left on the host of a sandbox that
	// was deleted, other than what List shows. nil: that cannot be told.
	Leaks func(t *testing.T, ref sandbox.Ref)

	// Patience is how long a step may take before it counts as stuck. It never
	// makes a test take longer that passes. Zero: a minute.
	Patience time.Duration

	// Samples is in how many cases tests do what they do in many: for a driver
	// that takes seconds to start. At least 2; zero: in all of them.
	Samples int

	// Without names what is not there on the way to this driver.
	Without Without
}

// Without switches off the tests of what has no equivalent where a driver is
// reached through something else. For a driver itself it is zero.
type Without struct {
	// Dial: the guest channel is not carried. Needs Configure.
	Dial bool
	// Configure: Start is over once the workload runs, for what is on the way
	// has configured guestd.
	Configure bool
}

// Workload is what a sandbox of the suite runs: the project's program
// test/workload, which every harness has to have inside at hand.
type Workload struct {
	// Args are its arguments: a subcommand and what that takes.
	Args []string
	// Mounts go into the spec as they are.
	Mounts []sandbox.Mount
	// Env goes into the spec as it is.
	Env map[string]string
}

// Run runs the suite. The tests within are parallel but for those that measure.
func Run(t *testing.T, h Harness) {
	s := newSuite(t, h)
	s.wantNothing(t, "before the suite; it needs an owner of its own")
	for _, test := range s.serial() {
		t.Run(test.name, func(t *testing.T) { test.run(t, s) })
	}
	// A group, so that there is a moment after all of them.
	t.Run("parallel", func(t *testing.T) {
		for _, test := range s.parallel(t) {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				test.run(t, s)
			})
		}
	})
	s.wantNothing(t, "after the suite")
}

type test struct {
	name string
	run  func(t *testing.T, s *suite)
}

func (s *suite) serial() []test {
	return []test{
		{"ManyWaitsCostLittle", manyWaitsCostLittle},
	}
}

func (s *suite) parallel(t *testing.T) []test {
	tests := []test{
		{"Probe", probe},
		{"Lifecycle", lifecycle},
		{"EveryVerbTwice", everyVerbTwice},
		{"CreateKeepsWhatExists", createKeepsWhatExists},
		{"Absent", absent},
		{"AbsentWithoutFolder", absentWithoutFolder},
		{"RecreateHasNoTraceOfTheOld", recreateHasNoTrace},
		{"Names", names},
		{"SimilarNamesAreApart", similarNames},
		{"ArgumentsAndEnvironmentArriveAsTheyAre", argumentsArrive},
		{"DeleteOfRunning", deleteOfRunning},
		{"DeleteLeavesMountedFoldersAlone", deleteLeavesMounts},
		{"ListFindsEveryState", listFindsEveryState},

		{"AdoptsRunning", adoptsRunning},
		{"AdoptsOneThatDiedMeanwhile", adoptsDead},
		{"ExitCodes", exitCodes},
		{"WorkloadThatEndsAtOnceIsNoError", endsAtOnce},

		{"StopAsksFirst", stopAsksFirst},
		{"StopKillsAfterGrace", stopKillsAfterGrace},
		{"ZeroGraceKillsAtOnce", zeroGraceKills},
		{"StopOfStopped", stopOfStopped},
		{"StopCancelled", stopCancelled},

		{"WaitOfCreated", waitOfCreated},
		{"WaitOfExited", waitOfExited},
		{"WaitOfAbsent", waitOfAbsent},
		{"WaitReturnsWhenItEnds", waitReturnsAtEnd},
		{"WaitOfDeleted", waitOfDeleted},
		{"WaitCancelled", waitCancelled},
		{"WaitsOnSeveral", waitsOnSeveral},

		{"EveryVerbReturnsWhenCancelled", everyVerbCancelled},
		{"CreateCancelled", createCancelled},
		{"StartCancelled", startCancelled},
		{"DeleteCancelled", deleteCancelled},

		{"SameVerbAtOnce", sameVerbAtOnce},
		{"DifferentSandboxesAtOnce", differentSandboxesAtOnce},
		{"AnyVerbsAtOnce", anyVerbsAtOnce},
		{"ShortStopOvertakesLong", shortStopOvertakes},
		{"DeleteOvertakesStop", deleteOvertakesStop},
	}
	if !s.Without.Dial {
		tests = append(tests, dialTests()...)
	}
	if !s.Without.Configure {
		tests = append(tests, guestTests()...)
	}
	if s.OpenAs != nil {
		tests = append(tests, test{"OwnersAreApart", ownersAreApart})
	}
	if s.Kill != nil {
		tests = append(tests, killTests()...)
	}
	return append(tests, s.optional(t)...)
}

// optional returns the tests of what this driver can do beyond the basics.
func (s *suite) optional(t *testing.T) []test {
	d := s.open(t)
	defer s.close(t, d)
	var tests []test
	if _, ok := d.(sandbox.Validator); ok {
		tests = append(tests, validatorTests()...)
	}
	if _, ok := d.(sandbox.LogSource); ok {
		tests = append(tests, logTests()...)
	}
	if _, ok := d.(sandbox.Resizer); ok {
		tests = append(tests, test{"Resize", resize})
	}
	if _, ok := d.(sandbox.Pauser); ok {
		tests = append(tests, pauseTests()...)
	}
	if _, ok := d.(sandbox.Hibernator); ok {
		tests = append(tests, hibernateTests()...)
	}
	if _, ok := d.(sandbox.Console); ok {
		tests = append(tests, consoleTests()...)
	}
	if _, ok := d.(sandbox.EgressPolicer); ok {
		tests = append(tests, egressTests()...)
	}
	return tests
}
