//go:build linux

package vhost

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"
)

// TestStrayPackets are those that belong to no connection, or not there.
func TestStrayPackets(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	g.setUp()
	none := key{guest: 1, host: 2}
	for _, op := range []uint16{opResponse, opShutdown, opData, opCreditUpdate, opCreditRequest, 0, 77} {
		g.send(of(none, op), "")
		g.wants(opReset, none)
	}
	g.send(of(none, opReset), "") // which nobody answers
	h := of(none, opRequest)
	h.kind = 2 // of messages, which the device did not offer
	g.send(h, "")
	if h, _ := g.receive(); h.op != opReset || h.kind != 2 {
		t.Errorf("%+v", h)
	}
	for name, change := range map[string]func(*header){
		"request":         func(h *header) { h.op = opRequest },
		"response":        func(h *header) { h.op = opResponse },
		"unknown":         func(h *header) { h.op = 99 },
		"longer than all": func(h *header) { h.op, h.length = opData, 1<<20 },
		"after the end":   func(h *header) { h.op = opData },
	} {
		conn, k := g.dialled()
		if name == "after the end" {
			h := of(k, opShutdown)
			h.flags = shutSend
			g.send(h, "")
		}
		h := of(k, 0)
		change(&h)
		g.send(h, "x")
		g.wants(opReset, k)
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Errorf("%s: the connection goes on", name)
		}
	}
	g.none()
}

// TestBrokenRings has drivers that do not keep to the protocol: the device ends,
// and says why.
func TestBrokenRings(t *testing.T) {
	t.Parallel()
	for name, breaks := range map[string]func(g *guest){
		"a packet without a header": func(g *guest) {
			g.describe(&g.rings[fromGuest], 0, 0, 10, 0, 0)
			g.offer(&g.rings[fromGuest], 0)
		},
		"beyond memory": func(g *guest) {
			g.describe(&g.rings[fromGuest], 0, memorySize-10, 44, 0, 0)
			g.offer(&g.rings[fromGuest], 0)
		},
		"beyond all": func(g *guest) {
			g.describe(&g.rings[fromGuest], 0, 1<<64-1-guestBase, 44, 0, 0)
			g.offer(&g.rings[fromGuest], 0)
		},
		"no descriptor": func(g *guest) { g.offer(&g.rings[fromGuest], ringSize) },
		"a loop": func(g *guest) {
			g.describe(&g.rings[fromGuest], 0, 0, 44, descNext, 1)
			g.describe(&g.rings[fromGuest], 1, 0, 44, descNext, 0)
			g.offer(&g.rings[fromGuest], 0)
		},
		"indirect": func(g *guest) {
			g.describe(&g.rings[fromGuest], 0, 0, 64, descIndirect, 0)
			g.offer(&g.rings[fromGuest], 0)
		},
		"more than there are": func(g *guest) {
			g.rings[fromGuest].next += ringSize
			g.offer(&g.rings[fromGuest], 0)
		},
		"no room for a header": func(g *guest) {
			for i := range ringSize {
				g.describe(&g.rings[toGuest], i, 0, headerSize, descWrite, 0)
			}
			g.send(of(key{1, 2}, opData), "")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGuest(t)
			g.setUp()
			breaks(g)
			if err := g.ends(); !errors.Is(err, errRing) {
				t.Error(err)
			}
		})
	}
}

// TestNonsense has a front end send what is no message of the protocol's.
func TestNonsense(t *testing.T) {
	t.Parallel()
	for name, send := range map[string]func(g *guest) error{
		"unknown":           func(g *guest) error { return g.tell(99, words64(0)) },
		"short":             func(g *guest) error { return g.tell(setVringNum, words32(1)) },
		"long":              func(g *guest) error { return g.tell(setOwner, make([]byte, maxPayload+1)) },
		"third ring":        func(g *guest) error { return g.tell(setVringNum, words32(2, 64)) },
		"odd size":          func(g *guest) error { return g.tell(setVringNum, words32(0, 65)) },
		"features":          func(g *guest) error { return g.tell(setFeatures, words64(1<<28)) },
		"no kick":           func(g *guest) error { return g.tell(setVringKick, words64(0)) },
		"to be polled":      func(g *guest) error { return g.tell(setVringKick, words64(noFile)) },
		"no memory":         func(g *guest) error { return g.tell(setMemTable, words32(1, 0)) },
		"memory of nothing": func(g *guest) error { return g.tell(setMemTable, append(words32(1, 0), words64(0, 4096, 0, 0)...)) },
		"beyond the file": func(g *guest) error {
			return g.tell(setMemTable, append(words32(1, 0), words64(0, memorySize, 0, 4096)...), g.file)
		},
		"around the end": func(g *guest) error {
			return g.tell(setMemTable, append(words32(1, 0), words64(0, 1<<63, 0, 1<<63)...), g.file)
		},
		"configuration": func(g *guest) error { return g.tell(getConfig, append(words32(4, 8, 0), make([]byte, 8)...)) },
		"ring elsewhere": func(g *guest) error {
			g.setUp()
			g.pause()
			g.rings[0].desc = memorySize - 8
			g.resumeOrNot()
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGuest(t)
			_ = send(g)
			if err := g.ends(); !errors.Is(err, errMessage) && !errors.Is(err, errRing) && !strings.Contains(err.Error(), "memory of") {
				t.Error(err)
			}
		})
	}
}

// resumeOrNot is resume that may fail.
func (g *guest) resumeOrNot() {
	r := &g.rings[0]
	_ = g.tell(setVringAddr, append(words32(0, 0), words64(frontBase+uint64(r.desc), frontBase+uint64(r.used), frontBase+uint64(r.avail), 0)...))
	_ = g.tell(setVringKick, words64(0), r.kick)
	_ = g.tell(setVringEnable, words32(0, 1))
}

func TestConfiguration(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	reply, err := g.exchange(getConfig, append(words32(0, 8, 0), make([]byte, 8)...))
	g.must(err)
	if len(reply) != 20 || binary.LittleEndian.Uint64(reply[12:]) != guestCID {
		t.Errorf("%x", reply)
	}
}

// TestFrontEndDies has QEMU die in the midst of a message, and before it has read
// an answer: that is no fault of the guest's.
func TestFrontEndDies(t *testing.T) {
	t.Parallel()
	for name, last := range map[string][]byte{
		"in a header":       words32(setOwner),
		"in a payload":      append(words32(setVringNum, versionOne, 8), 0),
		"before the answer": append(words32(getConfig, versionOne, 20), make([]byte, 20)...),
	} {
		g := newGuest(t)
		g.setUp()
		if _, err := g.front.Write(last); err != nil {
			t.Fatal(err)
		}
		if err := g.unplug(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
