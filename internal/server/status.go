package server

import (
	"context"
	"errors"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/choiros/agent/internal/sandbox"
)

// ErrorDomain is google.rpc.ErrorInfo.domain of every error of the agent's.
const ErrorDomain = "choiros.agent"

// Reasons of the connection rather than of the request; they have no row in
// sandbox.Failures. See docs/errors.md.
const (
	reasonCancelled = "CANCELLED"
	reasonDeadline  = "DEADLINE_EXCEEDED"
	reasonStopping  = "AGENT_STOPPING"
)

// maxMessage keeps a status in what HTTP/2 header blocks are allowed.
const maxMessage = 4 << 10

// errStopping is the cause of the end of streams when the agent stops.
var errStopping = errors.New("the agent is stopping")

// statusError turns an error into a status error. name is the sandbox that
// the request concerns, or empty. Errors that are statuses already, those of
// the transport, pass.
func statusError(ctx context.Context, err error, name string) error {
	if err == nil {
		return nil
	}
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return err
	}
	code, reason := classify(ctx, err)
	message := validUTF8(err.Error())
	if len(message) > maxMessage {
		message = validUTF8(message[:maxMessage]) + "…"
	}
	info := &errdetails.ErrorInfo{Reason: reason, Domain: ErrorDomain, Metadata: map[string]string{}}
	details := []protoadapt.MessageV1{info}
	if sandbox.ValidateName("name", name) == nil {
		info.Metadata["sandbox"] = name
	}
	if field, ok := errors.AsType[*sandbox.FieldError](err); ok {
		path, problem := validUTF8(field.Field), validUTF8(field.Problem)
		info.Metadata["field"] = path
		details = append(details, &errdetails.BadRequest{
			FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: path, Description: problem}},
		})
	}
	if broken, ok := errors.AsType[*sandbox.UnavailableError](err); ok && broken.Cure != "" {
		info.Metadata["cure"] = validUTF8(broken.Cure)
	}
	if retry, ok := errors.AsType[*sandbox.RetryError](err); ok {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(retry.After)})
	}
	plain := status.New(code, message)
	detailed, err := plain.WithDetails(details...)
	if err != nil {
		return plain.Err()
	}
	return detailed.Err()
}

// classify finds an error's code and reason. The domain's own sentinels win
// over the ends of contexts that they may wrap.
func classify(ctx context.Context, err error) (codes.Code, string) {
	row := sandbox.FailureOf(err)
	if row.Sentinel != nil {
		return codes.Code(row.Code), row.Reason
	}
	switch {
	case errors.Is(err, errStopping), ctx.Err() != nil && errors.Is(context.Cause(ctx), errStopping):
		return codes.Unavailable, reasonStopping
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		return codes.Canceled, reasonCancelled
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() != nil:
		return codes.DeadlineExceeded, reasonDeadline
	default:
		return codes.Code(row.Code), row.Reason
	}
}

// validUTF8 makes text fit for a string field: what a driver says may be
// anything.
func validUTF8(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
