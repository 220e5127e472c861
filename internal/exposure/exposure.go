package exposure

import (
	"context"
	"time"
)

// Bounds of a look.
const (
	// MaxFindings is how many files a Report names.
	MaxFindings = 16
	// maxEntries is how many names are read.
	maxEntries = 50_000
	// patience is how long a look may take, and how long it waits for its turn.
	patience = 500 * time.Millisecond
	// maxLooks is how many there are at once: more than boots that an agent does
	// at once by default, and few enough to lose to a file system that hangs.
	maxLooks = 16
)

// Kind says what a file was taken for.
type Kind string

// The kinds.
const (
	// Environment is a file of variables: .env.
	Environment Kind = "environment"
	// Key is a private key, or a file in which one is usually kept: *.pem.
	Key Kind = "key"
	// Credentials are what a program logs in to a service with: .netrc.
	Credentials Kind = "credentials"
)

// Finding is one file.
type Finding struct {
	// Path is below the folder, fit to be printed: what cannot be is U+FFFD in
	// it, and of a long one the end is given, after "…".
	Path string
	Kind Kind
}

// Report is what a look found.
type Report struct {
	// Findings are the first of them, those in upper folders before those below.
	Findings []Finding
	// Total counts them all.
	Total int
	// Incomplete is set if the folder was not looked through to its end, or a
	// part of it could not be read for another reason than that the agent may not.
	Incomplete bool
}

// Looker looks through folders, a few at a time.
type Looker struct{ turns chan struct{} }

// New returns a Looker.
func New() *Looker { return &Looker{make(chan struct{}, maxLooks)} }

// Look looks through a folder. It returns within a second, or as soon as ctx
// ends, with what was found by then. Where a file system does not answer, a
// goroutine and a turn stay behind until it does.
func (l *Looker) Look(ctx context.Context, folder string) Report {
	return l.look(ctx, folder, maxEntries)
}

func (l *Looker) look(ctx context.Context, folder string, entries int) Report {
	turn := time.NewTimer(patience)
	defer turn.Stop()
	select {
	case l.turns <- struct{}{}:
	case <-turn.C:
		return Report{Incomplete: true}
	case <-ctx.Done():
		return Report{Incomplete: true}
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	w := &walk{left: entries, report: Report{Incomplete: true}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() { <-l.turns }()
		w.run(ctx, folder)
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
	return w.soFar()
}
