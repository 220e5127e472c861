package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// extent is a piece of a file.
type extent struct{ offset, length int64 }

// extents returns the pieces of a file that are stored; nil if that is all of
// it, or if the file system does not say.
func extents(f *os.File, size int64) ([]extent, error) {
	found := []extent{}
	for at := int64(0); at < size; {
		start, err := f.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && start >= size {
			break
		}
		if err != nil {
			if at == 0 {
				return nil, nil //nolint:nilerr // Not every file system can.
			}
			return nil, err
		}
		end, err := f.Seek(start, unix.SEEK_HOLE)
		if err != nil {
			return nil, err
		}
		if end = min(end, size); len(found) == maxExtents-1 {
			end = size
		}
		found = append(found, extent{start, end - start})
		at = end
	}
	if len(found) == 1 && found[0] == (extent{0, size}) {
		return nil, nil
	}
	return found, nil
}

// sparse writes a file with holes. archive/tar reads these and does not write
// them; the format is "PAX Format, Version 1.0" of "Storing Sparse Files" in
// GNU tar's manual: the data begins with a map of itself.
func (p *packer) sparse(f *os.File, header *tar.Header, extents []extent) error {
	name, size := header.Name, header.Size
	stored := int64(0)
	for _, e := range extents {
		stored += e.length
	}
	if n := len(extents); n == 0 || extents[n-1].offset+extents[n-1].length < size {
		extents = append(extents, extent{size, 0}) // says how long the last hole is
	}
	table := strconv.AppendInt(nil, int64(len(extents)), 10)
	for _, e := range extents {
		table = strconv.AppendInt(append(table, '\n'), e.offset, 10)
		table = strconv.AppendInt(append(table, '\n'), e.length, 10)
	}
	table = pad(append(table, '\n'))

	header.Size = int64(len(table)) + stored
	// What comes next goes around the writer, which must have ended its entry.
	if err := p.tar.Flush(); err != nil {
		return err
	}
	for _, part := range [][]byte{sparseHeaders(header, size), table} {
		if _, err := p.out.Write(part); err != nil {
			return err
		}
	}
	for _, e := range extents {
		if err := p.copy(p.out, f, e, name); err != nil {
			return err
		}
	}
	_, err := p.out.Write(make([]byte, -stored&(blockSize-1)))
	return err
}

// sparseHeaders returns the extended and the plain header of a file that has
// size bytes with its holes, and header.Size in the archive.
func sparseHeaders(header *tar.Header, size int64) []byte {
	var records []byte
	for _, r := range [][2]string{
		{"GNU.sparse.major", "1"},
		{"GNU.sparse.minor", "0"},
		{"GNU.sparse.name", header.Name},
		{"GNU.sparse.realsize", strconv.FormatInt(size, 10)},
		{"gid", strconv.Itoa(header.Gid)},
		{"mtime", seconds(header.ModTime)},
		{"size", strconv.FormatInt(header.Size, 10)},
		{"uid", strconv.Itoa(header.Uid)},
	} {
		records = append(records, record(r[0], r[1])...)
	}
	extended := &tar.Header{Typeflag: tar.TypeXHeader, Name: "PaxHeaders/sparse", Mode: 0o644, Size: int64(len(records))}
	plain := *header
	plain.Name = "GNUSparseFile.0/" + path.Base(header.Name) // for those who know nothing of it
	blocks := append(block(extended), pad(records)...)
	return append(blocks, block(&plain)...)
}

// record is one of an extended header: its length, which counts itself, a key
// and a value.
func record(key, value string) string {
	rest := " " + key + "=" + value + "\n"
	size := len(rest)
	for {
		text := strconv.Itoa(size) + rest
		if len(text) == size {
			return text
		}
		size = len(text)
	}
}

// seconds is a time as an extended header has it.
func seconds(t time.Time) string {
	sec, nano, sign := t.Unix(), int64(t.Nanosecond()), ""
	if sec < 0 && nano > 0 {
		sec, nano = sec+1, int64(time.Second)-nano
		if sec == 0 {
			sign = "-"
		}
	}
	return fmt.Sprintf("%s%d.%09d", sign, sec, nano)
}

// block is a plain header (ustar). What does not fit is in the extended one.
func block(header *tar.Header) []byte {
	b := make([]byte, blockSize)
	octal := func(at, size int, value int64) {
		text := fmt.Sprintf("%0*o", size-1, value)
		if value < 0 || len(text) >= size {
			text = fmt.Sprintf("%0*o", size-1, 0)
		}
		copy(b[at:], text)
	}
	copy(b[:100], header.Name)
	octal(100, 8, header.Mode)
	octal(108, 8, int64(header.Uid))
	octal(116, 8, int64(header.Gid))
	octal(124, 12, header.Size)
	octal(136, 12, max(header.ModTime.Unix(), 0))
	b[156] = header.Typeflag
	copy(b[257:], "ustar\x0000")

	// The sum is of the block with spaces where the sum will be.
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// pad fills a last block with zeros.
func pad(b []byte) []byte { return append(b, make([]byte, -len(b)&(blockSize-1))...) }

// writeSparse writes what r has to an empty file, and leaves holes where there
// are nothing but zeros. It returns how much that was.
func writeSparse(ctx context.Context, f *os.File, r io.Reader, buffer []byte) (int64, error) {
	size, written := int64(0), int64(0)
	for {
		if err := ctx.Err(); err != nil {
			return size, err
		}
		n, readErr := fill(r, buffer)
		for start := 0; start < n; {
			end := data(buffer[start:n]) + start
			if end > start {
				if _, err := f.WriteAt(buffer[start:end], size+int64(start)); err != nil {
					return size, err
				}
				written = size + int64(end)
			}
			start = min(end+holeSize, n) // past the zeros that ended it
		}
		size += int64(n)
		if readErr == nil {
			continue
		}
		if !errors.Is(readErr, io.EOF) {
			return size, readErr
		}
		if written < size {
			return size, f.Truncate(size)
		}
		return size, nil
	}
}

// data returns how much of b comes before a hole.
func data(b []byte) int {
	var zeros [holeSize]byte
	for at := 0; at < len(b); at += holeSize {
		piece := b[at:min(at+holeSize, len(b))]
		if bytes.Equal(piece, zeros[:len(piece)]) {
			return at
		}
	}
	return len(b)
}

// fill reads until buffer is full or there is an error. Unlike io.ReadFull it
// keeps an end apart from one that came too early.
func fill(r io.Reader, buffer []byte) (n int, err error) {
	for n < len(buffer) && err == nil {
		var more int
		more, err = r.Read(buffer[n:])
		n += more
	}
	return n, err
}
