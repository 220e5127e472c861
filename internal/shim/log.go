package shim

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/choiros/agent/internal/sandbox"
)

// logFile is the log of a box.
const logFile = "log"

// maxLog is the size at which a log begins anew, in bytes, so that a workload
// that prints for ever fills no disk.
const maxLog = 64 << 20

// maxEntry is the most a log entry holds.
const maxEntry = 16 << 10

// A log is entries, each a header of 13 bytes and data: the time in
// nanoseconds since 1970 (8, big-endian), the stream (1; 0 stdout, 1 stderr),
// and the length of the data (4).
const entryHeader = 13

// Log appends to a box's log. It is safe for concurrent use.
type Log struct {
	mu   sync.Mutex
	file *os.File
	size int64
	err  error // the first
}

func openLog(b Box) (*Log, error) {
	file, err := os.OpenFile(b.Path(logFile), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err != nil {
		file.Close()
		return nil, err
	}
	return &Log{file: file, size: info.Size()}, nil
}

// Copy writes what comes from a stream until that ends.
func (w *Log) Copy(stream io.Reader, stderr bool) {
	lines := bufio.NewReaderSize(stream, maxEntry)
	for {
		data, err := lines.ReadSlice('\n')
		if len(data) > 0 {
			w.write(data, stderr)
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

func (w *Log) write(data []byte, stderr bool) {
	entry := make([]byte, entryHeader, entryHeader+len(data))
	if stderr {
		entry[8] = 1
	}
	binary.BigEndian.PutUint32(entry[9:], uint32(len(data))) //nolint:gosec // At most maxEntry.
	entry = append(entry, data...)
	w.mu.Lock()
	defer w.mu.Unlock()
	binary.BigEndian.PutUint64(entry, uint64(time.Now().UnixNano())) //nolint:gosec // After 1970.
	if w.size+int64(len(entry)) > maxLog {
		w.note(w.file.Truncate(0))
		w.size = 0
	}
	n, err := w.file.Write(entry)
	w.size += int64(n)
	w.note(err)
}

func (w *Log) note(err error) {
	if w.err == nil {
		w.err = err
	}
}

// fault is the first error of writing.
func (w *Log) fault() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return fmt.Errorf("write the log: %w", w.err)
	}
	return nil
}

// Logs reads the log; see sandbox.LogSource.
func (b Box) Logs(ctx context.Context, opts sandbox.LogOptions, yield func(sandbox.LogEntry) error) error {
	if o, _, err := b.Settled(ctx); err != nil {
		return err
	} else if o.State == sandbox.StateAbsent {
		return sandbox.ErrNotFound
	}
	file, err := os.Open(b.Path(logFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it never ran
	}
	if err != nil {
		return err
	}
	defer file.Close()
	reader := &logReader{file: file, opts: opts}
	if opts.Tail >= 0 {
		if err := reader.skipTo(opts.Tail); err != nil {
			return err
		}
	}
	for {
		// Asked before reading: what a life has printed by its end is there.
		o, _, err := b.Settled(ctx)
		if err != nil {
			return err
		}
		if err := reader.each(ctx, yield); err != nil {
			return err
		}
		if !opts.Follow || o.State != sandbox.StateRunning {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// logReader reads selected entries of a log that may grow.
type logReader struct {
	file   *os.File
	opts   sandbox.LogOptions
	offset int64 // of the next entry
	// skip tells, by stream, that the next entry is the rest of a line that is
	// left out.
	skip [2]bool
}

// each yields the entries from offset to the present end.
func (r *logReader) each(ctx context.Context, yield func(sandbox.LogEntry) error) error {
	info, err := r.file.Stat()
	if err != nil {
		return err
	}
	if info.Size() < r.offset { // it has begun anew
		r.offset, r.skip = 0, [2]bool{}
	}
	if _, err := r.file.Seek(r.offset, io.SeekStart); err != nil {
		return err
	}
	buffered := bufio.NewReader(r.file)
	buffer := make([]byte, entryHeader+maxEntry)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		entry, size, err := readEntry(buffered, buffer)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil // the rest is being written
		}
		if err != nil {
			return fmt.Errorf("%s at %d: %w", r.file.Name(), r.offset, err)
		}
		r.offset += size
		if !r.selects(entry) {
			continue
		}
		if err := yield(entry); err != nil {
			return err
		}
	}
}

// readEntry reads an entry and says how many bytes it takes. Its data is in
// buffer.
func readEntry(from io.Reader, buffer []byte) (sandbox.LogEntry, int64, error) {
	header, data := buffer[:entryHeader], buffer[entryHeader:]
	if _, err := io.ReadFull(from, header); err != nil {
		return sandbox.LogEntry{}, 0, err
	}
	size := binary.BigEndian.Uint32(header[9:])
	if int(size) > len(data) {
		return sandbox.LogEntry{}, 0, sandbox.ErrCorrupt
	}
	if _, err := io.ReadFull(from, data[:size]); err != nil {
		return sandbox.LogEntry{}, 0, err
	}
	return sandbox.LogEntry{
		Time:   time.Unix(0, int64(binary.BigEndian.Uint64(header))),
		Stderr: header[8] == 1,
		Data:   data[:size],
	}, entryHeader + int64(size), nil
}

// selects reports whether an entry, the next, is among those asked for.
func (r *logReader) selects(entry sandbox.LogEntry) bool {
	if skipped := &r.skip[stream(entry)]; *skipped {
		*skipped = !endsLine(entry)
		return false
	}
	if entry.Stderr && !r.opts.Stderr || !entry.Stderr && !r.opts.Stdout {
		return false
	}
	return !entry.Time.Before(r.opts.Since)
}

// skipTo moves the reader to the last so many lines, counted over all that is
// selected.
func (r *logReader) skipTo(lines int) error {
	type place struct {
		offset int64
		within [2]bool // by stream: in the middle of a line
	}
	var starts []place
	var now place
	err := r.each(context.Background(), func(entry sandbox.LogEntry) error {
		now.offset = r.offset - entryHeader - int64(len(entry.Data))
		if !now.within[stream(entry)] {
			starts = append(starts, now)
			starts = starts[max(0, len(starts)-lines):]
		}
		now.within[stream(entry)] = !endsLine(entry)
		return nil
	})
	if len(starts) > 0 {
		now = starts[0]
	} else {
		now.offset = r.offset
	}
	r.offset, r.skip = now.offset, now.within
	return err
}

func stream(entry sandbox.LogEntry) int {
	if entry.Stderr {
		return 1
	}
	return 0
}

func endsLine(entry sandbox.LogEntry) bool { return bytes.HasSuffix(entry.Data, []byte("\n")) }
