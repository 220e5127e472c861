package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// TLS admits callers over TCP that show a certificate signed by the client
// CA: TLS 1.3 only. Files that change are read again at the next connection;
// if they are not fit then, the last good ones go on.
type TLS struct {
	files       [3]string // certificate, key, client CA
	log         *slog.Logger
	credentials credentials.TransportCredentials

	mu     sync.Mutex
	seen   [3]stamp
	config *tls.Config
}

// stamp tells one version of a file from another.
type stamp struct {
	at   time.Time
	size int64
}

// LoadTLS reads a certificate, its key, and the CA that clients' certificates
// must be signed by, all in PEM files.
func LoadTLS(cert, key, clientCA string, log *slog.Logger) (*TLS, error) {
	t := &TLS{files: [3]string{cert, key, clientCA}, log: log}
	var err error
	if t.seen, err = t.stamps(); err != nil {
		return nil, err
	}
	if t.config, err = t.read(); err != nil {
		return nil, err
	}
	outer := t.config.Clone()
	outer.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return t.current(), nil }
	t.credentials = credentials.NewTLS(outer)
	return t, nil
}

// ListenTCP listens for callers that a TLS admits.
func ListenTCP(ctx context.Context, address string) (net.Listener, error) {
	var config net.ListenConfig
	return config.Listen(ctx, "tcp", address)
}

// current is the configuration of the files as they are now.
func (t *TLS) current() *tls.Config {
	t.mu.Lock()
	defer t.mu.Unlock()
	seen, err := t.stamps()
	if err == nil && seen == t.seen {
		return t.config
	}
	var config *tls.Config
	if err == nil {
		config, err = t.read()
	}
	if err != nil {
		t.log.Warn("tls files not read again", "err", err)
		return t.config
	}
	t.seen, t.config = seen, config
	t.log.Info("tls files read again", "cert", t.files[0])
	return config
}

func (t *TLS) stamps() ([3]stamp, error) {
	var seen [3]stamp
	for i, file := range t.files {
		info, err := os.Stat(file)
		if err != nil {
			return seen, fmt.Errorf("tls: %w", err)
		}
		seen[i] = stamp{at: info.ModTime(), size: info.Size()}
	}
	return seen, nil
}

func (t *TLS) read() (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(t.files[0], t.files[1])
	if err != nil {
		if _, ok := errors.AsType[*fs.PathError](err); ok {
			return nil, fmt.Errorf("tls: %w", err)
		}
		return nil, fmt.Errorf("tls: certificate %s with key %s: %w", t.files[0], t.files[1], err)
	}
	pem, err := os.ReadFile(t.files[2])
	if err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	authorities := x509.NewCertPool()
	if !authorities.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("tls: client CA %s: has no certificate in PEM form", t.files[2])
	}
	return &tls.Config{
		Certificates: []tls.Certificate{cert},
		ClientCAs:    authorities,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		MinVersion:   tls.VersionTLS13,
		NextProtos:   []string{"h2"},
		// A resumed session would outlive the CA that let it in.
		SessionTicketsDisabled: true,
	}, nil
}
