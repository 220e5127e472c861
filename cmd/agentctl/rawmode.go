package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/term"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// terminalOf is the terminal that a stream is, or nil.
func terminalOf(stream any) *os.File {
	if f, ok := stream.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return f
	}
	return nil
}

// rawMode is a terminal that gives every key to the program as it is typed.
type rawMode struct {
	restore func() // may be called often
}

// makeRaw puts a terminal in raw mode until restore is called, which first
// prints leave. No signal ends the process before: it ends its context.
func (a *app) makeRaw(f *os.File, leave string) (*rawMode, error) {
	fd := int(f.Fd())
	state, err := term.MakeRaw(fd)
	if err != nil {
		return nil, fmt.Errorf("terminal: %w", err)
	}
	restore := sync.OnceFunc(func() {
		// There is nobody left to tell of an error.
		_, _ = io.WriteString(a.stdout, leave)
		_ = term.Restore(fd, state)
	})
	release := a.signals.take(func(sig os.Signal) {
		if leave == "" { // else a frame may be on its way
			restore()
		}
		a.signals.end(sig)
	}, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	return &rawMode{sync.OnceFunc(func() {
		restore()
		release()
	})}, nil
}

// guard is deferred in goroutines: a panic there would end the process with
// the terminal raw.
func (r *rawMode) guard() {
	if v := recover(); v != nil {
		if r != nil {
			r.restore()
		}
		panic(v)
	}
}

// terminalSize is the size of the first of the streams that is a terminal, or
// nil.
func terminalSize(streams ...any) *agentv1.TerminalSize {
	for _, stream := range streams {
		if f := terminalOf(stream); f != nil {
			if columns, rows, err := term.GetSize(int(f.Fd())); err == nil && columns > 0 && rows > 0 {
				return &agentv1.TerminalSize{Columns: uint32(columns), Rows: uint32(rows)}
			}
		}
	}
	return nil
}

// askSecret reads a line from a terminal without showing it. When ctx ends
// first, it restores the terminal and returns the cause.
func (a *app) askSecret(ctx context.Context, f *os.File, prompt string) ([]byte, error) {
	fd := int(f.Fd())
	state, err := term.GetState(fd)
	if err != nil {
		return nil, fmt.Errorf("terminal: %w", err)
	}
	release := a.signals.take(a.signals.end, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer release()
	defer fmt.Fprintln(a.stderr)
	fmt.Fprint(a.stderr, prompt)
	type answer struct {
		value []byte
		err   error
	}
	answered := make(chan answer, 1) // a read of a terminal cannot be cut short
	go func() {
		value, err := term.ReadPassword(fd)
		answered <- answer{value, err}
	}()
	select {
	case got := <-answered:
		if got.err != nil && !errors.Is(got.err, io.EOF) {
			return nil, fmt.Errorf("terminal: %w", got.err)
		}
		return got.value, nil
	case <-ctx.Done():
		return nil, errors.Join(context.Cause(ctx), term.Restore(fd, state))
	}
}

// defaultDetachKeys is the sequence of keys that leaves a command running.
const defaultDetachKeys = "ctrl-p,ctrl-q"

// parseKeys reads a comma-separated list of single characters and of ctrl-X.
// Empty: none.
func parseKeys(s string) ([]byte, error) {
	if s == "" {
		return nil, nil
	}
	var keys []byte
	for part := range strings.SplitSeq(s, ",") {
		name, isControl := strings.CutPrefix(strings.ToLower(part), "ctrl-")
		switch {
		case isControl && len(name) == 1 && (name[0] >= 'a' && name[0] <= 'z' || strings.Contains(`@[\]^_`, name)):
			keys = append(keys, strings.ToUpper(name)[0]&0x1f)
		case len(part) == 1 && part[0] > ' ' && part[0] < 0x7f:
			keys = append(keys, part[0])
		default:
			return nil, fmt.Errorf("%q is neither a character nor ctrl-X; write %s", part, defaultDetachKeys)
		}
	}
	return keys, nil
}

// keyFilter finds a sequence of keys in what is typed. It holds back what may
// be the sequence's beginning until the next key tells.
type keyFilter struct {
	keys    []byte // empty: nothing is looked for
	matched int
}

// feed returns what of the input to pass on, and whether the sequence is
// complete; what follows it is dropped.
func (k *keyFilter) feed(input []byte) (pass []byte, complete bool) {
	if len(k.keys) == 0 {
		return input, false
	}
	for _, b := range input {
		for k.matched > 0 && b != k.keys[k.matched] {
			// Shift by one: the longest end of what was held that begins the
			// sequence stays held.
			held := k.keys[:k.matched]
			shift := 1
			for shift < k.matched && string(held[shift:]) != string(k.keys[:k.matched-shift]) {
				shift++
			}
			pass = append(pass, held[:shift]...)
			k.matched -= shift
		}
		if b != k.keys[k.matched] {
			pass = append(pass, b)
			continue
		}
		if k.matched++; k.matched == len(k.keys) {
			k.matched = 0
			return pass, true
		}
	}
	return pass, false
}
