package server_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/server"
)

// authority is a CA for tests.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{}
	a.cert, a.key = certify(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil)
	return a
}

func certify(t *testing.T, template *x509.Certificate, by *authority) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := template, key
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// issue writes a certificate and its key for one use, and returns their files.
func (a *authority) issue(t *testing.T, dir, name string, usage x509.ExtKeyUsage) (cert, key string) {
	t.Helper()
	c, k := certify(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, DNSNames: []string{"agent.test"},
		ExtKeyUsage: []x509.ExtKeyUsage{usage}, KeyUsage: x509.KeyUsageDigitalSignature,
	}, a)
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return write(t, dir, name+".pem", "CERTIFICATE", c.Raw), write(t, dir, name+".key", "PRIVATE KEY", der)
}

func write(t *testing.T, dir, name, kind string, der []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	// By another file, so that nobody reads a half.
	if err := os.WriteFile(path+".new", pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}

// info makes one request over TCP with these client settings.
func info(t *testing.T, address string, config *tls.Config) error {
	t.Helper()
	creds := insecure.NewCredentials()
	if config != nil {
		config.ServerName = "agent.test"
		creds = credentials.NewTLS(config)
	}
	conn, err := grpc.NewClient("passthrough:"+address, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err = agentv1.NewHostServiceClient(conn).GetInfo(ctx, &agentv1.GetInfoRequest{})
	return err
}

func TestTCPNeedsMutualTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ours, strangers := newAuthority(t, "ours"), newAuthority(t, "strangers")
	serverCert, serverKey := ours.issue(t, dir, "server", x509.ExtKeyUsageServerAuth)
	caFile := write(t, dir, "ca.pem", "CERTIFICATE", ours.cert.Raw)
	settings, err := server.LoadTLS(serverCert, serverKey, caFile, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var log logged
	agent := startAgent(t, agentOptions{
		Drivers: processes(t), Server: server.Config{TLS: settings}, Log: &log,
	})
	listener, err := server.ListenTCP(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- agent.Server.Serve(listener) }()
	address := listener.Addr().String()

	pair := func(a *authority, name string, usage x509.ExtKeyUsage) []tls.Certificate {
		cert, err := tls.LoadX509KeyPair(a.issue(t, dir, name, usage))
		if err != nil {
			t.Fatal(err)
		}
		return []tls.Certificate{cert}
	}
	roots := x509.NewCertPool()
	roots.AddCert(ours.cert)
	good := pair(ours, "client", x509.ExtKeyUsageClientAuth)
	for _, test := range []struct {
		name    string
		config  *tls.Config
		refused bool
	}{
		{"our client", &tls.Config{RootCAs: roots, Certificates: good}, false},
		{"plain text", nil, true},
		{"no certificate", &tls.Config{RootCAs: roots}, true},
		{"a stranger's certificate", &tls.Config{RootCAs: roots, Certificates: pair(strangers, "x", x509.ExtKeyUsageClientAuth)}, true},
		{"a server's certificate", &tls.Config{RootCAs: roots, Certificates: pair(ours, "y", x509.ExtKeyUsageServerAuth)}, true},
		{"TLS 1.2", &tls.Config{RootCAs: roots, Certificates: good, MaxVersion: tls.VersionTLS12}, true},
		{"our client again", &tls.Config{RootCAs: roots, Certificates: good}, false},
	} {
		err := info(t, address, test.config)
		if (err != nil) != test.refused {
			t.Errorf("%s: %v", test.name, err)
		}
		if test.refused {
			wantCode(t, err, codes.Unavailable)
		}
	}
	eventually(t, "refusals are logged", func() bool { return log.contains("caller refused") })

	// From now on clients of another CA are let in, and no others.
	write(t, dir, "ca.pem", "CERTIFICATE", append([]byte(nil), strangers.cert.Raw...))
	later := time.Now().Add(time.Second)
	if err := os.Chtimes(caFile, later, later); err != nil {
		t.Fatal(err)
	}
	if err := info(t, address, &tls.Config{RootCAs: roots, Certificates: good}); err == nil {
		t.Error("a client of the old CA is let in")
	}
	newcomer := pair(strangers, "z", x509.ExtKeyUsageClientAuth)
	if err := info(t, address, &tls.Config{RootCAs: roots, Certificates: newcomer}); err != nil {
		t.Errorf("a client of the new CA: %v", err)
	}
	// Files that are not fit leave things as they were.
	if err := os.WriteFile(serverKey, []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := info(t, address, &tls.Config{RootCAs: roots, Certificates: newcomer}); err != nil {
		t.Errorf("with a broken key: %v", err)
	}
	if !log.contains("level=INFO") && !log.contains("request") {
		t.Error("the log is empty")
	}
	agent.Server.Shutdown(t.Context())
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestLoadTLSNamesTheFileThatIsWrong(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ours := newAuthority(t, "ours")
	cert, key := ours.issue(t, dir, "server", x509.ExtKeyUsageServerAuth)
	_, otherKey := ours.issue(t, dir, "other", x509.ExtKeyUsageServerAuth)
	ca := write(t, dir, "ca.pem", "CERTIFICATE", ours.cert.Raw)
	junk := filepath.Join(dir, "junk.pem")
	if err := os.WriteFile(junk, []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, files := range [][4]string{
		{"no cert", filepath.Join(dir, "none"), key, ca},
		{"junk cert", junk, key, ca},
		{"junk key", cert, junk, ca},
		{"other key", cert, otherKey, ca},
		{"no ca", cert, key, filepath.Join(dir, "none")},
		{"junk ca", cert, key, junk},
	} {
		_, err := server.LoadTLS(files[1], files[2], files[3], slog.New(slog.DiscardHandler))
		if err == nil || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: %v", files[0], err)
		}
	}
}

func TestPlainTCPIsNotServed(t *testing.T) {
	t.Parallel()
	agent := startAgent(t, agentOptions{Drivers: processes(t)})
	listener, err := server.ListenTCP(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- agent.Server.Serve(listener) }()
	if err := info(t, listener.Addr().String(), nil); err == nil {
		t.Error("a caller over plain TCP is let in")
	}
	agent.Server.Shutdown(t.Context())
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func access(t *testing.T, group string) server.Access {
	t.Helper()
	a, err := server.NewAccess(group)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestListenUnix(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "new", "agent.sock")
	listener, err := server.ListenUnix(t.Context(), path, access(t, ""))
	if err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]os.FileMode{path: os.ModeSocket | 0o660, filepath.Dir(path): os.ModeDir | 0o700} {
		if info, err := os.Stat(file); err != nil || info.Mode() != want {
			t.Errorf("%s: mode %v, %v; want %v", file, info.Mode(), err, want)
		}
	}
	if _, err := server.ListenUnix(t.Context(), path, access(t, "")); !errors.Is(err, server.ErrListening) {
		t.Errorf("a second listener: %v", err)
	}
	if err := listener.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket after closing: %v", err)
	}
}

func TestListenUnixKeepsOutOfFoldersOfOthers(t *testing.T) {
	t.Parallel()
	shared, err := os.MkdirTemp("", "agent") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(shared) })
	dir := filepath.Join(shared, "choiros-agent-501")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(shared, 0o1777); err != nil {
		t.Fatal(err)
	}
	mine, err := server.ListenUnix(t.Context(), filepath.Join(dir, "agent.sock"), access(t, ""))
	if err != nil {
		t.Fatal(err)
	}
	mine.Close()
	if os.Geteuid() != 0 {
		return // only root can make a folder that is somebody else's
	}
	if err := os.Chown(dir, 12345, -1); err != nil {
		t.Fatal(err)
	}
	if _, err := server.ListenUnix(t.Context(), filepath.Join(dir, "agent.sock"), access(t, "")); err == nil || !strings.Contains(err.Error(), "belongs to user 12345") {
		t.Errorf("in a folder of somebody else's: %v", err)
	}
	if err := os.Chmod(shared, 0o755); err != nil {
		t.Fatal(err)
	}
	theirs, err := server.ListenUnix(t.Context(), filepath.Join(dir, "agent.sock"), access(t, ""))
	if err != nil {
		t.Fatalf("where only its owner can have put it: %v", err)
	}
	theirs.Close()
}

func TestListenUnixReplacesOnlyWhatNobodyServes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	served := filepath.Join(dir, "served.sock")
	stranger, err := net.ListenUnix("unix", &net.UnixAddr{Name: served, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := server.ListenUnix(t.Context(), served, access(t, "")); !errors.Is(err, server.ErrListening) {
		t.Errorf("a socket that a stranger serves: %v", err)
	}
	// A killed agent leaves its socket.
	stranger.SetUnlinkOnClose(false)
	if err := stranger.Close(); err != nil {
		t.Fatal(err)
	}
	listener, err := server.ListenUnix(t.Context(), served, access(t, ""))
	if err != nil {
		t.Errorf("a socket that is left over: %v", err)
	} else if err := listener.Close(); err != nil {
		t.Error(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := server.ListenUnix(t.Context(), file, access(t, "")); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file: %v", err)
	}
	if data, err := os.ReadFile(file); string(data) != "mine" {
		t.Errorf("the file now: %q, %v", data, err)
	}
	long := filepath.Join(dir, strings.Repeat("x", 120))
	if _, err := server.ListenUnix(t.Context(), long, access(t, "")); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Errorf("a path that is too long: %v", err)
	}
}

func TestNewAccessKnowsItsGroups(t *testing.T) {
	t.Parallel()
	if _, err := server.NewAccess("no-such-group-here"); err == nil || !strings.Contains(err.Error(), "no-such-group-here") {
		t.Errorf("error = %v", err)
	}
}
