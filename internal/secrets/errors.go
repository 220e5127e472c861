package secrets

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/choiros/agent/internal/sandbox"
)

// problem is why a source gave no value. Its text is ours alone: nothing in
// it was said by a parser or a server.
type problem struct {
	sentinel error
	text     string
}

func (p *problem) Error() string { return p.text }

func (p *problem) Unwrap() error { return p.sentinel }

func missingf(format string, args ...any) error {
	return &problem{sandbox.ErrNotFound, fmt.Sprintf(format, args...)}
}

func deniedf(format string, args ...any) error {
	return &problem{sandbox.ErrDenied, fmt.Sprintf(format, args...)}
}

func unavailablef(format string, args ...any) error {
	return &problem{sandbox.ErrUnavailable, fmt.Sprintf(format, args...)}
}

func corruptf(format string, args ...any) error {
	return &problem{sandbox.ErrCorrupt, fmt.Sprintf(format, args...)}
}

// systemProblem translates what the operating system says of a path.
func systemProblem(path string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return missingf("%s does not exist", path)
	case errors.Is(err, fs.ErrPermission):
		return deniedf("%s is not readable by the agent's user; make that user its owner", path)
	}
	if inner := errors.Unwrap(err); inner != nil { // else the path is there twice
		err = inner
	}
	return unavailablef("%s: %v", path, err)
}

// refError is the error of a reference. The source is shown: what it may hold
// is checked, and a value is no part of it.
func refError(i int, ref sandbox.SecretRef, err error) error {
	if field, ok := errors.AsType[*sandbox.FieldError](err); ok {
		return field
	}
	sentinel := sandbox.FailureOf(err).Sentinel
	if sentinel == nil {
		sentinel = sandbox.ErrUnavailable
	}
	return &sandbox.FieldError{
		Field:   fieldOf(i),
		Problem: fmt.Sprintf("secret %s from %s: %v", ref.Name, ref.Source, err),
		Err:     sentinel,
	}
}

func fieldOf(i int) string { return fmt.Sprintf("spec.secrets[%d]", i) }

// ended translates the end of a context into a problem, or returns nil.
func ended(ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	return unavailablef("no answer in time")
}
