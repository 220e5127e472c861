// Package telemetry tells outsiders how the agent does: metrics for Prometheus
// to fetch, and traces sent to an OpenTelemetry collector. Both see methods,
// codes and times, and never a request's content. Neither is on by default.
package telemetry
