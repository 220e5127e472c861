package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/sandbox"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func record(name string) Record {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	return Record{
		Name: name, UID: "u-" + name, Desired: DesiredRunning, Pending: PendingBoot, Generation: 7,
		Spec: sandbox.Spec{
			Driver: "podman", Image: "localhost/x:latest", Command: []string{"a", "b c"},
			Env:       map[string]string{"K": "v"},
			Readiness: sandbox.Readiness{Exec: []string{"true"}, Timeout: 3 * time.Second},
			Mounts:    []sandbox.Mount{{Kind: sandbox.MountData, Source: "/srv", Target: "/data"}},
		},
		Labels: map[string]string{"app": "web"}, CreatedAt: at, UpdatedAt: at,
		Created: Request{ID: "r1", Fingerprint: "f1"},
	}
}

func TestRecordsSurviveReopening(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	s := open(t, dir)
	owner := s.Owner()
	want := []Record{record("a"), record("b")}
	for _, rec := range want {
		if err := s.Put(rec); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	if s.Owner() != owner {
		t.Errorf("owner was %s and is %s", owner, s.Owner())
	}
	got, err := s.Load()
	if err != nil {
		t.Fatal(err)
	}
	for i := range want {
		want[i].Format = recordFormat
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("records (-put +loaded):\n%s", diff)
	}
	if err := s.Remove("a"); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("a"); err != nil {
		t.Errorf("removing an absent record: %v", err)
	}
	if got, _ = s.Load(); len(got) != 1 || got[0].Name != "b" {
		t.Errorf("after removing a: %v", got)
	}
}

func TestSecondProcessIsRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir)
	_, err := Open(dir)
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("second Open: %v; want ErrLocked naming process %d", err, os.Getpid())
	}
	_ = s.Close()
	open(t, dir)
}

func TestStateOthersCanReadIsRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), "chmod 0700") {
		t.Errorf("Open: %v; want a refusal that says how to mend it", err)
	}
}

func TestUnreadableRecordIsSetAside(t *testing.T) {
	t.Parallel()
	for name, content := range map[string]string{
		"empty":       "",
		"truncated":   `{"format":1,"name":"bad"`,
		"newer":       `{"format":99,"name":"bad"}`,
		"unknown key": `{"format":1,"name":"bad","uid":"u","desired":"running","surprise":1,"spec":{"driver":"d","image":"i"}}`,
		"other name":  `{"format":1,"name":"other","uid":"u","desired":"running","spec":{"driver":"d","image":"i"}}`,
		"bad desired": `{"format":1,"name":"bad","uid":"u","desired":"flying","spec":{"driver":"d","image":"i"}}`,
		"bad spec":    `{"format":1,"name":"bad","uid":"u","desired":"running","spec":{"driver":"d"}}`,
		"binary":      "\x00\x01\x02",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "state")
			s := open(t, dir)
			if err := s.Put(record("good")); err != nil {
				t.Fatal(err)
			}
			if err := os.MkdirAll(s.SandboxDir("bad"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(s.recordPath("bad"), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			for range 2 { // it is still reported the next time
				got, err := s.Load()
				if err != nil || len(got) != 1 || got[0].Name != "good" {
					t.Fatalf("Load: %v, %v; want the good record alone", got, err)
				}
				q := s.Quarantined()
				if len(q) != 1 || q[0].Name != "bad" || q[0].Reason == "" {
					t.Fatalf("quarantined: %+v", q)
				}
				kept, err := os.ReadFile(q[0].Path)
				if err != nil || string(kept) != content {
					t.Fatalf("kept %q, %v; want it unchanged", kept, err)
				}
			}
			if stray, err := s.StrayDirs(); err != nil || len(stray) != 0 {
				t.Errorf("stray: %v, %v; the quarantined one's folder must stay", stray, err)
			}
		})
	}
}

func TestHalfWrittenFilesAreRemoved(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	s := open(t, dir)
	if err := s.Put(record("a")); err != nil {
		t.Fatal(err)
	}
	half := s.recordPath("a") + temporarySuffix
	if err := os.WriteFile(half, []byte(`{"for`), 0o600); err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	s = open(t, dir)
	if _, err := os.Stat(half); !os.IsNotExist(err) {
		t.Errorf("%s is still there", half)
	}
	if got, err := s.Load(); err != nil || len(got) != 1 {
		t.Errorf("Load: %v, %v", got, err)
	}
}

func TestAnswersSurviveReopeningAndTornWrites(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	s := open(t, dir)
	for i := range 3 {
		req := Request{ID: fmt.Sprint("id", i), Fingerprint: fmt.Sprint("f", i)}
		if err := s.PutAnswer(req, []byte{byte(i), 0, 0xff}); err != nil {
			t.Fatal(err)
		}
	}
	_ = s.Close()
	f, err := os.OpenFile(filepath.Join(dir, "answers.jsonl"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"id":"id9","finger`); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	s = open(t, dir)
	for i := range 3 {
		got, found, err := s.Answer(fmt.Sprint("id", i))
		if err != nil || !found || got.Fingerprint != fmt.Sprint("f", i) || !cmp.Equal(got.Body, []byte{byte(i), 0, 0xff}) {
			t.Errorf("answer %d: %+v, %v, %v", i, got, found, err)
		}
	}
	if _, found, _ := s.Answer("id9"); found {
		t.Error("a torn answer counts as given")
	}
	if err := s.PutAnswer(Request{ID: "id9", Fingerprint: "x"}, nil); err != nil {
		t.Fatal(err)
	}
	if got, found, err := s.Answer("id9"); err != nil || !found || got.Fingerprint != "x" {
		t.Errorf("after a torn write: %+v, %v, %v", got, found, err)
	}
}

func TestOldAnswersAreDropped(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "answers.jsonl")
	old := fmt.Sprintf(`{"id":"old","fingerprint":"f","at":%q}`+"\n", time.Now().Add(-25*time.Hour).Format(time.RFC3339Nano))
	recent := fmt.Sprintf(`{"id":"new","fingerprint":"f","at":%q}`+"\n", time.Now().Add(-23*time.Hour).Format(time.RFC3339Nano))
	if err := os.WriteFile(path, []byte(old+recent), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := openAnswers(path, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	defer log.close()
	if len(log.index) != 1 || log.index["new"].length == 0 {
		t.Errorf("kept %v; want only new", log.index)
	}
	if data, _ := os.ReadFile(path); strings.Contains(string(data), "old") {
		t.Error("the file still holds the old answer")
	}
}

func TestHostIntentSurvives(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	s := open(t, dir)
	if err := s.PutHost(Host{Draining: true}); err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	if host, err := open(t, dir).Host(); err != nil || !host.Draining {
		t.Errorf("host: %+v, %v", host, err)
	}
}

// FuzzDecodeRecord: no content of a record file may crash the agent, and what
// is accepted must be accepted again after writing it.
func FuzzDecodeRecord(f *testing.F) {
	f.Add([]byte(`{"format":1,"name":"a","uid":"u","desired":"running","spec":{"driver":"d","image":"i"}}`))
	f.Add([]byte(`{"format":1,"name":"a","uid":"u","desired":"deleted","pending":"stop","spec":{"driver":"d","image":"i","mounts":[{"kind":"data","source":"/a","target":""}]}}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		rec, err := decodeRecord(data, "a")
		if err != nil {
			return
		}
		dir := filepath.Join(t.TempDir(), "state")
		s := open(t, dir)
		if err := s.Put(rec); err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		if got, err := s.Load(); err != nil || len(got) != 1 {
			t.Fatalf("what was written cannot be read: %v, %v, %v", got, err, s.Quarantined())
		}
	})
}
