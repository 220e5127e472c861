package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"runtime/debug"
	"strings"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/choiros/agent/internal/manager"
	"github.com/choiros/agent/internal/sandbox"
)

// maxRequestID is in characters.
const maxRequestID = 128

// answerOf is a message type that once can make.
type answerOf[T any] interface {
	*T
	proto.Message
}

// once runs a mutation under its request id, or returns the answer that the
// same request was given before. Without an id it just runs it.
func once[T any, A answerOf[T]](
	ctx context.Context, m *manager.Manager, id string, req proto.Message,
	run func(context.Context, manager.Request) (A, error),
) (A, error) {
	if err := checkRequestID(id); err != nil {
		return nil, err
	}
	if id == "" {
		return run(ctx, manager.Request{})
	}
	request := manager.Request{ID: id, Fingerprint: fingerprint(req)}
	data, err := m.Once(ctx, request, func(ctx context.Context) (data []byte, err error) {
		// This may run in a goroutine of the manager's, out of reach of the
		// interceptor that recovers.
		defer recovered(&err)
		answer, err := run(ctx, request)
		if err != nil {
			return nil, err
		}
		return proto.Marshal(answer)
	})
	if err != nil {
		return nil, err
	}
	answer := A(new(T))
	if err := proto.Unmarshal(data, answer); err != nil {
		return nil, fmt.Errorf("kept answer of request %s: %w", id, err)
	}
	return answer, nil
}

// checkRequestID refuses ids that would not do in a record or a log.
func checkRequestID(id string) error {
	if utf8.RuneCountInString(id) > maxRequestID {
		return sandbox.Invalidf("request_id", "is longer than %d characters", maxRequestID)
	}
	if strings.ContainsFunc(id, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return sandbox.Invalidf("request_id", "has characters that cannot be printed")
	}
	return nil
}

// fingerprint tells requests apart: the SHA-256 of the message's name and its
// deterministic form without the request id. The values of secrets are left
// out too: it is recorded, and a hash of something short gives it away.
func fingerprint(req proto.Message) string {
	bare := proto.Clone(req)
	m := bare.ProtoReflect()
	for _, name := range []protoreflect.Name{"request_id", "secret_values"} {
		if field := m.Descriptor().Fields().ByName(name); field != nil {
			m.Clear(field)
		}
	}
	hash := sha256.New()
	fmt.Fprintf(hash, "%s\n", m.Descriptor().FullName())
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(bare)
	if err != nil {
		// Only strings that are not UTF-8 fail, and those were refused when
		// the request was read.
		panic(fmt.Sprintf("fingerprint of %s: %v", m.Descriptor().FullName(), err))
	}
	hash.Write(data)
	return hex.EncodeToString(hash.Sum(nil))
}

// panicError is a panic of one request's, turned into an error.
type panicError struct {
	value any
	stack []byte
}

func (e *panicError) Error() string { return fmt.Sprintf("panic: %v", e.value) }

// recovered, deferred, turns a panic into a *panicError.
func recovered(err *error) {
	if value := recover(); value != nil {
		*err = &panicError{value: value, stack: debug.Stack()}
	}
}

// refuseUnknown refuses a request with fields that this agent does not know:
// a newer client's wish is never accepted and ignored.
func refuseUnknown(m protoreflect.Message, path string) error {
	if unknown := m.GetUnknown(); len(unknown) > 0 {
		field := strings.TrimPrefix(path, "sandbox.")
		if field == "" {
			field = "request"
		}
		number, _, _ := protowire.ConsumeTag(unknown)
		return sandbox.Unsupportedf(field, "has field number %d, which this agent does not know; it is older than its client", number)
	}
	var err error
	m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		at := string(field.Name())
		if path != "" {
			at = path + "." + at
		}
		err = refuseUnknownIn(field, value, at)
		return err == nil
	})
	return err
}

func refuseUnknownIn(field protoreflect.FieldDescriptor, value protoreflect.Value, path string) error {
	// Maps of this API hold no messages, and the well-known types do not grow.
	if field.IsMap() || field.Message() == nil || field.Message().ParentFile().Package() == "google.protobuf" {
		return nil
	}
	if !field.IsList() {
		return refuseUnknown(value.Message(), path)
	}
	list := value.List()
	for i := range list.Len() {
		if err := refuseUnknown(list.Get(i).Message(), fmt.Sprintf("%s[%d]", path, i)); err != nil {
			return err
		}
	}
	return nil
}
