package sandbox

import (
	"errors"
	"fmt"
	"time"
)

// The sentinels. Everything that crosses a package border and that a caller
// may act on wraps one; test with errors.Is.
var (
	// ErrInvalid: the request is wrong in itself. Usually a *FieldError.
	ErrInvalid = errors.New("invalid")
	// ErrNotFound: there is no such sandbox, image, class, …
	ErrNotFound = errors.New("not found")
	// ErrExists: there already is one of that name.
	ErrExists = errors.New("already exists")
	// ErrState: right in itself, but not in the state that things are in.
	ErrState = errors.New("not possible in this state")
	// ErrRequestReused: the request id was used for another request.
	ErrRequestReused = errors.New("request id was used for another request")
	// ErrUnsupported: this agent, driver or host cannot do it.
	ErrUnsupported = errors.New("not supported")
	// ErrExhausted: the host is out of something; later it may do.
	ErrExhausted = errors.New("out of resources")
	// ErrDraining: the host takes no boots at present.
	ErrDraining = errors.New("host is draining")
	// ErrUnavailable: a backend does not answer.
	ErrUnavailable = errors.New("unavailable")
	// ErrGuest: what is inside a sandbox does not answer as guestd would.
	ErrGuest = errors.New("guest does not answer as it should")
	// ErrRefused: nothing accepts connections on a port inside.
	ErrRefused = errors.New("connection refused")
	// ErrNotReady: the sandbox did not become ready in its time.
	ErrNotReady = errors.New("did not become ready")
	// ErrEnded: the workload ended before it was ready.
	ErrEnded = errors.New("workload ended")
	// ErrSuperseded: a later request (stop, delete) ended this one.
	ErrSuperseded = errors.New("superseded by a later request")
	// ErrDenied: the caller may not.
	ErrDenied = errors.New("permission denied")
	// ErrTimeout: the agent's own deadline for an operation passed.
	ErrTimeout = errors.New("timed out")
	// ErrCorrupt: stored or sent data is not what it says it is.
	ErrCorrupt = errors.New("corrupt data")
)

// Failure is a row of the one table that ties a sentinel to what the wire and
// the command line make of it.
type Failure struct {
	Sentinel error
	// Reason is google.rpc.ErrorInfo.reason.
	Reason string
	// Code is the gRPC status code; the numbers are those of
	// google.rpc.Code, https://grpc.io/docs/guides/status-codes/.
	Code uint32
	// Exit is agentctl's exit status.
	Exit int
}

// Failures returns the table. The first row whose sentinel an error wraps is
// its row; the last row is for errors that wrap none.
func Failures() []Failure {
	return []Failure{
		{ErrRequestReused, "REQUEST_ID_REUSED", 3, 2},
		{ErrInvalid, "INVALID", 3, 2},
		{ErrNotFound, "NOT_FOUND", 5, 3},
		{ErrExists, "ALREADY_EXISTS", 6, 4},
		{ErrDraining, "HOST_DRAINING", 14, 8},
		{ErrUnsupported, "UNSUPPORTED", 12, 6},
		{ErrExhausted, "RESOURCE_EXHAUSTED", 8, 7},
		{ErrGuest, "GUEST_UNAVAILABLE", 14, 8},
		{ErrRefused, "CONNECTION_REFUSED", 14, 8},
		{ErrUnavailable, "DRIVER_UNAVAILABLE", 14, 8},
		{ErrNotReady, "NOT_READY", 4, 9},
		{ErrEnded, "WORKLOAD_ENDED", 9, 10},
		{ErrSuperseded, "SUPERSEDED", 10, 11},
		{ErrState, "WRONG_STATE", 9, 5},
		{ErrDenied, "PERMISSION_DENIED", 7, 12},
		{ErrTimeout, "TIMEOUT", 4, 9},
		{ErrCorrupt, "CORRUPT", 3, 2},
		{nil, "INTERNAL", 13, 1},
	}
}

// FailureOf returns err's row of the table.
func FailureOf(err error) Failure {
	table := Failures()
	for _, f := range table {
		if f.Sentinel != nil && errors.Is(err, f.Sentinel) {
			return f
		}
	}
	return table[len(table)-1]
}

// FieldError is bad input, with the field that has it. It wraps ErrInvalid
// unless Err says otherwise.
type FieldError struct {
	// Field is its path as in the API: spec.mounts[0].source.
	Field string
	// Problem says what is wrong and what would be right.
	Problem string
	// Err is the sentinel to wrap; nil: ErrInvalid.
	Err error
}

func (e *FieldError) Error() string { return e.Field + ": " + e.Problem }

func (e *FieldError) Unwrap() error {
	if e.Err == nil {
		return ErrInvalid
	}
	return e.Err
}

// Invalidf returns a *FieldError.
func Invalidf(field, format string, args ...any) error {
	return &FieldError{Field: field, Problem: fmt.Sprintf(format, args...)}
}

// Unsupportedf returns a *FieldError for something that is right in itself,
// but that this agent, driver or host cannot do.
func Unsupportedf(field, format string, args ...any) error {
	return &FieldError{Field: field, Problem: fmt.Sprintf(format, args...), Err: ErrUnsupported}
}

// UnavailableError is a backend that does not work here. It wraps
// ErrUnavailable and Err.
type UnavailableError struct {
	Err error
	// Cure is the command, or the one step, that mends it; may be empty.
	Cure string
}

func (e *UnavailableError) Error() string { return e.Err.Error() }

func (e *UnavailableError) Unwrap() []error { return []error{ErrUnavailable, e.Err} }

// RetryError is an error that passes by itself. It wraps Err.
type RetryError struct {
	Err error
	// After is how long to wait before trying again.
	After time.Duration
}

func (e *RetryError) Error() string { return e.Err.Error() }

func (e *RetryError) Unwrap() error { return e.Err }
