//go:build linux && race

package guestd

// raced: the race detector is in here, whose own memory grows with use.
const raced = true
