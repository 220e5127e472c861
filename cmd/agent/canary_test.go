package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

// canaries are secrets that nobody but the workload may have, and what they
// would look like if somebody had.
type canaries struct {
	values map[string]string
	texts  [][]byte
}

func newCanaries(names ...string) *canaries {
	c := &canaries{values: map[string]string{}}
	for _, name := range names {
		value := "canary" + rand.Text()
		c.values[name] = value
		c.texts = append(c.texts, disguises(value)...)
	}
	return c
}

// disguises are a value as it is, in hex, and in base64 wherever in a longer
// text it may lie.
func disguises(value string) [][]byte {
	texts := [][]byte{[]byte(value), []byte(hex.EncodeToString([]byte(value))), []byte(strings.ToUpper(hex.EncodeToString([]byte(value))))}
	for shift := range 3 {
		whole := base64.RawStdEncoding.EncodeToString([]byte(strings.Repeat("-", shift) + value))
		// Neither end, which depends on the neighbours.
		texts = append(texts, []byte(whole[(8*shift+5)/6:len(whole)-2]))
	}
	return texts
}

// in reports whether one of them is in a text.
func (c *canaries) in(text []byte) bool {
	return slices.ContainsFunc(c.texts, func(one []byte) bool { return bytes.Contains(text, one) })
}

func TestCanariesAreFoundInDisguise(t *testing.T) {
	t.Parallel()
	c := newCanaries("one", "two")
	for _, around := range []string{"", "a", "ab", "abc"} {
		text := []byte(around + c.values["two"] + around + "etc")
		for kind, shown := range map[string]string{
			"plain": string(text), "hex": hex.EncodeToString(text), "HEX": fmt.Sprintf("%X", text),
			"base64": base64.StdEncoding.EncodeToString(text), "base64url": base64.URLEncoding.EncodeToString(text),
		} {
			if !c.in([]byte(shown)) {
				t.Errorf("not found in %s: %s", kind, shown)
			}
		}
	}
	if c.in([]byte("canary")) {
		t.Error("found where it is not")
	}
}

// witness is who sees all that the agent says and shows while it runs.
type witness struct {
	t     *testing.T
	c     *canaries
	mu    sync.Mutex
	heard int
}

// hear looks at something that was said.
func (w *witness) hear(where string, text []byte) {
	w.t.Helper()
	w.mu.Lock()
	w.heard++
	w.mu.Unlock()
	if w.c.in(text) {
		w.t.Errorf("a secret is in %s", where)
	}
}

// unary and stream are a client's interceptors that hear all answers, whole and
// in text, and all errors with their details. What a command prints is for
// whoever asked.
func (w *witness) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoke(ctx, method, req, reply, cc, opts...)
	w.answer(method, reply, err)
	return err
}

func (w *witness) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	stream, err := streamer(ctx, desc, cc, method, opts...)
	if err != nil || strings.HasSuffix(method, "/Exec") {
		return stream, err
	}
	return &heardStream{stream, w, method}, nil
}

type heardStream struct {
	grpc.ClientStream
	w      *witness
	method string
}

func (s *heardStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	s.w.answer(s.method, m, err)
	return err
}

func (w *witness) answer(method string, reply any, err error) {
	w.t.Helper()
	if err != nil {
		w.hear("an error of "+method, fmt.Appendf(nil, "%v %+v", err, status.Convert(err).Details()))
		return
	}
	if m, ok := reply.(proto.Message); ok {
		raw, _ := proto.Marshal(m)
		w.hear("an answer of "+method, append(raw, prototext.Format(m)...))
	}
}

// heardSpans is a collector of traces.
type heardSpans struct {
	collector.UnimplementedTraceServiceServer
	w *witness
}

func (s *heardSpans) Export(_ context.Context, req *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	s.w.answer("a trace", req, nil)
	return &collector.ExportTraceServiceResponse{}, nil
}

// watchCommandLines looks at every process's arguments, again and again, until
// ctx ends.
func (w *witness) watchCommandLines(ctx context.Context) {
	for ctx.Err() == nil {
		lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, path := range lines {
			line, _ := os.ReadFile(path) // gone
			w.hear("the arguments "+strings.ReplaceAll(string(line), "\x00", " "), line)
		}
		select {
		case <-time.After(25 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// canaryHost is an agent that tells a witness everything it ever would tell
// anybody.
func canaryHost(t *testing.T, b backend, w *witness) (h *crashHost, metrics string) {
	t.Helper()
	var config net.ListenConfig
	listener, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	collector.RegisterTraceServiceServer(server, &heardSpans{w: w})
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	metrics = "127.0.0.1:" + freePort(t)
	h = newCrashHost(t, b)
	h.flags = []string{"--log-level", "debug", "--metrics-listen", metrics, "--traces-otlp-endpoint", "http://" + listener.Addr().String()}
	conn, err := grpc.NewClient("unix://"+h.socket, h.dialOptions(
		grpc.WithUnaryInterceptor(w.unary), grpc.WithStreamInterceptor(w.stream))...)
	if err != nil {
		t.Fatal(err)
	}
	_ = h.conn.Close()
	h.conn = conn
	h.start()
	return h, metrics
}

// TestCanarySecretIsNowhere gives a workload a secret of every kind that a host
// has by itself, and looks for them everywhere else.
func TestCanarySecretIsNowhere(t *testing.T) {
	onBackends(t, func(t *testing.T, b backend) {
		c := newCanaries("variable", "other", "file", "inline", "pushed", "stray")
		w := &witness{t: t, c: c}
		h, metrics := canaryHost(t, b, w)
		watching, cancel := context.WithCancel(t.Context())
		var watch sync.WaitGroup
		watch.Go(func() { w.watchCommandLines(watching) })
		defer watch.Wait()
		defer cancel()

		sources := t.TempDir()
		write := func(name, content string, mode os.FileMode) string {
			path := filepath.Join(sources, name)
			if err := errors.Join(os.WriteFile(path, []byte(content), mode), os.Chmod(path, mode)); err != nil {
				t.Fatal(err)
			}
			return path
		}
		one := write("one.env", "CANARY="+c.values["variable"]+"\n", 0o600)
		all := write("all.env", "OTHER='"+c.values["other"]+"'\n", 0o600)
		file := write("file", c.values["file"], 0o600)
		spec := h.served("web", 0)
		spec.Secrets = []*agentv1.SecretRef{
			{Name: "CANARY", Source: "env-file:" + one},
			{Name: "*", Source: "env-file:" + all},
			{Name: "canary", Source: "file:" + file, File: b.name == "podman"},
			{Name: "INLINE", Source: "inline:inline"},
		}
		if _, err := h.client().CreateSandbox(t.Context(), &agentv1.CreateSandboxRequest{
			Sandbox: &agentv1.Sandbox{Name: "web", Spec: spec}, Start: true, RequestId: "create-web",
			SecretValues: map[string][]byte{"inline": []byte(c.values["inline"])},
		}); err != nil {
			t.Fatal(err)
		}
		h.hasCanaries(t, c, "variable", "other", "file", "inline")
		failingSources(t, h, c, write)
		// Rotation takes another way.
		write("one.env", "CANARY="+c.values["pushed"]+"\n", 0o600)
		pushed, err := agentv1.NewSecretServiceClient(h.conn).PushSecrets(t.Context(), &agentv1.PushSecretsRequest{Name: "web"})
		if err != nil || len(pushed.GetDeliveries()) != 1 || !slices.Equal(pushed.GetDeliveries()[0].GetChanged(), []string{"CANARY"}) {
			t.Fatalf("pushed: %v, %v", pushed, err)
		}
		h.hasCanaries(t, c, "pushed")
		h.reach("web", endpoint(h.get("web"), h.guestPort(0)))
		askEverything(t, h, w, metrics)
		if b.name == "podman" {
			lookAtContainer(t, h, w)
			seesWritableLayer(t, h)
		}
		lookOnDisk(t, h, w)
		if _, err := h.client().StopSandbox(t.Context(), &agentv1.StopSandboxRequest{Name: "web", RequestId: "stop-web"}); err != nil {
			t.Error(err)
		}
		lookOnDisk(t, h, w)
		h.delete("web")
		askEverything(t, h, w, metrics)
		lookOnDisk(t, h, w)
		cancel()
		watch.Wait()
		if w.heard < 100 {
			t.Errorf("only %d things were looked at", w.heard)
		}
	})
}

// hasCanaries checks that the workload has its secrets, or their absence
// elsewhere proves nothing.
func (h *crashHost) hasCanaries(t *testing.T, c *canaries, names ...string) {
	t.Helper()
	read := map[string][]string{
		"variable": h.backend.variable("CANARY"), "pushed": h.backend.variable("CANARY"),
		"other": h.backend.variable("OTHER"), "inline": h.backend.variable("INLINE"),
		"file": h.backend.command("cat", "/run/secrets/canary"),
	}
	if h.backend.name != "podman" {
		read["file"] = h.backend.variable("canary") // there is no tmpfs of its own
	}
	for _, name := range names {
		if out, err := h.output("web", read[name]...); err != nil || !strings.Contains(out, c.values[name]) {
			t.Errorf("the workload has %q for the secret %q, %v", out, name, err)
		}
	}
}

// failingSources asks for secrets that cannot be had, from sources with a
// canary in them: no error repeats what it has read.
func failingSources(t *testing.T, h *crashHost, c *canaries, write func(name, content string, mode os.FileMode) string) {
	t.Helper()
	stray := c.values["stray"]
	for i, ref := range []*agentv1.SecretRef{
		{Name: "A", Source: "env-file:" + write("open.env", "A="+stray+"\n", 0o644)},
		{Name: "A", Source: "env-file:" + write("other.env", "B="+stray+"\n", 0o600)},
		{Name: "A", Source: "env-file:" + write("broken.env", stray+"\nA=\""+stray+"\n", 0o600)},
		{Name: "A", Source: "env-file:" + write("names.env", stray+" "+stray+"="+stray+"\n'"+stray, 0o600)},
		{Name: "A", Source: "file:" + write("binary", stray+"\x00"+stray, 0o600)},
		{Name: "A", Source: "file:" + write("open", stray, 0o666)},
		{Name: "A", Source: "sops:" + write("not.yaml", stray+": ["+stray, 0o600) + "#key"},
		{Name: "A", Source: "sops:" + write("plain.yaml", "key: "+stray+"\n", 0o600) + "#key"},
		{Name: "A", Source: "sops:" + write("not.json", "{\""+stray+"\": "+stray+"}", 0o600) + "#key"},
		{Name: "A", Source: "sops:" + write("false.yaml", "key: "+stray+"\nsops:\n  mac: "+stray+"\n  version: "+stray+"\n", 0o600) + "#key"},
		{Name: "A", Source: "age:" + write("not.age", stray+"\n"+stray, 0o600)},
		{Name: "A", Source: "age:" + write("false.age", "age-encryption.org/v1\n-> X25519 "+stray+"\n"+stray+"\n--- "+stray+"\n", 0o600)},
	} {
		spec := h.served("bad", 1)
		spec.Secrets = []*agentv1.SecretRef{ref}
		_, err := h.client().CreateSandbox(t.Context(), &agentv1.CreateSandboxRequest{
			Sandbox: &agentv1.Sandbox{Name: "bad", Spec: spec}, Start: true, RequestId: fmt.Sprint("bad-", i),
		})
		if err == nil {
			t.Errorf("started with a secret from %s", filepath.Base(ref.GetSource()))
		}
		t.Logf("%s: %v", filepath.Base(ref.GetSource()), err)
		// With it left out the reason is kept, and shown.
		ref.Optional = true
		_, err = h.client().CreateSandbox(t.Context(), &agentv1.CreateSandboxRequest{
			Sandbox: &agentv1.Sandbox{Name: "lax", Spec: spec}, Start: true,
		})
		if err == nil {
			_, _ = agentv1.NewSecretServiceClient(h.conn).ListSecrets(t.Context(), &agentv1.ListSecretsRequest{Name: "lax"})
		}
		for _, name := range []string{"bad", "lax"} {
			_, _ = h.client().DeleteSandbox(t.Context(), &agentv1.DeleteSandboxRequest{Name: name, AllowMissing: true})
		}
	}
	secrets := agentv1.NewSecretServiceClient(h.conn)
	if _, err := secrets.SetSecrets(t.Context(), &agentv1.SetSecretsRequest{
		Name: "web", Values: map[string][]byte{"none": []byte(stray)},
	}); err == nil {
		t.Error("a value for no secret was taken")
	}
	if _, err := secrets.SetSecrets(t.Context(), &agentv1.SetSecretsRequest{
		Name: "none", Values: map[string][]byte{"inline": []byte(stray)},
	}); err == nil {
		t.Error("a value for no sandbox was taken")
	}
}

// askEverything has the agent say all that it says about a sandbox.
func askEverything(t *testing.T, h *crashHost, w *witness, metrics string) {
	t.Helper()
	ctx := t.Context()
	_, _ = h.client().GetSandbox(ctx, &agentv1.GetSandboxRequest{Name: "web"}) // after its end an error
	_, _ = agentv1.NewSecretServiceClient(h.conn).ListSecrets(ctx, &agentv1.ListSecretsRequest{Name: "web"})
	_, _ = agentv1.NewPortServiceClient(h.conn).ListPorts(ctx, &agentv1.ListPortsRequest{Name: "web"})
	_, _ = execs(h, "web")
	if _, err := h.client().ListSandboxes(ctx, &agentv1.ListSandboxesRequest{}); err != nil {
		t.Error(err)
	}
	_, _ = agentv1.NewHostServiceClient(h.conn).GetInfo(ctx, &agentv1.GetInfoRequest{})
	bounded, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if stream, err := h.client().WatchSandboxes(bounded, &agentv1.WatchSandboxesRequest{}); err == nil {
		for err == nil {
			_, err = stream.Recv()
		}
	}
	resp, err := http.Get("http://" + metrics + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || len(body) == 0 {
		t.Errorf("metrics: %d bytes, %v", len(body), err)
	}
	w.hear("the metrics", body)
}

// lookAtContainer looks at what Podman and the kernel show of a container.
func lookAtContainer(t *testing.T, h *crashHost, w *witness) {
	t.Helper()
	name := containerName(t, h, "web")
	w.hear("podman inspect", []byte(podmanSays(t, "inspect", name)))
	w.hear("podman logs", []byte(podmanSays(t, "logs", name)))
	w.hear("podman ps", []byte(podmanSays(t, "ps", "--all", "--format", "json")))
	guestd := firstProcess(t, h, "web")
	inside := members(t, guestd)
	h.mu.Lock()
	agent := h.cmd.Process.Pid
	h.mu.Unlock()
	for _, pid := range append(inside, agent) {
		limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
		if err != nil || !coreDumpsOff(string(limits)) {
			t.Errorf("process %d may dump its memory: %v", pid, err)
		}
	}
	// The workload's environment has it, and nobody else's.
	workload := 0
	all, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, path := range all {
		environ, err := os.ReadFile(path)
		if err != nil || !w.c.in(environ) {
			continue
		}
		var pid int
		_, _ = fmt.Sscanf(path, "/proc/%d/environ", &pid)
		if pid == guestd || !slices.Contains(inside, pid) {
			t.Errorf("a secret is in %s", path)
		} else {
			workload++
		}
	}
	if workload == 0 {
		t.Error("the workload's environment has no secret")
	}
}

// seesWritableLayer checks that what a sandbox writes is where it is looked for.
func seesWritableLayer(t *testing.T, h *crashHost) {
	t.Helper()
	mark := rand.Text()
	if out, err := h.output("web", h.backend.command("touch", "/etc/"+mark)...); err != nil {
		t.Errorf("%q, %v", out, err)
		return
	}
	found := false
	_ = filepath.WalkDir(podmanSays(t, "info", "--format", "{{.Store.GraphRoot}}"), func(path string, _ os.DirEntry, _ error) error {
		found = found || filepath.Base(path) == mark
		return nil
	})
	if !found {
		t.Error("the container's writable layer is not below the graph root, or cannot be read")
	}
}

// coreDumpsOff reads proc_pid_limits(5).
func coreDumpsOff(limits string) bool {
	for line := range strings.Lines(limits) {
		if rest, ok := strings.CutPrefix(line, "Max core file size"); ok {
			f := strings.Fields(rest)
			return len(f) >= 2 && f[0] == "0" && f[1] == "0"
		}
	}
	return false
}

// lookOnDisk looks at all that the agent, Podman and the sandbox have written.
func lookOnDisk(t *testing.T, h *crashHost, w *witness) {
	t.Helper()
	dirs := []string{h.dir}
	if h.backend.name == "podman" {
		dirs = append(dirs, podmanSays(t, "info", "--format", "{{.Store.GraphRoot}}"),
			podmanSays(t, "info", "--format", "{{.Store.RunRoot}}"), filepath.Join(os.Getenv("XDG_RUNTIME_DIR"), "containers"),
			filepath.Join(os.Getenv("XDG_RUNTIME_DIR"), "libpod"), filepath.Join(os.Getenv("XDG_RUNTIME_DIR"), "crun"))
	}
	for _, dir := range dirs {
		found, read, err := grepTree(dir, w.c.texts...)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
		if len(found) > 0 {
			t.Errorf("a secret is in %v", found)
		}
		t.Logf("%s: %d files", dir, read)
	}
	// What is known to be there is found, or the search is blind.
	if found, _, err := grepTree(h.dir, []byte(secretValue)); err != nil || len(found) == 0 {
		t.Errorf("the search finds nothing, not even in the file of secrets: %v", err)
	}
}
