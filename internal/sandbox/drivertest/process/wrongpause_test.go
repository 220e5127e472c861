package process_test

import (
	"context"
	"net"
	"sync"

	"github.com/choiros/agent/internal/sandbox"
)

func (f *faulty) Pause(ctx context.Context, ref sandbox.Ref) error { return f.pause(ctx, ref) }

func (f *faulty) Resume(ctx context.Context, ref sandbox.Ref) error { return f.resume(ctx, ref) }

func (f *faulty) Console(ctx context.Context, ref sandbox.Ref) (net.Conn, error) {
	return f.console(ctx, ref)
}

// faultsOfPausing are of sandbox.Pauser.
func faultsOfPausing() []fault {
	// says makes Inspect say of a sandbox what pauses and resumes have told it.
	says := func(f *faulty, told *sync.Map) {
		f.inspect = func(ctx context.Context, ref sandbox.Ref) (sandbox.Observation, error) {
			o, err := f.Driver.Inspect(ctx, ref)
			_, o.Paused = told.Load(ref.ID)
			return o, err
		}
	}
	return []fault{
		{"Pause halts nothing", "PauseHaltsAndResumeGoesOn", "it was paused, and", func(f *faulty, _ string, told *sync.Map) {
			says(f, told)
			f.pause = func(_ context.Context, ref sandbox.Ref) error { told.Store(ref.ID, true); return nil }
			f.resume = func(_ context.Context, ref sandbox.Ref) error { told.Delete(ref.ID); return nil }
		}},
		{"Resume lets nothing go on", "PauseHaltsAndResumeGoesOn", "the workload goes on printing", func(f *faulty, _ string, told *sync.Map) {
			says(f, told)
			f.pause = func(ctx context.Context, ref sandbox.Ref) error {
				told.Store(ref.ID, true)
				return f.Driver.Pause(ctx, ref)
			}
			f.resume = func(_ context.Context, ref sandbox.Ref) error { told.Delete(ref.ID); return nil }
		}},
		{"Inspect does not know of pauses", "PauseHaltsAndResumeGoesOn", "want Paused: true", func(f *faulty, _ string, none *sync.Map) {
			says(f, none)
		}},
		{"Pause of an absent one succeeds", "PauseOfWhatDoesNotRun", "Pause of one that is absent", func(f *faulty, _ string, _ *sync.Map) {
			f.pause = func(context.Context, sandbox.Ref) error { return nil }
		}},
	}
}

// faultsOfConsoles are of sandbox.Console.
func faultsOfConsoles() []fault {
	never := func(context.Context, sandbox.Ref) (net.Conn, error) {
		conn, other := net.Pipe()
		go func() { // what is typed is read, and nothing is said
			for b := make([]byte, 16); ; {
				if _, err := other.Read(b); err != nil {
					return
				}
			}
		}()
		return conn, nil
	}
	return []fault{
		{"Console of an absent one succeeds", "ConsoleOfWhatDoesNotRun", "Console of one that is absent", func(f *faulty, _ string, _ *sync.Map) {
			f.console = never
		}},
		{"a console does not end", "ConsoleEndsWithTheLife", "its console has not", func(f *faulty, _ string, _ *sync.Map) {
			f.console = never
		}},
	}
}
