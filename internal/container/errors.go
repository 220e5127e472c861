package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"strings"
	"syscall"

	"github.com/containers/podman/v5/libpod/define"
	"github.com/containers/podman/v5/pkg/errorhandling"

	"github.com/choiros/agent/internal/sandbox"
)

// The steps that mend a missing or unsuitable Podman.
const (
	startCure   = "systemctl --user enable --now podman.socket"
	restartCure = "systemctl --user restart podman.socket podman.service"
	installCure = "install podman 5 or newer with passt and uidmap (Debian, Ubuntu: apt-get install podman passt uidmap; " +
		"Fedora: dnf install podman; NixOS: virtualisation.podman.enable = true), then " + startCure
	upgradeCure = "install podman 5 or newer, then " + restartCure
	userCure    = "run the agent as the ordinary user whose podman it is to use"
)

// Errors of Podman's storage library, whose package is too large to be linked
// for their texts.
var (
	errNameInUse        = errors.New("that name is already in use") // storage.ErrDuplicateName
	errContainerUnknown = errors.New("container not known")         // storage.ErrContainerUnknown
)

// errSilent is why a call's own deadline ended it.
var errSilent = errors.New("podman does not answer")

// podmanError is what Podman said in answer to a request.
type podmanError struct {
	status int
	// cause is the innermost error's text, "API root cause formatted for
	// automated parsing" (errorhandling.ErrorModel).
	cause   string
	message string
	kind    error // the sentinel that fits, or nil
}

func (e *podmanError) Error() string { return "podman: " + e.message }

func (e *podmanError) Unwrap() error { return e.kind }

// caused reports whether err is an answer of Podman's with this root cause.
func caused(err, cause error) bool {
	var answer *podmanError
	return errors.As(err, &answer) && answer.cause == cause.Error()
}

// translate turns an error of the bindings into one of ours. It is the only
// place that knows theirs.
func translate(err error) error {
	if err == nil {
		return nil
	}
	var model *errorhandling.ErrorModel
	if !errors.As(err, &model) {
		// Not an answer, but no lack of one either: a body that broke off, or
		// that is not what this version of the API says.
		return &sandbox.UnavailableError{
			Err:  fmt.Errorf("podman's answer cannot be used: %w", err),
			Cure: restartCure,
		}
	}
	answer := &podmanError{status: model.ResponseCode, cause: model.Because, message: strings.TrimSpace(model.Message)}
	if answer.message == "" {
		answer.message = http.StatusText(answer.status)
	}
	answer.kind = kindOf(answer.status, answer.cause)
	return answer
}

// isAnswer reports whether an error of the bindings is Podman's answer.
func isAnswer(err error) bool {
	var model *errorhandling.ErrorModel
	return errors.As(err, &model)
}

// kindOf returns the sentinel for an answer of Podman's, or nil.
func kindOf(status int, cause string) error {
	// Errors of the storage library and of system calls come through as text
	// only, and some as the end of a longer one.
	for _, full := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE} {
		if strings.Contains(cause, full.Error()) {
			return sandbox.ErrExhausted
		}
	}
	switch cause {
	case define.ErrCtrStateInvalid.Error(), define.ErrCtrStopped.Error(), define.ErrCtrStateRunning.Error():
		return sandbox.ErrState
	case define.ErrNoSuchCtr.Error(), define.ErrCtrRemoved.Error(), errContainerUnknown.Error():
		return sandbox.ErrNotFound
	}
	switch status {
	case http.StatusBadRequest:
		return sandbox.ErrInvalid
	case http.StatusNotFound:
		return sandbox.ErrNotFound
	case http.StatusConflict:
		return sandbox.ErrState
	case http.StatusServiceUnavailable:
		return sandbox.ErrUnavailable
	}
	return nil
}

// transportError is a request that got no answer.
func transportError(socket string, err error) error {
	for _, errno := range []error{fs.ErrNotExist, fs.ErrPermission, syscall.ECONNREFUSED} {
		if errors.Is(err, errno) {
			return socketError(socket, err)
		}
	}
	return &sandbox.UnavailableError{
		Err:  fmt.Errorf("podman at %s went away during the call: %w", socket, err),
		Cure: startCure,
	}
}

// socketError says what is wrong with Podman's socket and how to mend it.
func socketError(socket string, err error) error {
	cure := startCure
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if !installed() {
			cure = installCure
		}
		err = fmt.Errorf("podman's socket %s does not exist: %w", socket, fs.ErrNotExist)
	case errors.Is(err, syscall.ECONNREFUSED):
		cure = restartCure
		err = fmt.Errorf("nobody listens at podman's socket %s: %w", socket, syscall.ECONNREFUSED)
	case errors.Is(err, fs.ErrPermission):
		cure = userCure
		err = fmt.Errorf("podman's socket %s is another user's: %w", socket, fs.ErrPermission)
	}
	return &sandbox.UnavailableError{Err: err, Cure: cure}
}

// ended returns ctx's error in the place of err once ctx has ended: what else
// went wrong then went wrong because of it. A call's own deadline is Podman's
// silence and not the caller's.
func ended(ctx context.Context, err error) error {
	if err == nil || ctx.Err() == nil {
		return err
	}
	if errors.Is(context.Cause(ctx), errSilent) {
		return &sandbox.UnavailableError{Err: errSilent, Cure: restartCure}
	}
	return ctx.Err()
}
