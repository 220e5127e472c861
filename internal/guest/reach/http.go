//go:build linux

package reach

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	guestv1 "github.com/choiros/agent/api/choiros/guest/v1"
)

// maxStatusLine is how much of an answer is looked at, in bytes.
const maxStatusLine = 4 << 10

var errNotHTTP = errors.New("what answers does not speak HTTP/1")

// httpProbe asks as a client of HTTP/1.1 would (RFC 9112): net/http is larger
// than guestd may be. Redirections count as answers and are not followed.
func httpProbe(number uint32, path string) (probe, error) {
	port, err := validPort(number)
	if err != nil {
		return probe{}, err
	}
	if path == "" {
		path = "/"
	}
	if path[0] != '/' || strings.ContainsFunc(path, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return probe{}, failure(guestv1.Failure_CODE_INVALID, "path %q: must begin with / and hold no space", path)
	}
	request := fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: localhost:%d\r\nUser-Agent: guestd\r\nAccept: */*\r\nConnection: close\r\n\r\n", path, port)
	check := func(ctx context.Context) error {
		conn, err := dialTCP(ctx, port)
		if err != nil {
			return connectError(port, err)
		}
		defer func() { _ = conn.Close() }()
		defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
		status, err := ask(conn, request)
		if err != nil {
			return fmt.Errorf("http on port %d: %w", port, err)
		}
		if status < 200 || status > 399 {
			return fmt.Errorf("http on port %d: status %d", port, status)
		}
		return nil
	}
	return probe{check, socketTimeout, 8}, nil
}

// ask sends a request and returns the status of its answer.
func ask(conn net.Conn, request []byte) (status int, err error) {
	if _, err := conn.Write(request); err != nil {
		return 0, err
	}
	buffer := make([]byte, maxStatusLine)
	for n := 0; n < len(buffer); {
		more, err := conn.Read(buffer[n:])
		n += more
		if line, _, whole := bytes.Cut(buffer[:n], []byte("\n")); whole {
			return parseStatus(line)
		}
		if errors.Is(err, io.EOF) {
			return 0, errors.New("closed without an answer")
		}
		if err != nil {
			return 0, err
		}
	}
	return 0, errNotHTTP
}

// parseStatus returns the code of a status line, such as "HTTP/1.1 200 OK".
func parseStatus(line []byte) (int, error) {
	line = bytes.TrimSuffix(line, []byte("\r"))
	version, rest, _ := bytes.Cut(line, []byte(" "))
	minor, ok := bytes.CutPrefix(version, []byte("HTTP/1."))
	if !ok || len(minor) != 1 || minor[0] < '0' || minor[0] > '9' {
		return 0, errNotHTTP
	}
	code, _, _ := bytes.Cut(rest, []byte(" "))
	if len(code) != 3 {
		return 0, errNotHTTP
	}
	status := 0
	for _, digit := range code {
		if digit < '0' || digit > '9' {
			return 0, errNotHTTP
		}
		status = 10*status + int(digit-'0')
	}
	return status, nil
}
