package secrets

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/google/go-cmp/cmp"

	"github.com/choiros/agent/internal/sandbox"
)

// awsServer speaks as much of Secrets Manager's JSON 1.1 protocol as a
// GetSecretValue needs, and misbehaves for the secrets that are so called.
type awsServer struct {
	url   string
	calls atomic.Int32
}

func newAWS(t *testing.T) *awsServer {
	t.Helper()
	s := &awsServer{}
	server := httptest.NewServer(http.HandlerFunc(s.serve))
	t.Cleanup(server.Close)
	s.url = server.URL
	return s
}

func (s *awsServer) serve(w http.ResponseWriter, r *http.Request) {
	s.calls.Add(1)
	var in struct {
		SecretID string `json:"SecretId"`
	}
	err := json.NewDecoder(r.Body).Decode(&in)
	signed := strings.Contains(r.Header.Get("Authorization"), "/eu-central-1/secretsmanager/aws4_request")
	if err != nil || r.Header.Get("X-Amz-Target") != "secretsmanager.GetSecretValue" || !signed {
		awsFail(w, 400, "ValidationException")
		return
	}
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	answer := map[string]any{"ARN": "arn", "Name": in.SecretID, "VersionId": "11111111-2222-3333-4444-555555555555"}
	switch in.SecretID {
	case "plain":
		answer["SecretString"] = canary
	case "binary":
		answer["SecretBinary"] = []byte(canary + "\xff")
	case "json":
		answer["SecretString"] = `{"user":"u","port":5432,"tls":true,"none":null}`
	case "two":
		answer["SecretString"] = `{"A":"1","B":2}`
	case "nested":
		answer["SecretString"] = `{"A":{"x":"` + canary + `"}}`
	case "denied":
		awsFail(w, 400, "AccessDeniedException")
		return
	case "throttled":
		awsFail(w, 400, "ThrottlingException")
		return
	case "broken":
		awsFail(w, 500, "InternalServiceError")
		return
	case "deleted":
		awsFail(w, 400, "InvalidRequestException")
		return
	case "garbage":
		_, _ = io.WriteString(w, `{"SecretString":"`+canary)
		return
	case "hang":
		<-r.Context().Done()
		return
	case "huge":
		_, _ = io.WriteString(w, `{"SecretString":"`+strings.Repeat(canary, maxAnswer/len(canary)+1)+`"}`)
		return
	default:
		awsFail(w, 400, "ResourceNotFoundException")
		return
	}
	_ = json.NewEncoder(w).Encode(answer)
}

func awsFail(w http.ResponseWriter, status int, code string) {
	w.Header().Set("X-Amzn-ErrorType", code)
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"__type": code, "message": "about " + canary})
}

func (s *awsServer) resolver(t *testing.T, timeout time.Duration) *Resolver {
	t.Helper()
	credentials := aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
		return aws.Credentials{AccessKeyID: "AKIDEXAMPLE", SecretAccessKey: canary}, nil
	})
	return newResolver(t, Config{Timeout: timeout, AWS: AWSConfig{Endpoint: s.url, Region: "eu-central-1", Credentials: credentials}})
}

func TestAWSSecrets(t *testing.T) {
	t.Parallel()
	server := newAWS(t)
	set, err := server.resolver(t, time.Minute).Resolve(t.Context(), []sandbox.SecretRef{
		{Name: "PLAIN", Source: "aws-secretsmanager:plain"},
		{Name: "bin", Source: "aws-secretsmanager:binary", File: true},
		{Name: "USER", Source: "aws-secretsmanager:json#user"},
		{Name: "PORT", Source: "aws-secretsmanager:json#port"},
		{Name: "TLS", Source: "aws-secretsmanager:json#tls"},
		{Name: "NONE", Source: "aws-secretsmanager:json#none", Optional: true},
		{Name: "*", Source: "aws-secretsmanager:two"},
		{Name: "GONE", Source: "aws-secretsmanager:absent", Optional: true},
	}, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"PLAIN": canary, "/bin": canary + "\xff", "USER": "u", "PORT": "5432", "TLS": "true", "A": "1", "B": "2"}
	if diff := cmp.Diff(want, values(set)); diff != "" {
		t.Error(diff)
	}
	if set.Items[0].Version != "11111111-2222-3333-4444-555555555555" {
		t.Errorf("version %q", set.Items[0].Version)
	}
	if len(set.Missing) != 2 || !errors.Is(set.Missing[1].Err, sandbox.ErrNotFound) {
		t.Errorf("missing: %v", set.Missing)
	}
	if calls := server.calls.Load(); calls != 5 {
		t.Errorf("%d calls for 5 secrets", calls)
	}
}

func TestAWSFailuresAreClear(t *testing.T) {
	t.Parallel()
	server := newAWS(t)
	for id, want := range map[string]error{
		"denied": sandbox.ErrDenied, "throttled": sandbox.ErrUnavailable, "broken": sandbox.ErrUnavailable, "deleted": sandbox.ErrNotFound,
		"garbage": sandbox.ErrUnavailable, "huge": sandbox.ErrCorrupt, "absent": sandbox.ErrNotFound,
		"plain#key": sandbox.ErrCorrupt, "nested#A": sandbox.ErrCorrupt, "json#x": sandbox.ErrNotFound,
	} {
		_, err := server.resolver(t, time.Minute).Resolve(t.Context(), []sandbox.SecretRef{{Name: "X", Source: "aws-secretsmanager:" + id}}, nil, false)
		if !errors.Is(err, want) || strings.Contains(err.Error(), canary) {
			t.Errorf("%s: %v", id, err)
		}
	}
	_, err := server.resolver(t, 50*time.Millisecond).Resolve(t.Context(), []sandbox.SecretRef{{Name: "X", Source: "aws-secretsmanager:hang"}}, nil, false)
	if !errors.Is(err, sandbox.ErrUnavailable) || !strings.Contains(err.Error(), "in time") {
		t.Errorf("hang: %v", err)
	}
}

func TestAWSUnreachable(t *testing.T) {
	t.Parallel()
	server := newAWS(t)
	r := server.resolver(t, time.Minute)
	r.cfg.AWS.Endpoint = "http://127.0.0.1:1"
	_, err := r.Resolve(t.Context(), []sandbox.SecretRef{{Name: "X", Source: "aws-secretsmanager:plain"}}, nil, false)
	if !errors.Is(err, sandbox.ErrUnavailable) || strings.Contains(err.Error(), canary) {
		t.Error(err)
	}
}
