package manager

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/store"
)

// Request identifies one request of a caller's, so that a retry is not carried
// out twice. The zero Request is not recognised.
type Request = store.Request

// requests are the identified requests under way.
type requests struct {
	mu    sync.Mutex
	calls map[string]*call // by id
}

type call struct {
	fingerprint string
	done        chan struct{} // closed once the rest is set
	body        []byte
	err         error
}

// Once carries out a mutation, or returns the answer that the same request got
// before, also before an agent restart, or joins it if it is under way. Errors
// are not kept: the next retry tries again. Another request under req.ID:
// ErrRequestReused. run goes on to its end even if ctx ends first; its context
// carries ctx's values but not its end.
func (m *Manager) Once(ctx context.Context, req Request, run func(ctx context.Context) ([]byte, error)) ([]byte, error) {
	if req.ID == "" {
		var body []byte
		err := m.detach(ctx, func(ctx context.Context) (err error) {
			body, err = run(ctx)
			return err
		})
		if err != nil {
			return nil, err // body may still be written
		}
		return body, nil
	}
	m.requests.mu.Lock()
	c, joined := m.requests.calls[req.ID]
	if !joined {
		c = &call{fingerprint: req.Fingerprint, done: make(chan struct{})}
		m.requests.calls[req.ID] = c
	}
	m.requests.mu.Unlock()
	if c.fingerprint != req.Fingerprint {
		return nil, reused(req)
	}
	if !joined {
		// The error is c.err or ctx's own, both dealt with below.
		_ = m.detach(ctx, func(ctx context.Context) error {
			c.body, c.err = m.answer(ctx, req, run)
			m.requests.mu.Lock()
			delete(m.requests.calls, req.ID)
			m.requests.mu.Unlock()
			close(c.done)
			return c.err
		})
	}
	select {
	case <-c.done:
		return c.body, c.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (m *Manager) answer(ctx context.Context, req Request, run func(ctx context.Context) ([]byte, error)) ([]byte, error) {
	before, found, err := m.store.Answer(req.ID)
	switch {
	case err != nil:
		return nil, err
	case found && before.Fingerprint != req.Fingerprint:
		return nil, reused(req)
	case found:
		return before.Body, nil
	}
	body, err := run(ctx)
	if errors.Is(err, sandbox.ErrNotFound) {
		// This very request's deletion, begun before the agent was restarted,
		// may have been finished while this retry waited for its turn.
		if before, found, _ := m.store.Answer(req.ID); found && before.Fingerprint == req.Fingerprint {
			return before.Body, nil
		}
	}
	if err != nil {
		return nil, err
	}
	if err := m.keepAnswer(req, body); err != nil {
		// What was asked for is done; that a retry may do it again is the
		// lesser harm.
		m.log.Error("answer not kept", "request", req.ID, "err", err)
	}
	return body, nil
}

// keepAnswer keeps an answer, unless the operation itself did.
func (m *Manager) keepAnswer(req Request, body []byte) error {
	if _, found, err := m.store.Answer(req.ID); found && err == nil {
		return nil
	}
	return m.store.PutAnswer(req, body)
}

func reused(req Request) error {
	return &sandbox.FieldError{
		Field:   "request_id",
		Problem: fmt.Sprintf("%q was used for another request; use a new id", req.ID),
		Err:     sandbox.ErrRequestReused,
	}
}
