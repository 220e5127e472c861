package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/archive"
	"github.com/choiros/agent/internal/sandbox"
)

const copyLong = `Copy files between here and a running sandbox: one of SRC and DST is NAME:PATH, with
an absolute path. Folders are copied whole, with modes, times and links.

DST that is a folder gets a copy in it, of SRC's name; otherwise DST becomes the
copy, and its folder must exist. SRC that ends in /. stands for what is in it. A
local path with a colon is written ./a:b.

With - for the local side, it is a tar stream: from stdin, unpacked in the folder
NAME:PATH, or of NAME:PATH to stdout.

What is copied out is unpacked in DST and never outside of it: links that lead
out of what is copied are left out, and named.`

// copyFlags are the flags of `sandbox cp`.
type copyFlags struct{ follow, owners bool }

func (a *app) sandboxCopy() *cobra.Command {
	f := &copyFlags{}
	cmd := &cobra.Command{
		Use:   "cp SRC DST",
		Short: "Copy files into a sandbox or out of it",
		Long:  copyLong,
		Example: `  agentctl sandbox cp ./dist web:/srv/app
  agentctl sandbox cp ./dist/. web:/srv/app           # what is in it
  agentctl sandbox cp web:/var/log/app.log .
  agentctl sandbox cp web:/data - | gzip > data.tar.gz
  tar -c src | agentctl sandbox cp - web:/workspace`,
		Args:              exactly("SRC", "DST"),
		ValidArgsFunction: a.completeCopy,
		RunE: func(cmd *cobra.Command, args []string) error {
			src, dst := parsePlace(args[0]), parsePlace(args[1])
			switch {
			case src.inside() && dst.inside():
				return withHint(sandbox.Invalidf("DST", "one of SRC and DST is here"), "agentctl sandbox cp %s - | agentctl sandbox cp - %s", args[0], args[1])
			case !src.inside() && !dst.inside():
				return withHint(sandbox.Invalidf("DST", "one of SRC and DST is in a sandbox: NAME:PATH"), "agentctl sandbox cp --help")
			}
			for _, p := range []place{src, dst} {
				if p.inside() && !path.IsAbs(p.path) {
					return sandbox.Invalidf(p.sandbox+":"+p.path, "the path is not absolute; write %s:/%s", p.sandbox, p.path)
				}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			job := &copyJob{a: a, c: c, flags: *f, began: time.Now()}
			if src.inside() {
				return job.out(cmd.Context(), src, dst.path)
			}
			return job.in(cmd.Context(), src.path, dst)
		},
	}
	cmd.Flags().BoolVarP(&f.follow, "follow-link", "L", false, "follow SRC itself if it is a link")
	cmd.Flags().BoolVarP(&f.owners, "archive", "a", false, "keep the numbers of owners and groups, where that is allowed")
	return cmd
}

// place is a side of a copy: in a sandbox, or here.
type place struct{ sandbox, path string }

func (p place) inside() bool { return p.sandbox != "" }

// parsePlace reads NAME:PATH, or a local path.
func parsePlace(s string) place {
	inside := regexp.MustCompile(`^([a-z0-9][a-z0-9-]{0,62}):(.*)$`).FindStringSubmatch(s)
	if inside == nil {
		return place{"", s}
	}
	return place{inside[1], inside[2]}
}

// copyJob is one run of `sandbox cp`.
type copyJob struct {
	a     *app
	c     *client
	flags copyFlags
	began time.Time
	bytes uint64 // of the stream
	shown *progress
	left  int // entries that were left out
}

// meter counts what is carried and shows it.
func (j *copyJob) meter(n int) {
	j.bytes += uint64(n)
	text := size(j.bytes)
	if took := time.Since(j.began); took > time.Second {
		text += fmt.Sprintf(", %s/s", size(uint64(float64(j.bytes)/took.Seconds())))
	}
	j.shown.say(text, false)
}

// skipped tells of what is not copied, of the first few by name.
func (j *copyJob) skipped(name, why string) {
	if j.left++; j.left <= 10 {
		j.a.notef("left out %s: %s", name, why)
	}
}

// quiet takes the progress away.
func (j *copyJob) quiet() {
	j.shown.stop()
	j.shown = nil
}

// done tells how the copy ended.
func (j *copyJob) done(to io.Writer, subject string, files, bytes uint64) error {
	j.quiet()
	if j.left > 10 {
		j.a.notef("left out %d in all", j.left)
	}
	took := time.Since(j.began)
	switch {
	case j.a.forPrograms() && to == j.a.stdout:
		return j.a.print(map[string]any{"files": files, "size_bytes": bytes, "left_out": j.left})
	case j.a.quiet || j.a.forPrograms():
		return nil
	}
	_, err := fmt.Fprintf(to, "%s: %s, %s%s\n", subject, plural(int(files), "file", "files"), size(bytes), j.a.out.dim(" (after "+duration(took)+")"))
	return err
}

// in copies into a sandbox.
func (j *copyJob) in(ctx context.Context, src string, dst place) error {
	if src == "-" {
		if terminalOf(j.a.stdin) != nil {
			return withHint(sandbox.Invalidf("SRC", "- reads a tar stream from stdin, which is a terminal"), "tar -c FILE | agentctl sandbox cp - %s:%s", dst.sandbox, dst.path)
		}
		return j.upload(ctx, j.a.stdin, dst, dst.path)
	}
	lookAt := os.Lstat
	if j.flags.follow {
		lookAt = os.Stat
	}
	info, err := lookAt(src)
	if err != nil {
		return sandbox.Invalidf("SRC", "%s: %s", src, unwrapAll(err))
	}
	target, to, err := j.statInside(ctx, dst)
	if err != nil {
		return err
	}
	folder, name, err := archive.Destination(filepath.ToSlash(src), archive.Stat{Exists: true, Folder: info.IsDir()}, target, to)
	if err != nil {
		return destinationError(err, dst)
	}
	if !to.Exists {
		if _, above, err := j.statInside(ctx, place{dst.sandbox, folder}); err != nil || !above.Folder {
			return errors.Join(err, noFolder(dst.sandbox, folder))
		}
	}
	reader, writer := io.Pipe()
	packed := make(chan struct{})
	go func() {
		defer close(packed)
		writer.CloseWithError(archive.Pack(ctx, writer, src, name, archive.PackOptions{Follow: j.flags.follow, Skipped: j.skipped}))
	}()
	err = j.upload(ctx, reader, dst, folder)
	_ = reader.Close() // it ends the packing; never fails
	<-packed
	return err
}

func noFolder(name, folder string) error {
	return withHint(sandbox.Invalidf("DST", "there is no folder %s in %s", folder, name), "agentctl file mkdir %s %s -p", name, folder)
}

// upload sends a tar stream to be unpacked in a folder.
func (j *copyJob) upload(ctx context.Context, from io.Reader, dst place, folder string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	j.shown = j.a.newProgress(dst.sandbox + ":" + dst.path)
	answer, err := j.send(ctx, from, &agentv1.UploadArchiveHeader{Name: dst.sandbox, Path: folder, Owners: j.flags.owners})
	j.quiet()
	if err != nil {
		return j.c.fileFailure(ctx, j.c.link.explain(ctx, err), dst.sandbox, folder)
	}
	return j.done(j.a.stdout, "copied to "+dst.sandbox+":"+dst.path, answer.GetFiles(), answer.GetSizeBytes())
}

func (j *copyJob) send(ctx context.Context, from io.Reader, header *agentv1.UploadArchiveHeader) (*agentv1.UploadArchiveResponse, error) {
	stream, err := j.c.files.UploadArchive(ctx)
	if err != nil {
		return nil, err
	}
	err = stream.Send(&agentv1.UploadArchiveRequest{Message: &agentv1.UploadArchiveRequest_Header{Header: header}})
	if err == nil {
		err = sendAll(from, func(data []byte) error {
			j.meter(len(data))
			return stream.Send(&agentv1.UploadArchiveRequest{Message: &agentv1.UploadArchiveRequest_Data{Data: data}})
		})
	}
	// A send fails with io.EOF when the agent has answered already.
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return stream.CloseAndRecv()
}

// maxLinks is how many links are followed to a destination, as in Linux.
const maxLinks = 40

// statInside returns what a path inside is, with links followed, and the path
// that they lead to. What is at the end of p stays there: /, or /..
func (j *copyJob) statInside(ctx context.Context, p place) (string, archive.Stat, error) {
	ctx, cancel := quick(ctx)
	defer cancel()
	at, followed := path.Clean(p.path), false
	for range maxLinks {
		answer, err := j.c.files.StatFile(ctx, &agentv1.StatFileRequest{Name: p.sandbox, Path: at})
		target := p.path
		if followed {
			target = at
		}
		if reasonOf(err) == "NOT_FOUND" && j.c.inside(ctx, err, p.sandbox) {
			return target, archive.Stat{}, nil
		}
		if err != nil {
			return "", archive.Stat{}, err
		}
		f := answer.GetFile()
		if f.GetKind() != agentv1.FileKind_FILE_KIND_LINK {
			return target, archive.Stat{Exists: true, Folder: f.GetKind() == agentv1.FileKind_FILE_KIND_FOLDER}, nil
		}
		if followed = true; path.IsAbs(f.GetTarget()) {
			at = path.Clean(f.GetTarget())
		} else {
			at = path.Join(path.Dir(at), f.GetTarget())
		}
	}
	return "", archive.Stat{}, sandbox.Invalidf("DST", "%s:%s: too many links", p.sandbox, p.path)
}

// destinationError is archive.Destination's, as a person reads it.
func destinationError(err error, dst place) error {
	err = sandbox.Invalidf("DST", "%s", strings.TrimPrefix(err.Error(), archive.ErrRefused.Error()+": "))
	if dst.inside() {
		return withHint(err, "agentctl file list %s %s", dst.sandbox, path.Dir(path.Clean(dst.path)))
	}
	return err
}

// out copies out of a sandbox.
func (j *copyJob) out(ctx context.Context, src place, dst string) error {
	if dst == "-" && terminalOf(j.a.stdout) != nil {
		return withHint(sandbox.Invalidf("DST", "- writes a tar stream to stdout, which is a terminal"), "agentctl sandbox cp %s:%s - > FILE.tar", src.sandbox, src.path)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := j.c.files.DownloadArchive(ctx, &agentv1.DownloadArchiveRequest{Name: src.sandbox, Path: path.Clean(src.path), Follow: j.flags.follow})
	if err != nil {
		return j.c.link.explain(ctx, err)
	}
	first, err := stream.Recv()
	if err != nil {
		return j.c.fileFailure(ctx, j.c.link.explain(ctx, err), src.sandbox, src.path)
	}
	j.shown = j.a.newProgress(src.sandbox + ":" + src.path)
	defer j.quiet()
	from := &download{stream: stream, rest: first.GetData(), meter: j.meter}
	if dst == "-" {
		if _, err := io.Copy(j.a.stdout, from); err != nil {
			return j.c.link.explain(ctx, err)
		}
		return j.done(j.a.stderr, "copied from "+src.sandbox+":"+src.path, 1, j.bytes)
	}
	sum, err := j.unpack(ctx, from, first.GetFile(), src, dst)
	if err != nil {
		return err
	}
	return j.done(j.a.stdout, "copied to "+dst, uint64(sum.Files), uint64(sum.Bytes))
}

// unpack makes the files of a stream that is not trusted, in dst alone.
func (j *copyJob) unpack(ctx context.Context, from *download, what *agentv1.File, src place, dst string) (archive.Summary, error) {
	info, err := os.Stat(dst)
	to := archive.Stat{Exists: err == nil, Folder: err == nil && info.IsDir()}
	is := archive.Stat{Exists: true, Folder: what.GetKind() == agentv1.FileKind_FILE_KIND_FOLDER}
	folder, name, err := archive.Destination(src.path, is, filepath.ToSlash(dst), to)
	if err != nil {
		return archive.Summary{}, destinationError(err, place{"", dst})
	}
	root, err := os.OpenRoot(filepath.FromSlash(folder))
	if err != nil {
		return archive.Summary{}, sandbox.Invalidf("DST", "%s: %s", folder, unwrapAll(err))
	}
	defer root.Close()
	sum, err := archive.Unpack(ctx, from, root, archive.UnpackOptions{Rename: name, Owners: j.flags.owners, Skipped: j.skipped})
	if err != nil && statusOf(err) != nil {
		return sum, j.c.link.explain(ctx, err)
	}
	if errors.Is(err, archive.ErrRefused) || errors.Is(err, archive.ErrLimit) {
		err = fmt.Errorf("copy from %s:%s: %w: %w", src.sandbox, src.path, sandbox.ErrCorrupt, err)
	}
	return sum, err
}

// download is a stream of an archive as an io.Reader.
type download struct {
	stream interface {
		Recv() (*agentv1.DownloadArchiveResponse, error)
	}
	rest  []byte
	meter func(n int)
}

func (d *download) Read(p []byte) (int, error) {
	for len(d.rest) == 0 {
		answer, err := d.stream.Recv()
		if err != nil {
			return 0, err
		}
		d.rest = answer.GetData()
		d.meter(len(d.rest))
	}
	n := copy(p, d.rest)
	d.rest = d.rest[n:]
	return n, nil
}

// completeCopy completes the names of sandboxes, with a colon, and files.
func (a *app) completeCopy(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 1 || parsePlace(toComplete).inside() {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	names, _ := a.completeNames(-1)(cmd, nil, toComplete)
	for i, name := range names {
		bare, about, _ := strings.Cut(name, "\t")
		names[i] = bare + ":\t" + about
	}
	if len(names) == 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return names, cobra.ShellCompDirectiveNoSpace
}
