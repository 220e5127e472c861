package exposure

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"unicode"
)

const (
	// chunk is how many names of a folder are read at once.
	chunk = 256
	// headBytes are read of a file that its name alone does not tell.
	headBytes = 4 << 10
	// maxShown is in characters.
	maxShown = 200
)

// A folder with such a file in it can be made anew: https://bford.info/cachedir/.
// Cargo's target, virtual environments and caches of tools are.
const (
	cacheTag       = "CACHEDIR.TAG"
	cacheSignature = "Signature: 8a477f597d28d172789f06886806bc55"
)

// skipped reports whether a folder of that name is left out: version control's
// own, and what package managers fetch, which is large and not the user's.
func skipped(name string) bool {
	switch name {
	case ".git", ".hg", ".svn", ".jj", "node_modules", "vendor", ".venv", "venv", "__pycache__", ".cache", ".direnv":
		return true
	}
	return false
}

// walk is one look.
type walk struct {
	root *os.Root
	left int // names that may still be read
	// troubled is set once something could not be read.
	troubled bool

	mu     sync.Mutex
	report Report // Incomplete until the walk has come to its end
}

// run goes through the folder, upper folders first.
func (w *walk) run(ctx context.Context, folder string) {
	root, err := os.OpenRoot(folder)
	if err != nil {
		w.end(!forbidden(err))
		return
	}
	defer root.Close()
	w.root = root
	queue := []string{"."}
	for len(queue) > 0 {
		below, ok := w.folder(ctx, queue[0])
		if !ok {
			return
		}
		queue = append(queue[1:], below...)
	}
	w.end(w.troubled)
}

func (w *walk) end(incomplete bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.report.Incomplete = incomplete
}

// soFar is a copy of the report as it is.
func (w *walk) soFar() Report {
	w.mu.Lock()
	defer w.mu.Unlock()
	report := w.report
	report.Findings = slices.Clone(report.Findings)
	return report
}

// forbidden reports whether the agent may not see something, or it is gone.
// What is the user's own and the agent may not see is not the sandbox's to see
// either, as a rule.
func forbidden(err error) bool {
	return errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist)
}

// folder looks at the files of one folder and returns the folders in it that are
// to be looked through. ok is false once that is enough.
func (w *walk) folder(ctx context.Context, dir string) (below []string, ok bool) {
	// O_DIRECTORY, since it may have become something else meanwhile.
	f, err := w.root.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NONBLOCK, 0)
	if err != nil {
		w.troubled = w.troubled || !forbidden(err)
		return nil, true
	}
	defer f.Close()
	var found []Finding
	defer func() { w.add(found) }()
	cache := false
	for {
		if ctx.Err() != nil || w.left <= 0 {
			return nil, false
		}
		entries, err := f.ReadDir(min(chunk, w.left))
		w.left -= len(entries)
		for _, entry := range entries {
			name := entry.Name()
			switch at := path.Join(dir, name); {
			case entry.IsDir() && !skipped(name):
				below = append(below, at)
			case !entry.Type().IsRegular() || ctx.Err() != nil:
			case name == cacheTag:
				head, err := w.head(at)
				cache = cache || err == nil && bytes.HasPrefix(head, []byte(cacheSignature))
			default:
				if kind, telling := w.judge(at); telling {
					found = append(found, Finding{at, kind})
				}
			}
		}
		if err != nil {
			w.troubled = w.troubled || !errors.Is(err, io.EOF) && !forbidden(err)
			break
		}
	}
	if cache {
		below = nil
	}
	return below, true
}

// add notes what was found in one folder.
func (w *walk) add(found []Finding) {
	slices.SortFunc(found, func(a, b Finding) int { return cmp.Compare(a.Path, b.Path) })
	w.mu.Lock()
	defer w.mu.Unlock()
	w.report.Total += len(found)
	for _, f := range found[:min(len(found), MaxFindings-len(w.report.Findings))] {
		w.report.Findings = append(w.report.Findings, Finding{printable(f.Path), f.Kind})
	}
}

// judge says what a regular file is taken for. telling is false if it is nothing
// that there would be to tell of.
func (w *walk) judge(at string) (kind Kind, telling bool) {
	kind, says := suspect(at)
	if kind == "" {
		return "", false
	}
	head, err := w.head(at)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return kind, true // nobody can tell, so its name is taken at its word
	case err != nil || len(head) == 0:
		return "", false
	}
	return kind, says == nil || says(head)
}

// errNotRegular is what a file has become since its folder was read.
var errNotRegular = errors.New("not a regular file")

// head returns how a file begins.
func (w *walk) head(at string) ([]byte, error) {
	// O_NONBLOCK, since a pipe without a writer would be waited for.
	f, err := w.root.OpenFile(at, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errNotRegular
	}
	return io.ReadAll(io.LimitReader(f, headBytes))
}

// printable makes a path fit to be shown: names of files may be any bytes.
func printable(p string) string {
	shown := []rune(strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, p)) // bytes that are not UTF-8 are U+FFFD to Map
	if len(shown) > maxShown {
		shown = append([]rune{'…'}, shown[len(shown)-maxShown+1:]...)
	}
	return string(shown)
}
