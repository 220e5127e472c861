package telemetry

import (
	"context"
	"fmt"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc/stats"
)

// Traces sends a span for each request to a collector, in the background:
// nothing waits for it, and what it cannot take is dropped.
type Traces struct{ provider *sdktrace.TracerProvider }

// NewTraces sends to a collector at endpoint, http://HOST:PORT or
// https://HOST:PORT, by OTLP over gRPC. It does not connect yet.
func NewTraces(ctx context.Context, endpoint, version string) (*Traces, error) {
	exporter, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpointURL(endpoint))
	if err != nil {
		return nil, fmt.Errorf("traces to %s: %w", endpoint, err)
	}
	return &Traces{sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter),
		sdktrace.WithResource(resource.NewSchemaless(
			attribute.String("service.name", "choiros-agent"),
			attribute.String("service.version", version),
		)),
	)}, nil
}

// Requests is told of every request by a gRPC server.
func (t *Traces) Requests() stats.Handler {
	return otelgrpc.NewServerHandler(
		otelgrpc.WithTracerProvider(t.provider),
		otelgrpc.WithPropagators(propagation.TraceContext{}),
	)
}

// Shutdown sends what is left, until ctx ends.
func (t *Traces) Shutdown(ctx context.Context) error { return t.provider.Shutdown(ctx) }
