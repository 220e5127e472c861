package process_test

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/choiros/agent/internal/guest"
	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

// wrongVariable makes TestDriver run the suite on a driver with a fault.
const wrongVariable = "DRIVERTEST_WRONG"

// faulty is a driver that does as it should, but for the methods it is given
// others for.
type faulty struct {
	*process.Driver
	create   func(ctx context.Context, ref sandbox.Ref, spec sandbox.Spec) error
	start    func(ctx context.Context, ref sandbox.Ref) error
	stop     func(ctx context.Context, ref sandbox.Ref, grace time.Duration) error
	delete   func(ctx context.Context, ref sandbox.Ref) error
	inspect  func(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error)
	wait     func(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error)
	list     func(ctx context.Context) ([]string, error)
	dial     func(ctx context.Context, ref sandbox.Ref, port uint32) (net.Conn, error)
	validate func(ctx context.Context, spec sandbox.Spec) error
	resize   func(ctx context.Context, ref sandbox.Ref, limits sandbox.Resources) error
	logs     func(ctx context.Context, ref sandbox.Ref, opts sandbox.LogOptions, yield func(sandbox.LogEntry) error) error
	pause    func(ctx context.Context, ref sandbox.Ref) error
	resume   func(ctx context.Context, ref sandbox.Ref) error
	console  func(ctx context.Context, ref sandbox.Ref) (net.Conn, error)
}

func (f *faulty) Create(ctx context.Context, ref sandbox.Ref, spec sandbox.Spec) error {
	return f.create(ctx, ref, spec)
}
func (f *faulty) Start(ctx context.Context, ref sandbox.Ref) error { return f.start(ctx, ref) }
func (f *faulty) Stop(ctx context.Context, ref sandbox.Ref, grace time.Duration) error {
	return f.stop(ctx, ref, grace)
}
func (f *faulty) Delete(ctx context.Context, ref sandbox.Ref) error { return f.delete(ctx, ref) }
func (f *faulty) Inspect(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
	return f.inspect(ctx, ref)
}

func (f *faulty) Wait(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
	return f.wait(ctx, ref)
}
func (f *faulty) List(ctx context.Context) ([]string, error) { return f.list(ctx) }
func (f *faulty) Dial(ctx context.Context, ref sandbox.Ref, port uint32) (net.Conn, error) {
	return f.dial(ctx, ref, port)
}

func (f *faulty) Validate(ctx context.Context, spec sandbox.Spec) error { return f.validate(ctx, spec) }

func (f *faulty) Logs(ctx context.Context, ref sandbox.Ref, opts sandbox.LogOptions, yield func(sandbox.LogEntry) error) error {
	return f.logs(ctx, ref, opts, yield)
}

func (f *faulty) Resize(ctx context.Context, ref sandbox.Ref, limits sandbox.Resources) error {
	return f.resize(ctx, ref, limits)
}

// flawless returns a faulty driver without a fault. It says that it can also
// resize, which for want of limits is soon done.
func flawless(root, owner string) *faulty {
	d := process.New(process.Config{Root: root, Owner: owner})
	resize := func(ctx context.Context, ref sandbox.Ref, _ sandbox.Resources) error {
		if o, err := d.Inspect(ctx, ref); err != nil || o.State == sandbox.StateAbsent {
			return errors.Join(err, sandbox.ErrNotFound)
		}
		return nil
	}
	return &faulty{
		Driver: d, resize: resize,
		create: d.Create, start: d.Start, stop: d.Stop, delete: d.Delete,
		inspect: d.Inspect, wait: d.Wait, list: d.List, dial: d.Dial,
		validate: d.Validate, logs: d.Logs,
		pause: d.Pause, resume: d.Resume, console: d.Console,
	}
}

// fault is a way to be wrong, and what the suite says of it.
type fault struct {
	name string
	test string // that fails
	says string // nothing, if all is well
	// plant puts the fault into a driver that was just opened at root. made
	// is for what a fault has to know from other drivers.
	plant func(f *faulty, root string, made *sync.Map)
}

func faults() []fault {
	return slices.Concat(faultsOfState(), faultsOfDelete(), faultsOfTime(), faultsOfGuests(), faultsOfAbilities(), faultsOfPausing(), faultsOfConsoles())
}

// faultsOfState are of what is done twice, or to nothing.
func faultsOfState() []fault {
	return []fault{
		{"forgets when opened anew", "AdoptsRunning", "State:absent", func(f *faulty, _ string, _ *sync.Map) {
			known := map[string]bool{}
			f.create = func(ctx context.Context, ref sandbox.Ref, spec sandbox.Spec) error {
				known[ref.ID] = true
				return f.Driver.Create(ctx, ref, spec)
			}
			f.inspect = func(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
				if !known[ref.ID] {
					return sandbox.Observation{State: sandbox.StateAbsent}, nil
				}
				return f.Driver.Inspect(ctx, ref)
			}
		}},
		{"Create replaces", "CreateKeepsWhatExists", "changed what the first had made", func(f *faulty, _ string, _ *sync.Map) {
			f.create = func(ctx context.Context, ref sandbox.Ref, spec sandbox.Spec) error {
				return errors.Join(f.Driver.Delete(ctx, ref), f.Driver.Create(ctx, ref, spec))
			}
		}},
		{"Start restarts", "EveryVerbTwice", "want no change", func(f *faulty, _ string, _ *sync.Map) {
			f.start = func(ctx context.Context, ref sandbox.Ref) error {
				return errors.Join(f.Driver.Stop(ctx, ref, 0), f.Driver.Start(ctx, ref))
			}
		}},
		{"Start of an absent one succeeds", "Absent", "Start of an absent one", func(f *faulty, _ string, _ *sync.Map) {
			f.start = func(ctx context.Context, ref sandbox.Ref) error {
				if err := f.Driver.Start(ctx, ref); !errors.Is(err, sandbox.ErrNotFound) {
					return err
				}
				return nil
			}
		}},
		{"Stop of an absent one fails", "Absent", "Stop of an absent one", func(f *faulty, _ string, _ *sync.Map) {
			f.stop = func(ctx context.Context, ref sandbox.Ref, grace time.Duration) error {
				if o, err := f.Driver.Inspect(ctx, ref); err != nil || o.State == sandbox.StateAbsent {
					return errors.Join(err, sandbox.ErrNotFound)
				}
				return f.Driver.Stop(ctx, ref, grace)
			}
		}},
	}
}

// faultsOfDelete are of what is left, and what is listed.
func faultsOfDelete() []fault {
	return []fault{
		{"Delete only stops", "RecreateHasNoTraceOfTheOld", "want absent", func(f *faulty, _ string, _ *sync.Map) {
			f.delete = func(ctx context.Context, ref sandbox.Ref) error { return f.Driver.Stop(ctx, ref, 0) }
		}},
		{"Delete leaves a file", "Lifecycle", "left in the folder", func(f *faulty, _ string, _ *sync.Map) {
			f.delete = func(ctx context.Context, ref sandbox.Ref) error {
				err := f.Driver.Delete(ctx, ref)
				return errors.Join(err, os.WriteFile(filepath.Join(ref.Dir, "file"), nil, 0o600))
			}
		}},
		{"Delete empties mounted folders", "DeleteLeavesMountedFoldersAlone", "after Delete have", func(f *faulty, _ string, made *sync.Map) {
			f.create = func(ctx context.Context, ref sandbox.Ref, spec sandbox.Spec) error {
				made.Store(ref.ID, spec)
				return f.Driver.Create(ctx, ref, spec)
			}
			f.delete = func(ctx context.Context, ref sandbox.Ref) error {
				if spec, found := made.LoadAndDelete(ref.ID); found {
					_ = os.RemoveAll(spec.(sandbox.Spec).Mounts[0].Source)
				}
				return f.Driver.Delete(ctx, ref)
			}
		}},
		{"List shows others'", "OwnersAreApart", "List finds", func(f *faulty, root string, _ *sync.Map) {
			f.list = func(ctx context.Context) ([]string, error) {
				ours, err1 := f.Driver.List(ctx)
				theirs, err2 := process.New(process.Config{Root: root, Owner: "other"}).List(ctx)
				all := slices.Concat(ours, theirs)
				slices.Sort(all)
				return slices.Compact(all), errors.Join(err1, err2)
			}
		}},
		{"List leaves out what has stopped", "ListFindsEveryState", "which is exited", func(f *faulty, _ string, _ *sync.Map) {
			f.list = func(ctx context.Context) ([]string, error) {
				ids, err := f.Driver.List(ctx)
				return slices.DeleteFunc(ids, func(id string) bool {
					o, _ := f.Driver.Inspect(ctx, sandbox.Ref{ID: id})
					return o.State == sandbox.StateExited
				}), err
			}
		}},
		{"List is not sorted", "ListFindsEveryState", "not sorted", func(f *faulty, _ string, _ *sync.Map) {
			f.list = func(ctx context.Context) ([]string, error) {
				ids, err := f.Driver.List(ctx)
				slices.Reverse(ids)
				return ids, err
			}
		}},
		{"Wait loses the exit code", "ExitCodes", "want exited with 255", func(f *faulty, _ string, _ *sync.Map) {
			f.wait = func(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
				o, err := f.Driver.Wait(ctx, ref)
				o.ExitCode = 0
				return o, err
			}
		}},
	}
}

// faultsOfTime are of what takes too long, or too short.
func faultsOfTime() []fault {
	return []fault{
		{"the sandbox ends with Start's context", "AdoptsRunning", "now is {State:exited", func(f *faulty, _ string, _ *sync.Map) {
			f.start = func(ctx context.Context, ref sandbox.Ref) error {
				context.AfterFunc(ctx, func() { _ = f.Driver.Stop(context.WithoutCancel(ctx), ref, 0) })
				return f.Driver.Start(ctx, ref)
			}
		}},
		{"Stop gives no grace", "StopAsksFirst", "exit code 137, want 0", func(f *faulty, _ string, _ *sync.Map) {
			f.stop = func(ctx context.Context, ref sandbox.Ref, _ time.Duration) error { return f.Driver.Stop(ctx, ref, 0) }
		}},
		{"Stop never kills", "StopKillsAfterGrace", "Stop: ", func(f *faulty, _ string, _ *sync.Map) {
			f.stop = func(ctx context.Context, ref sandbox.Ref, grace time.Duration) error {
				return f.Driver.Stop(ctx, ref, grace+time.Hour)
			}
		}},
		{"Stop asks in vain before it kills at once", "ZeroGraceKillsAtOnce", "exit code 0, want 137", func(f *faulty, _ string, _ *sync.Map) {
			f.stop = func(ctx context.Context, ref sandbox.Ref, grace time.Duration) error {
				return f.Driver.Stop(ctx, ref, max(grace, 100*time.Millisecond))
			}
		}},
		{"Wait takes no notice of its context", "WaitCancelled", "did not return", func(f *faulty, _ string, _ *sync.Map) {
			f.wait = func(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
				return f.Driver.Wait(context.WithoutCancel(ctx), ref)
			}
		}},
		{"Wait takes a thread", "ManyWaitsCostLittle", "threads", func(f *faulty, _ string, _ *sync.Map) {
			f.wait = func(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
				for {
					o, err := f.Driver.Inspect(ctx, ref)
					if err != nil || o.State != sandbox.StateRunning {
						return o, err
					}
					time.Sleep(20 * time.Millisecond)
				}
			}
		}},
		{"Start returns before it runs", "Lifecycle", "it did not, and now is {State:created", func(f *faulty, _ string, _ *sync.Map) {
			f.start = func(ctx context.Context, ref sandbox.Ref) error {
				if _, err := f.Driver.Inspect(ctx, ref); err != nil {
					return err
				}
				time.AfterFunc(500*time.Millisecond, func() { _ = f.Driver.Start(context.WithoutCancel(ctx), ref) })
				return nil
			}
		}},
		{"Dial waits for what does not run", "DialOfWhatDoesNotRun", "Dial took", func(f *faulty, _ string, _ *sync.Map) {
			f.dial = func(ctx context.Context, ref sandbox.Ref, port uint32) (net.Conn, error) {
				conn, err := f.Driver.Dial(ctx, ref, port)
				if err != nil {
					<-ctx.Done()
				}
				return conn, err
			}
		}},
	}
}

// faultsOfGuests are of guestd and the way to it.
func faultsOfGuests() []fault {
	return []fault{
		{"Dial mistakes the port", "GuestAnswers", "not within", func(f *faulty, _ string, _ *sync.Map) {
			f.dial = func(ctx context.Context, ref sandbox.Ref, port uint32) (net.Conn, error) {
				return f.Driver.Dial(ctx, ref, port+1)
			}
		}},
		{"Dial reaches nobody once opened anew", "GuestAnswers", "not within", func(f *faulty, _ string, _ *sync.Map) {
			started := false
			f.start = func(ctx context.Context, ref sandbox.Ref) error {
				started = true
				return f.Driver.Start(ctx, ref)
			}
			f.dial = func(ctx context.Context, ref sandbox.Ref, port uint32) (net.Conn, error) {
				if !started {
					return nil, sandbox.ErrUnavailable
				}
				return f.Driver.Dial(ctx, ref, port)
			}
		}},
		{"Start configures guestd", "GuestAnswers", "phase 2, want 1", func(f *faulty, _ string, _ *sync.Map) {
			f.start = func(ctx context.Context, ref sandbox.Ref) error {
				err := f.Driver.Start(ctx, ref)
				for err == nil && configure(ctx, f.Driver, ref) != nil {
					time.Sleep(time.Millisecond)
				}
				return err
			}
		}},
		{"a guestd that waits is not asked to stop", "StopOfUnconfigured", "exit code 137, want 143", func(f *faulty, _ string, _ *sync.Map) {
			f.stop = func(ctx context.Context, ref sandbox.Ref, grace time.Duration) error {
				info, err := guestOf(f.Driver, ref).Hello(ctx)
				if err == nil && info.Phase == guest.PhaseWaiting {
					grace = 0
				}
				return f.Driver.Stop(ctx, ref, grace)
			}
		}},
	}
}

// faultsOfAbilities are of the optional interfaces.
func faultsOfAbilities() []fault {
	return []fault{
		{"any option is accepted", "ValidateNamesTheField", "spec.driver_options", func(f *faulty, _ string, _ *sync.Map) {
			f.validate = func(ctx context.Context, spec sandbox.Spec) error {
				spec.DriverOptions = nil
				return f.Driver.Validate(ctx, spec)
			}
		}},
		{"options are found wrong by Validate only", "CreateOfInvalidLeavesNothing", "spec.driver_options succeeded", func(f *faulty, _ string, _ *sync.Map) {
			f.create = func(ctx context.Context, ref sandbox.Ref, spec sandbox.Spec) error {
				if !json.Valid(spec.DriverOptions) || strings.Contains(string(spec.DriverOptions), "no_driver") {
					spec.DriverOptions = nil
				}
				return f.Driver.Create(ctx, ref, spec)
			}
		}},
		{"none", "Resize", "", func(*faulty, string, *sync.Map) {}},
		{"Resize of an absent one succeeds", "Resize", "Resize of an absent one", func(f *faulty, _ string, _ *sync.Map) {
			f.resize = func(context.Context, sandbox.Ref, sandbox.Resources) error { return nil }
		}},
		{"logs mix streams", "LogsKeepStreamsApart", "stdout", func(f *faulty, _ string, _ *sync.Map) {
			f.logs = func(ctx context.Context, ref sandbox.Ref, opts sandbox.LogOptions, yield func(sandbox.LogEntry) error) error {
				opts.Stdout, opts.Stderr = true, true
				return f.Driver.Logs(ctx, ref, opts, func(e sandbox.LogEntry) error {
					e.Stderr = false
					return yield(e)
				})
			}
		}},
		{"logs follow for ever", "LogsFollowOfExited", "Logs: ", func(f *faulty, _ string, _ *sync.Map) {
			f.logs = func(ctx context.Context, ref sandbox.Ref, opts sandbox.LogOptions, yield func(sandbox.LogEntry) error) error {
				err := f.Driver.Logs(ctx, ref, opts, yield)
				if opts.Follow && err == nil {
					<-ctx.Done()
					err = ctx.Err()
				}
				return err
			}
		}},
		{"long lines come in one", "LogsOfLongLinesComeInParts", "at most", func(f *faulty, _ string, _ *sync.Map) {
			f.logs = func(ctx context.Context, ref sandbox.Ref, opts sandbox.LogOptions, yield func(sandbox.LogEntry) error) error {
				var whole []byte
				return f.Driver.Logs(ctx, ref, opts, func(e sandbox.LogEntry) error {
					if whole = append(whole, e.Data...); whole[len(whole)-1] != '\n' {
						return nil
					}
					e.Data, whole = whole, nil
					return yield(e)
				})
			}
		}},
		{"tail is one short", "LogsTail", "the last 7 lines", func(f *faulty, _ string, _ *sync.Map) {
			f.logs = func(ctx context.Context, ref sandbox.Ref, opts sandbox.LogOptions, yield func(sandbox.LogEntry) error) error {
				if opts.Tail > 1 {
					opts.Tail--
				}
				return f.Driver.Logs(ctx, ref, opts, yield)
			}
		}},
	}
}

// opener returns how the driver under test is opened.
func opener(t *testing.T, root string) func(owner string) sandbox.Driver {
	t.Helper()
	name, found := os.LookupEnv(wrongVariable)
	if !found {
		return func(owner string) sandbox.Driver { return process.NewPoliced(process.Config{Root: root, Owner: owner}) }
	}
	i := slices.IndexFunc(faults(), func(f fault) bool { return f.name == name })
	if i < 0 {
		t.Fatalf("there is no fault %q", name)
	}
	made := &sync.Map{}
	return func(owner string) sandbox.Driver {
		f := flawless(root, owner)
		faults()[i].plant(f, root, made)
		return f
	}
}

// TestSuiteFindsFaults runs the suite on drivers that are wrong, and wants it
// to say so. That it says nothing of one that is right is TestDriver.
func TestSuiteFindsFaults(t *testing.T) {
	t.Parallel()
	for _, f := range faults() {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			dir, err := os.MkdirTemp("", "pr") // short, for sockets in it
			if err != nil {
				t.Fatal(err)
			}
			// Its root is apart from where the suite has its folders: a driver that
			// is wrong may use both when it should not any more.
			root, temp := filepath.Join(dir, "root"), filepath.Join(dir, "temp")
			if err := os.Mkdir(temp, 0o700); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				sweep(t, root)
				if err := os.RemoveAll(dir); err != nil {
					t.Error(err)
				}
			})
			run := "^TestDriver$/^parallel$/^" + f.test + "$"
			if f.test == "ManyWaitsCostLittle" {
				run = "^TestDriver$/^" + f.test + "$"
			}
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", run, "-test.v", "-test.timeout", "1m")
			cmd.Env = append(os.Environ(), wrongVariable+"="+f.name, rootVariable+"="+root, "TMPDIR="+temp)
			cmd.WaitDelay = time.Second
			out, err := cmd.CombinedOutput()
			if _, failed := errors.AsType[*exec.ExitError](err); failed != (f.says != "") {
				t.Fatalf("the suite failed: %t, %v\n%s", failed, err, out)
			}
			if text := string(out); !strings.Contains(text, "/"+f.test+" (") || !strings.Contains(text, f.says) {
				t.Errorf("the suite did not say %q in %s, but\n%s", f.says, f.test, out)
			}
		})
	}
}

// sweep ends what a driver that is wrong has left.
func sweep(t *testing.T, root string) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		pids, err := process.Processes(root)
		if err != nil && !errors.Is(err, errors.ErrUnsupported) {
			t.Error(err)
		}
		if len(pids) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("processes do not end: %v", pids)
		}
		for _, pid := range pids {
			if p, err := os.FindProcess(pid); err == nil {
				_ = p.Kill()
			}
		}
	}
}
