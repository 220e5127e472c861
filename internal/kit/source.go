package kit

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

const (
	// sumsFile has the checksums of a release, as sha256sum(1) writes them.
	sumsFile = "SHA256SUMS"
	// maxSums bounds what is read of it, in bytes.
	maxSums = 1 << 20
	// maxRedirects is how far a server may send one on.
	maxRedirects = 10
)

// source is where an archive and what is beside it are had from.
type source interface {
	// name is the archive's in its folder.
	name() string
	// open returns the archive, and its length if that is known, else 0.
	open(ctx context.Context) (io.ReadCloser, int64, error)
	// openBeside returns another file of the folder.
	openBeside(ctx context.Context, name string) (io.ReadCloser, error)
}

func sourceOf(o Options) (source, error) {
	scheme, _, isURL := strings.Cut(o.Source, "://")
	switch {
	case o.Source == "":
		return nil, sandbox.Invalidf("FILE", "is empty")
	case !isURL:
		// Or it would be missed by what is said of the checksums beside it.
		_, err := os.Stat(o.Source)
		return file(o.Source), missing(err)
	case strings.ToLower(scheme) != "https":
		return nil, sandbox.Invalidf("URL", "begins with %s://; it must be https://", scheme)
	}
	u, err := url.Parse(o.Source)
	if err != nil || u.Host == "" || path.Base(u.Path) == "/" || path.Base(u.Path) == "." {
		return nil, sandbox.Invalidf("URL", "names no file of a server's: https://HOST/PATH")
	}
	client := &http.Client{Transport: o.Transport, CheckRedirect: func(next *http.Request, past []*http.Request) error {
		if next.URL.Scheme != "https" {
			return fmt.Errorf("it is sent on to %s, which is not https", next.URL.Host)
		}
		if len(past) > maxRedirects {
			return fmt.Errorf("it is sent on more than %d times", maxRedirects)
		}
		return nil
	}}
	return server{u, client, cmp.Or(o.StallLimit, defaultStall)}, nil
}

// shown is a source as it is printed: without passwords and tokens.
func shown(source string) string {
	if u, err := url.Parse(source); err == nil && u.Host != "" {
		return u.Scheme + "://" + u.Host + u.EscapedPath()
	}
	return source
}

// file is an archive on this host.
type file string

func (f file) name() string { return filepath.Base(string(f)) }

func (f file) open(context.Context) (io.ReadCloser, int64, error) {
	// Opened so, a FIFO that nobody writes to does not hold who opens it.
	opened, err := os.OpenFile(string(f), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, missing(err)
	}
	info, err := opened.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = sandbox.Invalidf("FILE", "is not a regular file")
	}
	if err != nil {
		return nil, 0, errors.Join(err, opened.Close())
	}
	return opened, info.Size(), nil
}

func (f file) openBeside(ctx context.Context, name string) (io.ReadCloser, error) {
	opened, _, err := file(filepath.Join(filepath.Dir(string(f)), name)).open(ctx)
	return opened, err
}

// missing adds what a file that is not there is to callers.
func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", sandbox.ErrNotFound, err)
	}
	return err
}

// server is an archive behind a URL.
type server struct {
	url    *url.URL
	client *http.Client
	stall  time.Duration
}

func (s server) name() string { return path.Base(s.url.Path) }

func (s server) open(ctx context.Context) (io.ReadCloser, int64, error) {
	body, length, err := s.get(ctx, s.url)
	if err == nil && length > MaxArchive {
		err = errors.Join(fmt.Errorf("%w: it has %d bytes, more than %d", sandbox.ErrCorrupt, length, int64(MaxArchive)), body.Close())
	}
	if err != nil {
		return nil, 0, err
	}
	return body, max(length, 0), nil
}

func (s server) openBeside(ctx context.Context, name string) (io.ReadCloser, error) {
	beside := *s.url
	beside.Path, beside.RawPath, beside.RawQuery = path.Join(path.Dir(s.url.Path), name), "", ""
	body, _, err := s.get(ctx, &beside)
	return body, err
}

// get asks for a file. What is returned ends with an error if nothing came for
// as long as a server may send nothing.
func (s server) get(ctx context.Context, u *url.URL) (io.ReadCloser, int64, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(s.stall, func() { cancel(fmt.Errorf("%s sends nothing: %w", u.Host, sandbox.ErrTimeout)) })
	body := &patient{ctx: ctx, cancel: cancel, timer: timer, limit: s.stall}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, 0, errors.Join(err, body.Close())
	}
	answer, err := s.client.Do(request)
	if err != nil {
		return nil, 0, errors.Join(body.because(err), body.Close())
	}
	body.in = answer.Body
	if answer.StatusCode != http.StatusOK {
		err := fmt.Errorf("%s answers %q", shown(u.String()), answer.Status)
		if answer.StatusCode == http.StatusNotFound {
			err = fmt.Errorf("%w: %w", sandbox.ErrNotFound, err)
		}
		return nil, 0, errors.Join(err, body.Close())
	}
	return body, answer.ContentLength, nil
}

// patient is an answer's body that is given up if nothing comes.
type patient struct {
	in     io.ReadCloser   // nil: there is none yet
	ctx    context.Context //nolint:containedctx // A Reader has no other way to it.
	cancel context.CancelCauseFunc
	timer  *time.Timer
	limit  time.Duration
}

func (p *patient) Read(b []byte) (int, error) {
	n, err := p.in.Read(b)
	if n > 0 {
		p.timer.Reset(p.limit)
	}
	// One that is hung up on may yet send what looks like the end.
	if err != nil && (!errors.Is(err, io.EOF) || p.ctx.Err() != nil) {
		err = p.because(err)
	}
	return n, err
}

// because is why a request failed, without its URL, which may have a token in
// it.
func (p *patient) because(err error) error {
	if cause := context.Cause(p.ctx); cause != nil {
		return cause
	}
	if e, ok := errors.AsType[*url.Error](err); ok {
		return e.Err
	}
	return err
}

func (p *patient) Close() error {
	p.timer.Stop()
	p.cancel(context.Canceled)
	if p.in != nil {
		_ = p.in.Close() // only read from
	}
	return nil
}

// wantedSum is the archive's checksum as it was given, or as the file beside the
// archive has it.
func wantedSum(ctx context.Context, from source, given string) (string, error) {
	if given != "" {
		if !isSum(given) {
			return "", sandbox.Invalidf("--sha256", "%q is not 64 hexadecimal digits", given)
		}
		return strings.ToLower(given), nil
	}
	sums, err := from.openBeside(ctx, sumsFile)
	if err != nil {
		return "", fmt.Errorf("no checksum was given, and %s beside it cannot be had: %w", sumsFile, err)
	}
	defer sums.Close()
	return sumIn(io.LimitReader(sums, maxSums), from.name())
}

// sumIn finds a file's checksum in what sha256sum(1) has written.
func sumIn(sums io.Reader, file string) (string, error) {
	want := ""
	lines := bufio.NewScanner(sums)
	for lines.Scan() {
		// Two spaces, or a space and an asterisk for a file that is no text.
		sum, name, _ := strings.Cut(lines.Text(), " ")
		if len(name) < 2 || name[0] != ' ' && name[0] != '*' || name[1:] != file || !isSum(sum) {
			continue
		}
		if want != "" && want != strings.ToLower(sum) {
			return "", fmt.Errorf("%w: %s has two checksums for %s", sandbox.ErrCorrupt, sumsFile, file)
		}
		want = strings.ToLower(sum)
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("read %s: %w", sumsFile, err)
	}
	if want == "" {
		return "", fmt.Errorf("%w: %s beside it has no checksum for %s", sandbox.ErrCorrupt, sumsFile, file)
	}
	return want, nil
}

func isSum(text string) bool {
	sum, err := hex.DecodeString(text)
	return err == nil && len(sum) == sha256.Size
}

// fetch returns a copy of the archive that nobody else can change and that is
// gone when it is closed, and its checksum.
func fetch(ctx context.Context, from source, o Options) (_ *os.File, sum string, err error) {
	in, length, err := from.open(ctx)
	if err != nil {
		return nil, "", err
	}
	defer in.Close()
	out, err := os.CreateTemp(o.Dir, o.Arch+"-archive-")
	if err != nil {
		return nil, "", err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, out.Close())
		}
	}()
	if err := os.Remove(out.Name()); err != nil {
		return nil, "", err
	}
	hash := sha256.New()
	if err := copyTo(ctx, io.MultiWriter(out, hash), in, length, o.Progress); err != nil {
		return nil, "", err
	}
	if _, err := out.Seek(0, io.SeekStart); err != nil {
		return nil, "", err
	}
	return out, hex.EncodeToString(hash.Sum(nil)), nil
}
