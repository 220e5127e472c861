package main

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// The control sequences of xterm that the view is made with;
// https://invisible-island.net/xterm/ctlseqs/ctlseqs.html.
const (
	enterScreen = "\x1b[?1049h\x1b[?25l" // the alternate screen, no cursor
	leaveScreen = "\x1b[?25h\x1b[?1049l"
	beginFrame  = "\x1b[?2026h\x1b[H" // shown as a whole where the terminal can; from the top left
	endFrame    = "\x1b[J\x1b[?2026l" // nothing below
	endLine     = "\x1b[K"            // nothing to the right
)

// aboutInterval is how often the view asks for what samples do not tell.
const aboutInterval = 2 * time.Second

// about is what samples do not tell.
type about struct {
	host      *agentv1.GetStatsResponse
	sandboxes map[string]*agentv1.Sandbox
}

// topScreen is the live view. The terminal is restored however it ends.
func (a *app) topScreen(ctx context.Context, c *client, req *agentv1.StreamStatsRequest) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	raw, err := a.makeRaw(terminalOf(a.stdin), leaveScreen)
	if err != nil {
		return err
	}
	defer raw.restore()
	if _, err := io.WriteString(a.stdout, enterScreen); err != nil {
		return err
	}
	resized := make(chan struct{}, 1)
	defer a.signals.watch(func(os.Signal) {
		select {
		case resized <- struct{}{}:
		default:
		}
	}, syscall.SIGWINCH)()
	keys := make(chan string)
	go a.readKeys(ctx, keys, raw) // nobody waits for it: a read of a terminal cannot be cut short

	rounds, facts, gone := make(chan *agentv1.StreamStatsResponse), make(chan about), make(chan error, 1)
	var workers sync.WaitGroup
	workers.Go(func() {
		defer raw.guard()
		gone <- c.keepRounds(ctx, req, rounds)
	})
	workers.Go(func() {
		defer raw.guard()
		c.tellAbout(ctx, req.GetLabelSelector(), facts)
	})
	defer workers.Wait()
	defer cancel()
	return a.drawTop(ctx, keys, resized, rounds, facts, gone)
}

// drawTop draws a frame whenever something has changed, until a key, ctx or
// the stream ends it.
func (a *app) drawTop(ctx context.Context, keys <-chan string, resized <-chan struct{},
	rounds <-chan *agentv1.StreamStatsResponse, facts <-chan about, gone chan error,
) error {
	state := newTopState()
	for {
		if err := a.drawFrame(state); err != nil {
			return err
		}
		select {
		case key := <-keys:
			if state.press(key) {
				return nil
			}
		case <-resized:
		case round := <-rounds:
			if state.problem = ""; round == nil {
				state.problem = "the connection to the agent was lost; connecting again"
			} else if !state.paused {
				state.add(round)
			}
		case fact := <-facts:
			if !state.paused {
				state.host, state.sandboxes = fact.host, fact.sandboxes
			}
		case err := <-gone:
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// drawFrame writes a frame at once, so that nothing of it is seen half done.
func (a *app) drawFrame(state *topState) error {
	width, height := 80, 24
	if size := terminalSize(a.stdout); size != nil {
		width, height = int(size.GetColumns()), int(size.GetRows())
	}
	width = max(width-1, 1) // what ends a line there would also clear the last column
	var b strings.Builder
	b.WriteString(beginFrame)
	for i, line := range topFrame(state, a.out, width, height, time.Now()) {
		if i > 0 {
			b.WriteString("\r\n")
		}
		b.WriteString(line)
		b.WriteString(endLine)
	}
	b.WriteString(endFrame)
	_, err := io.WriteString(a.stdout, b.String())
	return err
}

// readKeys sends each key that is typed.
func (a *app) readKeys(ctx context.Context, keys chan<- string, raw *rawMode) {
	defer raw.guard()
	chunk := make([]byte, 64)
	for {
		n, err := a.stdin.Read(chunk)
		if err != nil {
			select {
			case keys <- "q": // the terminal is gone
			case <-ctx.Done():
			}
			return
		}
		for key, rest := parseKey(chunk[:n]); key != ""; key, rest = parseKey(rest) {
			select {
			case keys <- key:
			case <-ctx.Done():
				return
			}
		}
	}
}

// keepRounds sends each round. A connection that drops is made again: nil is
// sent while there is none. It returns when the agent refuses, or with ctx.
func (c *client) keepRounds(ctx context.Context, req *agentv1.StreamStatsRequest, rounds chan<- *agentv1.StreamStatsResponse) error {
	send := func(round *agentv1.StreamStatsResponse) error {
		select {
		case rounds <- round:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	for {
		err := c.rounds(ctx, req, send)
		connected, _ := c.link.state()
		if _, dropped := errors.AsType[*connectError](err); err != nil && (!dropped || !connected) || ctx.Err() != nil {
			return err
		}
		if err := send(nil); err != nil {
			return err
		}
		select {
		case <-time.After(aboutInterval / 4):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// tellAbout sends what samples do not tell, every now and then, as far as it
// can be had.
func (c *client) tellAbout(ctx context.Context, selector string, facts chan<- about) {
	tick := time.NewTicker(aboutInterval)
	defer tick.Stop()
	for {
		host, err := c.host.GetStats(ctx, &agentv1.GetStatsRequest{})
		if err == nil {
			all, listErr := c.list(ctx, selector)
			fact := about{host, map[string]*agentv1.Sandbox{}}
			for _, sb := range all {
				fact.sandboxes[sb.GetName()] = sb
			}
			if listErr == nil {
				select {
				case facts <- fact:
				case <-ctx.Done():
				}
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
