//go:build !linux

package main

import (
	"errors"
	"os"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

func openPTY() (ours, theirs *os.File, err error) {
	return nil, nil, errors.New("the tests open terminals on Linux alone")
}

func (e *fakeExec) resize(*agentv1.TerminalSize) {}
