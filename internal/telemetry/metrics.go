package telemetry

import (
	"context"
	"net/http"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
)

// Sample is the host's state at one moment.
type Sample struct {
	// Sandboxes counts them by phase.
	Sandboxes                          map[string]int
	BootsRunning, BootsWaiting         int
	MemoryTotalMiB, MemoryAvailableMiB uint64
}

// Metrics counts requests and shows samples.
type Metrics struct {
	registry *prometheus.Registry
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	inFlight *prometheus.GaugeVec
}

// NewMetrics makes the metrics of one agent. sample is called at each scrape,
// possibly from several goroutines; if it fails, the scrape lacks the host.
func NewMetrics(version string, sample func() (Sample, error)) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "choiros_agent_requests_total", Help: "Requests that ended, by method and code.",
		}, []string{"method", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "choiros_agent_request_seconds",
			Help: "How long requests took, streams of answers left out.",
			Buckets: []float64{
				.0001, .0005, .001, .005, .01, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60,
			},
		}, []string{"method"}),
		inFlight: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "choiros_agent_requests_in_flight", Help: "Requests under way.",
		}, []string{"method"}),
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "choiros_agent_build_info", Help: "Always 1.",
		ConstLabels: prometheus.Labels{"version": version, "go": runtime.Version()},
	})
	info.Set(1)
	m.registry.MustRegister(m.requests, m.seconds, m.inFlight, info, newHostCollector(sample),
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Handler serves the metrics.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: 4, Timeout: 10 * time.Second,
	})
}

// Requests is told of every request by a gRPC server.
func (m *Metrics) Requests() stats.Handler { return requestCounter{m} }

type requestCounter struct{ *Metrics }

// tagKey is the context's key of what is known of a request.
type tagKey struct{}

type tag struct {
	method  string
	answers bool // a stream of them
}

func (requestCounter) TagRPC(ctx context.Context, info *stats.RPCTagInfo) context.Context {
	return context.WithValue(ctx, tagKey{}, &tag{method: info.FullMethodName})
}

// HandleRPC sees the begin and the end of requests of methods that exist, and
// of no others; so the method may be a label.
func (c requestCounter) HandleRPC(ctx context.Context, event stats.RPCStats) {
	t, ok := ctx.Value(tagKey{}).(*tag)
	if !ok {
		return
	}
	switch event := event.(type) {
	case *stats.Begin:
		t.answers = event.IsServerStream
		c.inFlight.WithLabelValues(t.method).Inc()
	case *stats.End:
		c.inFlight.WithLabelValues(t.method).Dec()
		c.requests.WithLabelValues(t.method, status.Code(event.Error).String()).Inc()
		if !t.answers {
			c.seconds.WithLabelValues(t.method).Observe(event.EndTime.Sub(event.BeginTime).Seconds())
		}
	}
}

func (requestCounter) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (requestCounter) HandleConn(context.Context, stats.ConnStats)                       {}

// hostCollector shows a sample at each scrape.
type hostCollector struct {
	sample                   func() (Sample, error)
	sandboxes, boots, memory *prometheus.Desc
}

func newHostCollector(sample func() (Sample, error)) hostCollector {
	desc := func(name, help, label string) *prometheus.Desc {
		return prometheus.NewDesc("choiros_agent_"+name, help, []string{label}, nil)
	}
	return hostCollector{
		sample:    sample,
		sandboxes: desc("sandboxes", "Sandboxes, by phase.", "phase"),
		boots:     desc("boots", "Boots under way and boots waiting for their turn.", "state"),
		memory:    desc("host_memory_bytes", "The host's memory.", "kind"),
	}
}

func (c hostCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.sandboxes
	ch <- c.boots
	ch <- c.memory
}

func (c hostCollector) Collect(ch chan<- prometheus.Metric) {
	sample, err := c.sample()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(c.sandboxes, err)
		return
	}
	gauge := func(desc *prometheus.Desc, value float64, label string) {
		ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, label)
	}
	for phase, count := range sample.Sandboxes {
		gauge(c.sandboxes, float64(count), phase)
	}
	gauge(c.boots, float64(sample.BootsRunning), "running")
	gauge(c.boots, float64(sample.BootsWaiting), "waiting")
	gauge(c.memory, float64(sample.MemoryTotalMiB<<20), "total")
	gauge(c.memory, float64(sample.MemoryAvailableMiB<<20), "available")
}
