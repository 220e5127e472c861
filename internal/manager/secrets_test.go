package manager

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
	"github.com/choiros/agent/internal/secrets"
)

// resolver reads env files anywhere.
func resolver(t *testing.T) func(*Config) {
	t.Helper()
	r, err := secrets.New(secrets.Config{Forbidden: secrets.DefaultForbidden()})
	if err != nil {
		t.Fatal(err)
	}
	return func(c *Config) { c.Secrets = r }
}

func envFile(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "env")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSecretsAreDeliveredAndRotated(t *testing.T) {
	t.Parallel()
	h := newHost(t, resolver(t))
	file := envFile(t, "SECRET=canary-one\n")
	spec := service(t)
	spec.Secrets = []sandbox.SecretRef{
		{Name: "SECRET", Source: "env-file:" + file},
		{Name: "ABSENT", Source: "env-file:" + file, Optional: true},
	}
	spec.Rotation = sandbox.RotationPolicy{Action: sandbox.RotationSignal, Signal: "HUP"}
	s := h.create("web", spec)
	address := s.Endpoints[0].Address.String()
	if _, said := greeted(t, address); !strings.HasSuffix(said, " canary-one") {
		t.Errorf("the workload has %q", said)
	}
	listed, err := h.m.Secrets(t.Context(), "web")
	if err != nil || len(listed) != 2 || listed[0].Version == "" || listed[1].Missing == "" {
		t.Errorf("%+v, %v", listed, err)
	}
	push := func(force bool) Delivery {
		t.Helper()
		all, err := h.m.PushSecrets(t.Context(), "", Selector{}, force)
		if err != nil || len(all) != 1 || all[0].Err != nil {
			t.Fatalf("%+v, %v", all, err)
		}
		return all[0]
	}
	if d := push(false); len(d.Changed) > 0 || d.Action != "" {
		t.Errorf("nothing changed: %+v", d)
	}
	if err := os.WriteFile(file, []byte("SECRET=canary-two\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if d := push(false); !slices.Equal(d.Changed, []string{"SECRET"}) || d.Action != sandbox.RotationSignal {
		t.Errorf("one changed: %+v", d)
	}
	h.awaitOutput("web") // "hup"
	if now, err := h.m.Secrets(t.Context(), "web"); err != nil || now[0].Version == listed[0].Version {
		t.Errorf("version stays %q, %v", now[0].Version, err)
	}
	// What is started from now on has the new value.
	if out := h.output("web", "sh", "-c", "echo $SECRET"); out != "canary-two\n" {
		t.Errorf("an exec has %q", out)
	}
	for _, path := range []string{h.dir, h.root} {
		if found := grep(t, path, "canary-"); len(found) > 0 {
			t.Errorf("the secret is on disk: %v", found)
		}
	}
}

// grep returns the files below a folder that have a text in them.
func grep(t *testing.T, dir, text string) (found []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return nil //nolint:nilerr // It has gone since.
		}
		data, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(data), text) {
			found = append(found, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestRotationRestarts(t *testing.T) {
	t.Parallel()
	h := newHost(t, resolver(t))
	file := envFile(t, "SECRET=one\n")
	spec := service(t)
	spec.Secrets = []sandbox.SecretRef{{Name: "SECRET", Source: "env-file:" + file}}
	spec.Rotation.Action = sandbox.RotationRestart
	s := h.create("web", spec)
	if err := os.WriteFile(file, []byte("SECRET=two\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	all, err := h.m.PushSecrets(t.Context(), "web", Selector{}, false)
	if err != nil || len(all) != 1 || all[0].Err != nil || all[0].Action != sandbox.RotationRestart {
		t.Fatalf("%+v, %v", all, err)
	}
	if now := h.get("web"); now.Generation != s.Generation+1 || now.Phase != PhaseReady {
		t.Errorf("%s, generation %d", now.Phase, now.Generation)
	}
	if _, said := greeted(t, s.Endpoints[0].Address.String()); !strings.HasSuffix(said, " two") {
		t.Errorf("the workload has %q", said)
	}
}

func TestInlineSecretsLiveInMemoryAlone(t *testing.T) {
	t.Parallel()
	h := newHost(t, resolver(t))
	spec := service(t)
	spec.Secrets = []sandbox.SecretRef{{Name: "SECRET", Source: "inline:key"}}
	create := CreateRequest{Name: "web", Spec: spec, Start: true}
	var wrong *sandbox.FieldError
	create.SecretValues = map[string][]byte{"other": []byte("x")}
	if _, err := h.m.Create(t.Context(), create); !errors.As(err, &wrong) || wrong.Field != "secret_values[other]" {
		t.Errorf("a value that nothing asks for: %v", err)
	}
	create.SecretValues = map[string][]byte{"key": []byte("canary-inline")}
	s, err := h.m.Create(t.Context(), create)
	if err != nil {
		t.Fatal(err)
	}
	if _, said := greeted(t, s.Endpoints[0].Address.String()); !strings.HasSuffix(said, " canary-inline") {
		t.Errorf("the workload has %q", said)
	}
	if found := grep(t, h.dir, "canary-inline"); len(found) > 0 {
		t.Errorf("the secret is on disk: %v", found)
	}
	// The agent forgets it with its memory, and says so before it stops what runs.
	h.restart()
	if _, err := h.m.Stop(t.Context(), "web", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := h.m.Start(t.Context(), "web"); !errors.Is(err, sandbox.ErrNotFound) || !strings.Contains(err.Error(), "inline") {
		t.Errorf("started without its secret: %v", err)
	}
	if s := h.get("web"); s.Phase != PhaseStopped {
		t.Errorf("it is %s: %s", s.Phase, s.Message)
	}
	if d, err := h.m.SetSecrets(t.Context(), "web", map[string][]byte{"key": []byte("again")}); err != nil || d != nil {
		t.Errorf("set while stopped: %+v, %v", d, err)
	}
	if _, err := h.m.Start(t.Context(), "web"); err != nil {
		t.Errorf("started with its secret: %v", err)
	}
	if d, err := h.m.SetSecrets(t.Context(), "web", map[string][]byte{"key": []byte("third")}); err != nil || d == nil || d.Err != nil || len(d.Changed) != 1 {
		t.Errorf("set while it runs: %+v, %v", d, err)
	}
}

func TestKeylessSandboxIsRefusedKeys(t *testing.T) {
	t.Parallel()
	h := newHost(t, resolver(t))
	spec := process.Spec("sleep")
	spec.Keyless = true
	spec.Env = map[string]string{"ANTHROPIC_API_KEY": "x"}
	if _, err := h.m.Create(t.Context(), CreateRequest{Name: "web", Spec: spec}); !errors.Is(err, sandbox.ErrDenied) && !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("%v", err)
	}
}

func TestRestartWithoutItsSecretIsAFailureThatIsShown(t *testing.T) {
	t.Parallel()
	h := newHost(t, resolver(t))
	file := envFile(t, "SECRET=x\n")
	spec := process.Spec("exit", "1", "300ms")
	spec.Secrets = []sandbox.SecretRef{{Name: "SECRET", Source: "env-file:" + file}}
	spec.Restart = sandbox.RestartPolicy{Mode: sandbox.RestartAlways, InitialBackoff: 10 * time.Millisecond}
	h.create("job", spec)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	s := h.await("job", "given up", inPhase(PhaseFailed))
	if s.Reason != "REFUSED" || s.Desired != DesiredStopped || !strings.Contains(s.Message, "SECRET") {
		t.Errorf("%s, meant to be %s: %s", s.Reason, s.Desired, s.Message)
	}
}
