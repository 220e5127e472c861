package vm

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// button counts how often its power button is pressed.
type button struct {
	Machine
	pressed atomic.Int32
	done    chan struct{}
}

func (b *button) PressPower(context.Context) error {
	b.pressed.Add(1)
	return nil
}

func (b *button) Done() <-chan struct{} { return b.done }

func TestPowerButtonIsPressedUntilTheMachineIsOff(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := &button{done: make(chan struct{})}
		l := &life{machine: b}
		l.tasks.Go(l.pressPower)
		synctest.Wait()
		l.pressPower()                          // somebody does already
		time.Sleep(2*pressAgain + pressAgain/2) // of synctest's time
		if n := b.pressed.Load(); n != 3 {
			t.Errorf("pressed %d times within two and a half pauses, want 3", n)
		}
		close(b.done)
		l.tasks.Wait()
		if n := b.pressed.Load(); n != 3 {
			t.Errorf("pressed %d times in all, want 3", n)
		}
	})
	b := &button{done: make(chan struct{})}
	(&life{machine: b, plan: plan{Image: &imagePlan{}}}).pressPower()
	if n := b.pressed.Load(); n != 0 {
		t.Errorf("of the guest kit, which has none, it was pressed %d times", n)
	}
}
