//go:build linux

package guestd

import (
	"os"
	"sync"

	"github.com/choiros/agent/internal/guest/wire"
)

// streams are what the workload of a machine prints: two, which go to the host.
type streams struct {
	drain
	output, errors *os.File // nil until it is started
	done           chan struct{}
}

func newStreams(buffers *sync.Pool) *streams {
	return &streams{
		drain: drain{buffers: buffers, exited: make(chan struct{})},
		done:  make(chan struct{}),
	}
}

// open returns what the workload is to have as its standard input, output and
// error, and carries what it prints from then on, with how slow the host takes
// it as its own pace. The caller closes those.
func (s *streams) open(owner *account) ([]int, error) {
	null, err := noInput()
	if err != nil {
		return nil, err
	}
	theirs, err := openOutput([]int{null}, &s.output, &s.errors)
	if err != nil {
		return theirs, err
	}
	giveAway(theirs, owner.credential())
	var carrying sync.WaitGroup
	carrying.Go(func() { s.pump(wire.KindData, s.output) })
	carrying.Go(func() { s.pump(wire.KindStderr, s.errors) })
	go func() {
		carrying.Wait()
		close(s.done)
	}()
	return theirs, nil
}

// exit notes that the workload has ended.
func (s *streams) exit() { s.end(s.output, s.errors) }

// drained returns once all that was printed was taken, or nobody takes it.
func (s *streams) drained(gone <-chan struct{}) {
	if s.output == nil {
		return
	}
	select {
	case <-s.done:
	case <-gone:
	}
}
