package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/choiros/agent/internal/sandbox"
)

// agentctl runs the program in this process.
func agentctl(t *testing.T, env map[string]string, args ...string) (exit int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	exit = run(args, strings.NewReader(""), &out, &errs, func(name string) string { return env[name] })
	return exit, out.String(), errs.String()
}

func TestAddresses(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"unix:///run/a.sock": "unix:///run/a.sock", "/run/a.sock": "unix:///run/a.sock", "host:7443": "host:7443", "[::1]:7443": "[::1]:7443",
		"unix://a.sock": "", "host": "", ":7443": "", "host:": "", "http://host": "",
	} {
		got, err := parseAddress(text)
		if (err == nil) != (want != "") || err == nil && got.String() != want {
			t.Errorf("parseAddress(%q) = %s, %v; want %q", text, got, err, want)
		}
	}
}

func TestRequestIDsAreFreshUUIDs(t *testing.T) {
	t.Parallel()
	form := regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	a, b := requestID(), requestID()
	if a == b || !form.MatchString(a) || !form.MatchString(b) {
		t.Errorf("%s, %s", a, b)
	}
}

func TestMutualTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	stranger := newAuthority(t, dir, "stranger")
	agent := newFakeAgent("tcp", "127.0.0.1:0")
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	agent.tls = &tls.Config{
		Certificates: []tls.Certificate{ca.issue(t, dir, "server")}, ClientCAs: pool,
		ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13,
	}
	if err := agent.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(agent.close)
	ca.issue(t, dir, "client")
	stranger.issue(t, dir, "stranger-client")
	file := func(name string) string { return filepath.Join(dir, name) }
	call := func(cert, ca string) (int, string, string) {
		return agentctl(t, nil, "sandbox", "list", "-o", "json", "--agent", agent.address,
			"--tls-cert", file(cert+".pem"), "--tls-key", file(cert+".key"), "--tls-ca", file(ca+".pem"))
	}
	if exit, out, errs := call("client", "ca"); exit != 0 || strings.TrimSpace(out) != "[]" {
		t.Errorf("exit %d, stdout %q, stderr %q", exit, out, errs)
	}
	if exit, _, errs := call("client", "stranger"); exit != 8 || !strings.Contains(errs, "unknown authority") {
		t.Errorf("an agent of another authority: exit %d, stderr %q", exit, errs)
	}
	if exit, _, errs := call("stranger-client", "ca"); exit != 8 || !strings.Contains(errs, "cannot reach the agent at 127.0.0.1:") {
		t.Errorf("a client of another authority: exit %d, stderr %q", exit, errs)
	}
	if exit, _, errs := call("missing", "ca"); exit != 2 || !strings.Contains(errs, "--tls-cert: ") {
		t.Errorf("no certificate: exit %d, stderr %q", exit, errs)
	}
	// From the environment.
	exit, out, errs := agentctl(t, map[string]string{
		"CHOIROS_AGENT": agent.address, "CHOIROS_AGENT_TLS_CERT": file("client.pem"),
		"CHOIROS_AGENT_TLS_KEY": file("client.key"), "CHOIROS_AGENT_TLS_CA": file("ca.pem"),
	}, "host", "info", "-o", "json")
	if exit != 0 || !strings.Contains(out, "testhost") {
		t.Errorf("exit %d, stdout %q, stderr %q", exit, out, errs)
	}
}

// authority issues certificates for a test.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, dir, name string) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, filepath.Join(dir, name+".pem"), "CERTIFICATE", der)
	return &authority{cert, key}
}

// issue writes NAME.pem and NAME.key, for 127.0.0.1.
func (a *authority) issue(t *testing.T, dir, name string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, filepath.Join(dir, name+".pem"), "CERTIFICATE", der)
	writePEM(t, filepath.Join(dir, name+".key"), "PRIVATE KEY", private)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestExitStatusIsTheTables(t *testing.T) {
	t.Parallel()
	for _, row := range sandbox.Failures() {
		if row.Sentinel == nil {
			continue
		}
		if got := exitStatus(fail(row.Sentinel, "web")); got != row.Exit {
			t.Errorf("%s: exit status %d, want %d", row.Reason, got, row.Exit)
		}
		if got := exitStatus(withHint(fail(row.Sentinel, "web"), "x")); got != row.Exit {
			t.Errorf("%s with a hint: exit status %d, want %d", row.Reason, got, row.Exit)
		}
		if meanings()[row.Reason] == "" || !strings.Contains(exitCodes(), row.Reason) {
			t.Errorf("%s is not explained", row.Reason)
		}
	}
	for code, want := range map[codes.Code]int{
		codes.NotFound: 3, codes.Unimplemented: 6, codes.DeadlineExceeded: 9, codes.Unknown: 1, codes.PermissionDenied: 12,
	} {
		if got := exitStatus(status.Error(code, "no reason given")); got != want {
			t.Errorf("%s without a reason: exit status %d, want %d", code, got, want)
		}
	}
}

func TestErrorsAreOneLine(t *testing.T) {
	t.Parallel()
	a := &app{getenv: func(string) string { return "" }}
	var errs bytes.Buffer
	a.stderr = &errs
	a.printError(status.Error(codes.Internal, "a\nb\x1b[31m\tc\n"))
	if got := errs.String(); got != "agentctl: a b[31m c\n" {
		t.Errorf("%q", got)
	}
}

func TestFieldPlaceNamesFlagAndKey(t *testing.T) {
	t.Parallel()
	for field, want := range map[string]string{
		"spec.image":                  "--image (image in sandbox.yaml)",
		"sandbox.name":                "NAME (name in sandbox.yaml)",
		"spec.machine_class":          "--class (class in sandbox.yaml)",
		"spec.mounts[1].source":       "--workspace, --data or --disk (workspace, data and disks in sandbox.yaml)",
		"spec.readiness.http.port":    "--ready-http (ready.http in sandbox.yaml)",
		"spec.env[FOO]":               "--env (env in sandbox.yaml)",
		"spec.driver_options.network": "--option (options in sandbox.yaml)",
		"grace":                       "--grace",
		"spec.imagery":                "", "page_token": "", "": "",
	} {
		if got := fieldPlace(field); got != want {
			t.Errorf("fieldPlace(%q) = %q, want %q", field, got, want)
		}
	}
}

func TestStartAgentCommand(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		goos string
		uid  int
		file string
		want string
	}{
		{"linux", 1000, "/etc/systemd/system/choiros-agent.service", "agentctl agent start"},
		{"linux", 0, "/etc/systemd/system/choiros-agent.service", "systemctl start choiros-agent"},
		{"linux", 0, "", "agentctl agent start"},
		{"darwin", 501, "", "agentctl agent start"},
	} {
		got := startAgentCommand(test.goos, test.uid, func(path string) bool { return path == test.file })
		if !strings.HasPrefix(got, test.want) {
			t.Errorf("%+v: %q", test, got)
		}
	}
}

func TestDefaultSocketIsInNobodyElsesFolder(t *testing.T) {
	t.Parallel()
	a := &app{on: machine{"darwin", 501}}
	dir := filepath.Join(t.TempDir(), "choiros-agent-501")
	for _, mine := range []string{dir, os.TempDir()} { // absent, and mine or root's
		if err := a.ownFolder(mine); err != nil {
			t.Errorf("%s: %v", mine, err)
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := a.ownFolder(dir); err != nil {
		t.Error(err)
	}
	if os.Getuid() != 0 {
		return // only root can make a folder that is somebody else's
	}
	if err := os.Chown(dir, 12345, -1); err != nil {
		t.Fatal(err)
	}
	if err := a.ownFolder(dir); exitStatus(err) != 12 || !strings.HasPrefix(hintOf(err), "have it removed") {
		t.Errorf("somebody else's: %v (exit status %d), try: %s", err, exitStatus(err), hintOf(err))
	}
}

func TestSocketOfSomebodyElse(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "agent.sock")
	if err := os.WriteFile(socket, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err := &connectError{address{"unix", socket}, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", os.ErrPermission)}}
	if hint := hintOf(err); !strings.HasPrefix(hint, "run agentctl as ") && !strings.HasPrefix(hint, "sudo usermod -aG ") {
		t.Errorf("hint %q", hint)
	}
	if got := err.Error(); got != "cannot reach the agent at unix://"+socket+": you may not use the socket" {
		t.Errorf("%q", got)
	}
	if exitStatus(err) != 8 {
		t.Errorf("exit status %d", exitStatus(err))
	}
}

// A run in this process is what main is: nothing but its arguments decides.
func TestRunTwiceInOneProcess(t *testing.T) {
	t.Parallel()
	agent := serveFake(t)
	env := map[string]string{"CHOIROS_AGENT": "unix://" + agent.address}
	for range 2 {
		if exit, out, errs := agentctl(t, env, "image", "list", "-q"); exit != 0 || out != "localhost/app:1\n" {
			t.Errorf("exit %d, stdout %q, stderr %q", exit, out, errs)
		}
	}
}
