package server_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

func TestListInPages(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{Drivers: processes(t)})
	c := dial(t, agent)
	var want []string
	for i := range 7 {
		spec := process.Spec("sleep")
		if i > 4 { // so big that a page does not hold two
			spec.Command = append(spec.Command, slices.Repeat([]string{strings.Repeat("x", 120)}, 1000)...)
		}
		want = append(want, mustCreate(t, c, fmt.Sprintf("s%d", i), spec, false).GetName())
	}
	for _, size := range []int32{0, 1, 3, 7, 5000} {
		var got []string
		for token := ""; ; {
			page, err := c.sandboxes.ListSandboxes(t.Context(), &agentv1.ListSandboxesRequest{
				PageSize: size, PageToken: token, LabelSelector: "all",
			})
			if err != nil {
				t.Fatal(err)
			}
			for _, sb := range page.GetSandboxes() {
				got = append(got, sb.GetName())
			}
			if size > 0 && len(page.GetSandboxes()) > int(size) {
				t.Errorf("a page of %d has %d", size, len(page.GetSandboxes()))
			}
			if token = page.GetNextPageToken(); token == "" {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("in pages of %d: %v", size, got)
		}
	}
	first, err := c.sandboxes.ListSandboxes(t.Context(), &agentv1.ListSandboxesRequest{PageSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.sandboxes.ListSandboxes(t.Context(), &agentv1.ListSandboxesRequest{
		LabelSelector: "name=s1", PageToken: first.GetNextPageToken(),
	})
	wantError(t, err, codes.InvalidArgument, "INVALID", "page_token")
}

func TestWatchTellsStateThenChangesAndResumes(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{Drivers: processes(t)})
	c := dial(t, agent)
	mustCreate(t, c, "a", process.Spec("sleep"), false)
	mustCreate(t, c, "b", process.Spec("sleep"), false)
	stream, err := c.sandboxes.WatchSandboxes(t.Context(), &agentv1.WatchSandboxesRequest{LabelSelector: "name=a"})
	if err != nil {
		t.Fatal(err)
	}
	next := func() *agentv1.WatchSandboxesResponse {
		t.Helper()
		event, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return event
	}
	if event := next(); event.GetChanged().GetName() != "a" || event.GetVersion() != "" {
		t.Errorf("first = %v", event)
	}
	sync := next()
	if sync.GetSync() == nil || sync.GetVersion() == "" {
		t.Errorf("second = %v, want a sync", sync)
	}
	if _, err := c.sandboxes.StartSandbox(t.Context(), &agentv1.StartSandboxRequest{Name: "a"}); err != nil {
		t.Fatal(err)
	}
	for event := next(); event.GetChanged().GetStatus().GetPhase() != agentv1.Phase_PHASE_READY; {
		event = next()
	}
	if _, err := c.sandboxes.DeleteSandbox(t.Context(), &agentv1.DeleteSandboxRequest{Name: "a"}); err != nil {
		t.Fatal(err)
	}
	event := next()
	for ; event.GetDeleted() == nil; event = next() {
		if event.GetChanged().GetName() != "a" {
			t.Errorf("event = %v", event)
		}
	}
	if event.GetDeleted().GetName() != "a" || event.GetDeleted().GetUid() == "" {
		t.Errorf("deleted = %v", event)
	}
	// Resumed from the sync marker, the same changes come again.
	stream, err = c.sandboxes.WatchSandboxes(t.Context(), &agentv1.WatchSandboxesRequest{
		LabelSelector: "name=a", ResumeVersion: sync.GetVersion(),
	})
	if err != nil {
		t.Fatal(err)
	}
	var seen int
	for event = next(); event.GetDeleted() == nil; event = next() {
		if event.GetReset_() != nil {
			t.Fatal("a reset where none is needed")
		}
		if event.GetChanged() != nil {
			seen++
		}
	}
	if seen == 0 {
		t.Error("no changes came again")
	}
	// A version of another agent's leads to a reset.
	stream, err = c.sandboxes.WatchSandboxes(t.Context(), &agentv1.WatchSandboxesRequest{ResumeVersion: "0123456789abcdef.7"})
	if err != nil {
		t.Fatal(err)
	}
	if event := next(); event.GetReset_() == nil || event.GetVersion() != "" {
		t.Errorf("event = %v, want a reset", event)
	}
}
