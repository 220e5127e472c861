package main

import (
	"context"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// interrupted is the cause of a context that a signal ended.
type interrupted struct{ signal syscall.Signal }

func (interrupted) Error() string { return "stopped waiting" }

// signals are what the process is sent. The first SIGINT or SIGTERM ends its
// context and the second one then ends the process as usual, unless a command
// took them for itself.
type signals struct {
	cancel context.CancelCauseFunc
	caught chan os.Signal
	gone   chan struct{}

	mu    sync.Mutex
	taken int
}

// catchSignals returns a context that a signal ends, and what to close at the
// end of the process.
func catchSignals() (context.Context, *signals) {
	ctx, cancel := context.WithCancelCause(context.Background())
	s := &signals{cancel: cancel, caught: make(chan os.Signal, 1), gone: make(chan struct{})}
	signal.Notify(s.caught, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		defer close(s.gone)
		for {
			select {
			case sig := <-s.caught:
				if s.isTaken() {
					continue
				}
				signal.Stop(s.caught)
				s.end(sig)
				return
			case <-ctx.Done():
				return
			}
		}
	}()
	return ctx, s
}

func (s *signals) isTaken() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.taken > 0
}

// end ends the context as sig does.
func (s *signals) end(sig os.Signal) {
	number, _ := sig.(syscall.Signal)
	s.cancel(interrupted{number})
}

// take gives signals to handle, one at a time, in place of what they do
// otherwise, until release was called; that waits for handle to return.
func (s *signals) take(handle func(os.Signal), which ...os.Signal) (release func()) {
	s.mu.Lock()
	s.taken++
	s.mu.Unlock()
	unwatch := s.watch(handle, which...)
	return func() {
		unwatch()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.taken--
	}
}

// watch gives signals to handle, one at a time, besides what they do
// otherwise, until release was called; that waits for handle to return.
func (s *signals) watch(handle func(os.Signal), which ...os.Signal) (release func()) {
	caught, quit, gone := make(chan os.Signal, 8), make(chan struct{}), make(chan struct{})
	signal.Notify(caught, which...)
	go func() {
		defer close(gone)
		for {
			select {
			case sig := <-caught:
				handle(sig)
			case <-quit:
				return
			}
		}
	}()
	return func() {
		signal.Stop(caught)
		close(quit)
		<-gone
	}
}

func (s *signals) close() {
	signal.Stop(s.caught)
	s.cancel(nil)
	<-s.gone
}
