package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/term"
)

// terminal is what can be done on an output stream beyond printing.
type terminal struct {
	w      io.Writer
	live   bool // a terminal whose lines can be redrawn
	colour bool // a terminal, and colours are wanted: https://no-color.org
}

func newTerminal(w io.Writer, getenv func(string) string) terminal {
	f, ok := w.(*os.File)
	live := ok && term.IsTerminal(int(f.Fd())) && getenv("TERM") != "dumb"
	return terminal{w: w, live: live, colour: live && getenv("NO_COLOR") == ""}
}

// paint colours text with an SGR code, ECMA-48 section 8.3.117.
func (t terminal) paint(code, s string) string {
	if !t.colour || s == "" {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func (t terminal) bold(s string) string   { return t.paint("1", s) }
func (t terminal) dim(s string) string    { return t.paint("2", s) }
func (t terminal) red(s string) string    { return t.paint("31", s) }
func (t terminal) green(s string) string  { return t.paint("32", s) }
func (t terminal) yellow(s string) string { return t.paint("33", s) }

// width is the terminal's, in columns; 80 if it does not tell.
func (t terminal) width() int {
	if f, ok := t.w.(*os.File); ok {
		if columns, _, err := term.GetSize(int(f.Fd())); err == nil && columns > 0 {
			return columns
		}
	}
	return 80
}

// progress tells a person on stderr how something goes: a spinner on a
// terminal, otherwise a line for each change. A nil *progress says nothing.
type progress struct {
	t       terminal
	subject string

	mu    sync.Mutex
	text  string
	frame int
	began time.Time

	quit, gone chan struct{}
}

// newProgress returns a progress that the caller stops; nil if quiet.
func (a *app) newProgress(subject string) *progress {
	if a.quiet {
		return nil
	}
	p := &progress{t: a.err, subject: subject, began: time.Now(), quit: make(chan struct{}), gone: make(chan struct{})}
	go p.spin()
	return p
}

// say replaces what is told. On a terminal it is shown until the next; else it
// is a line of its own, if lasting.
func (p *progress) say(text string, lasting bool) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if text = oneLine(text); text == p.text {
		return
	}
	p.text = text
	if p.t.live {
		p.draw()
	} else if lasting {
		fmt.Fprintf(p.t.w, "%s: %s\n", p.subject, text)
	}
}

// stop takes the spinner away and waits until it is gone.
func (p *progress) stop() {
	if p == nil {
		return
	}
	close(p.quit)
	<-p.gone
}

func (p *progress) spin() {
	defer close(p.gone)
	if !p.t.live {
		<-p.quit
		return
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-p.quit:
			p.mu.Lock()
			defer p.mu.Unlock()
			fmt.Fprint(p.t.w, "\r\x1b[K")
			return
		case <-tick.C:
			p.mu.Lock()
			p.frame++
			p.draw()
			p.mu.Unlock()
		}
	}
}

// draw shows the line; p.mu is held.
func (p *progress) draw() {
	frames := [...]string{"⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏"}
	since := age(time.Since(p.began))
	room := p.t.width() - utf8.RuneCountInString(p.subject) - len(since) - 8
	text := clipText(p.text, max(room, 8))
	fmt.Fprintf(p.t.w, "\r\x1b[K%s %s: %s %s", p.t.green(frames[p.frame%len(frames)]), p.subject, text, p.t.dim(since))
}

// clipText shortens text to so many characters.
func clipText(s string, most int) string {
	if utf8.RuneCountInString(s) <= most {
		return s
	}
	return string([]rune(s)[:most-1]) + "…"
}
