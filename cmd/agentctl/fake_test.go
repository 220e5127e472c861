package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

// fakeAgent is a small agent for tests: it keeps sandboxes in memory, runs
// their commands as real child processes, and serves the real API on a real
// socket. Its state outlives stop and start, as the agent's does.
type fakeAgent struct {
	agentv1.UnimplementedSandboxServiceServer
	agentv1.UnimplementedImageServiceServer
	agentv1.UnimplementedHostServiceServer
	agentv1.UnimplementedExecServiceServer
	agentv1.UnimplementedFileServiceServer
	agentv1.UnimplementedPortServiceServer
	agentv1.UnimplementedSecretServiceServer
	agentv1.UnimplementedStatsServiceServer

	disk string // the folder with the sandboxes' files
	// snapshots are of the one disk that all sandboxes share.
	snapshots []*agentv1.DiskSnapshot

	began time.Time

	network, address string
	tls              *tls.Config // nil: plain

	mu        sync.Mutex
	sandboxes map[string]*fakeSandbox
	images    []*agentv1.Image
	answers   map[string]fakeAnswer
	changes   []*agentv1.WatchSandboxesResponse
	forgotten int           // changes before this one are gone
	changed   chan struct{} // closed at each change
	draining  bool
	cut       bool  // the next mutation does its work and loses its connection
	refuse    error // what the next mutation is refused with
	mutations int

	noPrograms []string // that are in no sandbox
	archive    []byte   // what downloads have, whatever was asked for

	server *grpc.Server
	served chan struct{}
}

type fakeAnswer struct {
	request []byte
	answer  proto.Message
}

func newFakeAgent(network, address string) *fakeAgent {
	return &fakeAgent{
		network: network, address: address, disk: filepath.Join(filepath.Dir(address), "disk"), began: time.Now().Add(-time.Hour),
		sandboxes: map[string]*fakeSandbox{}, answers: map[string]fakeAnswer{},
		changed: make(chan struct{}),
		images: []*agentv1.Image{{
			Id: "sha256:" + strings.Repeat("ab", 32), Names: []string{"localhost/app:1"}, SizeBytes: 5 << 20,
			CreateTime: timestamppb.New(time.Now().Add(-72 * time.Hour)),
		}},
	}
}

// start serves; it replaces a socket that was left behind.
func (f *fakeAgent) start() error {
	if f.network == "unix" {
		_ = os.Remove(f.address)
	}
	listener, err := net.Listen(f.network, f.address)
	if err != nil {
		return err
	}
	if u, ok := listener.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	creds := insecure.NewCredentials()
	if f.tls != nil {
		creds = credentials.NewTLS(f.tls)
	}
	server := grpc.NewServer(grpc.Creds(creds), grpc.UnaryInterceptor(f.unary))
	agentv1.RegisterSandboxServiceServer(server, f)
	agentv1.RegisterImageServiceServer(server, f)
	agentv1.RegisterHostServiceServer(server, f)
	agentv1.RegisterExecServiceServer(server, f)
	agentv1.RegisterFileServiceServer(server, f)
	agentv1.RegisterPortServiceServer(server, f)
	agentv1.RegisterSecretServiceServer(server, f)
	agentv1.RegisterStatsServiceServer(server, f)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.address = listener.Addr().String()
	f.server, f.served = server, make(chan struct{})
	go func(served chan struct{}) {
		defer close(served)
		_ = server.Serve(listener)
	}(f.served)
	return nil
}

// stop ends all connections at once, as a crash does; sandboxes run on.
func (f *fakeAgent) stop() {
	f.mu.Lock()
	server, served := f.server, f.served
	f.mu.Unlock()
	server.Stop()
	<-served
}

// close stops everything.
func (f *fakeAgent) close() {
	f.stop()
	f.mu.Lock()
	all := make([]*fakeSandbox, 0, len(f.sandboxes))
	for _, sb := range f.sandboxes {
		all = append(all, sb)
	}
	f.mu.Unlock()
	for _, sb := range all {
		sb.kill()
	}
}

// serveFake serves a fake agent for a test of Go, on a unix socket.
func serveFake(t *testing.T) *fakeAgent {
	t.Helper()
	dir, err := os.MkdirTemp("", "agentctl") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	f := newFakeAgent("unix", dir+"/agent.sock")
	if err := f.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.close()
		_ = os.RemoveAll(dir)
	})
	return f
}

// fail makes an error as the agent's server does.
func fail(err error, name string) error {
	row := sandbox.FailureOf(err)
	info := &errdetails.ErrorInfo{Reason: row.Reason, Domain: "choiros.agent", Metadata: map[string]string{}}
	details := []protoadapt.MessageV1{info}
	if name != "" {
		info.Metadata["sandbox"] = name
	}
	if field, ok := asType[*sandbox.FieldError](err); ok {
		info.Metadata["field"] = field.Field
	}
	if broken, ok := asType[*sandbox.UnavailableError](err); ok {
		info.Metadata["cure"] = broken.Cure
	}
	if retry, ok := asType[*sandbox.RetryError](err); ok {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(retry.After)})
	}
	s, detailErr := status.New(codes.Code(row.Code), err.Error()).WithDetails(details...)
	if detailErr != nil {
		return detailErr
	}
	return s.Err()
}

// unary gives mutations what all have: request ids, and the faults that tests
// ask for.
func (f *fakeAgent) unary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	mutation, ok := req.(interface {
		proto.Message
		GetRequestId() string
	})
	if !ok {
		return handle(ctx, req)
	}
	id, request := mutation.GetRequestId(), []byte(nil)
	request, err := proto.MarshalOptions{Deterministic: true}.Marshal(mutation)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.mutations++
	known, seen := f.answers[id]
	refuse, cut := f.refuse, f.cut
	f.refuse, f.cut = nil, false
	f.mu.Unlock()
	switch {
	case id == "":
		return nil, fail(sandbox.Invalidf("request_id", "is missing: every mutation of agentctl has one"), "")
	case refuse != nil:
		return nil, refuse
	case seen && !bytes.Equal(known.request, request):
		return nil, fail(fmt.Errorf("request %s: %w", id, sandbox.ErrRequestReused), "")
	case seen:
		return known.answer, nil
	}
	answer, err := handle(context.WithoutCancel(ctx), req)
	if err == nil {
		f.mu.Lock()
		f.answers[id] = fakeAnswer{request, answer.(proto.Message)}
		f.mu.Unlock()
	}
	if cut {
		go func() {
			f.stop()
			_ = f.start()
		}()
		<-ctx.Done()
	}
	return answer, err
}

// record adds a change for watchers; f.mu is held.
func (f *fakeAgent) record(change *agentv1.WatchSandboxesResponse) {
	change.Version = fmt.Sprint(len(f.changes) + 1)
	f.changes = append(f.changes, change)
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fakeAgent) ListSandboxes(_ context.Context, req *agentv1.ListSandboxesRequest) (*agentv1.ListSandboxesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	key, value, _ := strings.Cut(req.GetLabelSelector(), "=")
	var all []*agentv1.Sandbox
	for _, name := range sortedNames(f.sandboxes) {
		sb := f.sandboxes[name].message()
		if name > req.GetPageToken() && (key == "" || sb.GetLabels()[key] == value) {
			all = append(all, sb)
		}
	}
	const pageSize = 2 // small, so that tests turn pages
	if len(all) > pageSize {
		return &agentv1.ListSandboxesResponse{Sandboxes: all[:pageSize], NextPageToken: all[pageSize-1].GetName()}, nil
	}
	return &agentv1.ListSandboxesResponse{Sandboxes: all}, nil
}

func sortedNames(m map[string]*fakeSandbox) []string {
	var names []string
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (f *fakeAgent) WatchSandboxes(req *agentv1.WatchSandboxesRequest, stream grpc.ServerStreamingServer[agentv1.WatchSandboxesResponse]) error {
	f.mu.Lock()
	next, forgotten := len(f.changes), f.forgotten
	var first []*agentv1.WatchSandboxesResponse
	wanted := func(name string) bool { return req.GetName() == "" || req.GetName() == name }
	for _, name := range sortedNames(f.sandboxes) {
		if wanted(name) {
			first = append(first, &agentv1.WatchSandboxesResponse{Event: &agentv1.WatchSandboxesResponse_Changed{Changed: f.sandboxes[name].message()}})
		}
	}
	f.mu.Unlock()
	first = append(first, &agentv1.WatchSandboxesResponse{
		Event: &agentv1.WatchSandboxesResponse_Sync_{Sync: &agentv1.WatchSandboxesResponse_Sync{}}, Version: fmt.Sprint(next),
	})
	if resume := req.GetResumeVersion(); resume != "" {
		var at int
		if _, err := fmt.Sscan(resume, &at); err != nil {
			return fail(sandbox.Invalidf("resume_version", "is not one of mine"), "")
		}
		if at >= forgotten {
			next, first = at, nil
		} else {
			first = append([]*agentv1.WatchSandboxesResponse{{Event: &agentv1.WatchSandboxesResponse_Reset_{Reset_: &agentv1.WatchSandboxesResponse_Reset{}}}}, first...)
		}
	}
	for _, event := range first {
		if err := stream.Send(event); err != nil {
			return err
		}
	}
	for {
		f.mu.Lock()
		news, changed := slices.Clone(f.changes[next:]), f.changed
		f.mu.Unlock()
		for _, event := range news {
			next++
			if name := orElse(event.GetChanged().GetName(), event.GetDeleted().GetName()); !wanted(name) {
				continue
			}
			if err := stream.Send(event); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}
