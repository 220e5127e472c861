package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

func (a *app) fileCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "file",
		Short: "Read, write, list and watch files inside sandboxes",
		Long: `Read, write, list and watch files inside running sandboxes, as the user of
their workload. Paths are absolute. Whole folders "agentctl sandbox cp" copies.`,
		Example: `  agentctl file list web /workspace
  agentctl file read web /etc/os-release
  echo hello | agentctl file write web /workspace/hello.txt
  agentctl file watch web /workspace -r`,
	}
	cmd.AddCommand(a.fileRead(), a.fileWrite(), a.fileList(), a.fileStat(), a.fileRemove(), a.fileMkdir(), a.fileWatch())
	return cmd
}

// insidePath refuses a path that is not one of the inside.
func insidePath(s string) error {
	if !path.IsAbs(s) {
		return sandbox.Invalidf("PATH", "%q is not absolute; paths inside a sandbox begin with /", s)
	}
	return nil
}

// withFile is the body of a command whose arguments are NAME and PATH.
func (a *app) withFile(do func(ctx context.Context, c *client, name, path string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if err := insidePath(args[1]); err != nil {
			return err
		}
		c, err := a.client()
		if err != nil {
			return err
		}
		return c.fileFailure(cmd.Context(), c.link.explain(cmd.Context(), do(cmd.Context(), c, args[0], args[1])), args[0], args[1])
	}
}

// inside reports whether an error is about something that is missing or denied
// inside a sandbox, in contrast to the sandbox itself.
func (c *client) inside(ctx context.Context, err error, name string) bool {
	if reason := reasonOf(err); reason != "NOT_FOUND" && reason != "PERMISSION_DENIED" {
		return false
	}
	if field := errorInfo(err).GetMetadata()["field"]; field != "" {
		return field != "name"
	}
	_, err = c.sandbox(ctx, name)
	return err == nil
}

// fileFailure adds the hint for a path that is not there.
func (c *client) fileFailure(ctx context.Context, err error, name, file string) error {
	if reasonOf(err) == "NOT_FOUND" && c.inside(ctx, err, name) {
		return withHint(err, "agentctl file list %s %s", name, path.Dir(path.Clean(file)))
	}
	return err
}

func (a *app) fileRead() *cobra.Command {
	var offset, length uint64
	cmd := &cobra.Command{
		Use:               "read NAME PATH",
		Aliases:           []string{"cat"},
		Short:             "Print a file of a sandbox",
		Long:              "Print a file of a sandbox as it is, byte for byte. Links are followed.",
		Example:           "  agentctl file read web /etc/os-release\n  agentctl file read web /var/log/app.log --offset 4096 --length 512",
		Args:              exactly("NAME", "PATH"),
		ValidArgsFunction: a.completeNames(1),
		RunE: a.withFile(func(ctx context.Context, c *client, name, path string) error {
			stream, err := c.files.ReadFile(ctx, &agentv1.ReadFileRequest{Name: name, Path: path, Offset: offset, Length: length})
			if err != nil {
				return err
			}
			for {
				answer, err := stream.Recv()
				if errors.Is(err, io.EOF) {
					return nil
				}
				if err != nil {
					return err
				}
				if _, err := a.stdout.Write(answer.GetData()); err != nil {
					return err
				}
			}
		}),
	}
	cmd.Flags().Uint64Var(&offset, "offset", 0, "`bytes` to leave out at the beginning")
	cmd.Flags().Uint64Var(&length, "length", 0, "`bytes` to print at most (default: to the end)")
	return cmd
}

// parseMode reads permission bits in octal.
func parseMode(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > 0o7777 {
		return 0, fmt.Errorf("%q is not an octal mode; write 0644", s)
	}
	return uint32(n), nil
}

func (a *app) fileWrite() *cobra.Command {
	mode, parents := "", false
	cmd := &cobra.Command{
		Use:   "write NAME PATH",
		Short: "Replace a file of a sandbox by what stdin has",
		Long: `Replace a file of a sandbox by what stdin has, or make it. It is replaced in one
step at the end of stdin; if anything fails before, it stays as it was.`,
		Example:           "  echo hello | agentctl file write web /workspace/hello.txt\n  agentctl file write web /srv/etc/app.conf --parents --mode 0600 < app.conf",
		Args:              exactly("NAME", "PATH"),
		ValidArgsFunction: a.completeNames(1),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		header := &agentv1.WriteFileHeader{Name: args[0], Path: args[1], Parents: parents}
		if cmd.Flags().Changed("mode") {
			bits, err := parseMode(mode)
			if err != nil {
				return usagef(cmd, "--mode: %s", err)
			}
			header.Mode = &bits
		}
		return a.withFile(func(ctx context.Context, c *client, name, path string) error {
			return a.writeFile(ctx, c, header)
		})(cmd, args)
	}
	cmd.Flags().StringVar(&mode, "mode", "", "permission `bits` in octal (default: as before, or 0644)")
	cmd.Flags().BoolVarP(&parents, "parents", "p", false, "make the folders above it")
	return cmd
}

func (a *app) writeFile(ctx context.Context, c *client, header *agentv1.WriteFileHeader) error {
	if terminalOf(a.stdin) != nil {
		a.notef("what you type becomes %s; Ctrl-D ends it", header.GetPath())
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.files.WriteFile(ctx)
	if err != nil {
		return err
	}
	err = stream.Send(&agentv1.WriteFileRequest{Message: &agentv1.WriteFileRequest_Header{Header: header}})
	if err == nil {
		err = sendAll(a.stdin, func(data []byte) error {
			return stream.Send(&agentv1.WriteFileRequest{Message: &agentv1.WriteFileRequest_Data{Data: data}})
		})
	}
	// A send fails with io.EOF when the agent has answered already.
	if err != nil && !errors.Is(err, io.EOF) {
		return err // ends the call: the file stays as it was
	}
	answer, err := stream.CloseAndRecv()
	if err != nil {
		return err
	}
	return a.confirm(answer, fmt.Sprintf("%s written (%s)", header.GetPath(), size(answer.GetSizeBytes())))
}

// sendAll sends what a reader has in pieces that the API takes. An error of
// send it returns as it is.
func sendAll(from io.Reader, send func([]byte) error) error {
	chunk := make([]byte, chunkSize)
	for {
		n, err := io.ReadFull(from, chunk)
		if n > 0 {
			// gRPC has marshalled the chunk when send returns.
			if err := send(chunk[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
	}
}

func (a *app) fileList() *cobra.Command {
	return &cobra.Command{
		Use:               "list NAME PATH",
		Aliases:           []string{"ls"},
		Short:             "List a folder of a sandbox",
		Example:           "  agentctl file list web /workspace\n  agentctl file list web / -o json",
		Args:              exactly("NAME", "PATH"),
		ValidArgsFunction: a.completeNames(1),
		RunE: a.withFile(func(ctx context.Context, c *client, name, path string) error {
			files, err := c.listFiles(ctx, name, path)
			if err != nil {
				return err
			}
			if a.forPrograms() {
				return a.print(messages(files))
			}
			if a.quiet {
				for _, f := range files {
					fmt.Fprintln(a.stdout, oneLine(f.GetName()))
				}
				return nil
			}
			if len(files) == 0 {
				fmt.Fprintln(a.stderr, "no files")
				return nil
			}
			return a.fileTable(files)
		}),
	}
}

// listFiles returns a folder's files, page by page.
func (c *client) listFiles(ctx context.Context, name, path string) ([]*agentv1.File, error) {
	var all []*agentv1.File
	for token := ""; ; {
		answer, err := c.files.ListFiles(ctx, &agentv1.ListFilesRequest{Name: name, Path: path, PageToken: token})
		if err != nil {
			return nil, err
		}
		all = append(all, answer.GetFiles()...)
		if token = answer.GetNextPageToken(); token == "" {
			return all, nil
		}
	}
}

func (a *app) fileTable(files []*agentv1.File) error {
	t := table{heads: []string{"MODE", "OWNER", "SIZE", "CHANGED", "NAME"}}
	for _, f := range files {
		name := cell{oneLine(f.GetName()), nil}
		switch f.GetKind() {
		case agentv1.FileKind_FILE_KIND_FOLDER:
			name = cell{name.text + "/", a.out.bold}
		case agentv1.FileKind_FILE_KIND_LINK:
			name.text += " -> " + oneLine(f.GetTarget())
		}
		bytes := ""
		if f.GetKind() == agentv1.FileKind_FILE_KIND_FILE {
			bytes = size(f.GetSizeBytes())
		}
		t.add(plain(modeText(f)), plain(fmt.Sprintf("%d:%d", f.GetUid(), f.GetGid())), plain(bytes),
			plain(f.GetModifyTime().AsTime().In(time.Local).Format(time.DateTime)), name)
	}
	return t.write(a.stdout, a.out.bold)
}

// modeText is a file's kind and permissions as ls(1) writes them.
func modeText(f *agentv1.File) string {
	kind := map[agentv1.FileKind]string{
		agentv1.FileKind_FILE_KIND_FILE: "-", agentv1.FileKind_FILE_KIND_FOLDER: "d", agentv1.FileKind_FILE_KIND_LINK: "l",
	}[f.GetKind()]
	text, mode := []byte(orElse(kind, "?")+"rwxrwxrwx"), f.GetMode()
	for i := range 9 {
		if mode&(1<<(8-i)) == 0 {
			text[1+i] = '-'
		}
	}
	for i, special := range []struct {
		bit  uint32
		with string
	}{{0o4000, "sS"}, {0o2000, "sS"}, {0o1000, "tT"}} {
		at := 3 * (i + 1)
		if mode&special.bit == 0 {
			continue
		}
		if text[at] == 'x' {
			text[at] = special.with[0]
		} else {
			text[at] = special.with[1]
		}
	}
	return string(text)
}

func (a *app) fileStat() *cobra.Command {
	return &cobra.Command{
		Use:               "stat NAME PATH",
		Short:             "Show what a file of a sandbox is",
		Long:              "Show what a file of a sandbox is. Of a link it shows the link itself.",
		Example:           "  agentctl file stat web /workspace\n  agentctl file stat web /bin/sh -o json",
		Args:              exactly("NAME", "PATH"),
		ValidArgsFunction: a.completeNames(1),
		RunE: a.withFile(func(ctx context.Context, c *client, name, path string) error {
			ctx, cancel := quick(ctx)
			defer cancel()
			answer, err := c.files.StatFile(ctx, &agentv1.StatFileRequest{Name: name, Path: path})
			if err != nil {
				return err
			}
			if a.forPrograms() {
				return a.print(answer.GetFile())
			}
			return filePage(answer.GetFile(), time.Now()).write(a.stdout, a.out.bold)
		}),
	}
}

func filePage(f *agentv1.File, now time.Time) *page {
	kind := strings.ToLower(strings.TrimPrefix(f.GetKind().String(), "FILE_KIND_"))
	if f.GetKind() == agentv1.FileKind_FILE_KIND_UNSPECIFIED {
		kind = "special"
	}
	p := &page{}
	p.add("Path", f.GetName())
	p.add("Kind", kind)
	p.add("Target", f.GetTarget())
	if f.GetKind() == agentv1.FileKind_FILE_KIND_FILE {
		p.add("Size", fmt.Sprintf("%s (%d bytes)", size(f.GetSizeBytes()), f.GetSizeBytes()))
	}
	p.add("Mode", fmt.Sprintf("%04o (%s)", f.GetMode(), modeText(f)))
	p.add("Owner", fmt.Sprintf("%d:%d", f.GetUid(), f.GetGid()))
	p.add("Changed", moment(f.GetModifyTime(), now))
	return p
}

func (a *app) fileRemove() *cobra.Command {
	recursive := false
	cmd := &cobra.Command{
		Use:               "remove NAME PATH...",
		Aliases:           []string{"rm"},
		Short:             "Remove files of a sandbox",
		Example:           "  agentctl file remove web /tmp/cache.db\n  agentctl file remove web /tmp/cache -r",
		Args:              atLeast("NAME", "PATH"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, path := range args[1:] {
				if err := insidePath(path); err != nil {
					return err
				}
			}
			return a.each(cmd.Context(), args[1:], "removed", func(ctx context.Context, c *client, path string) (any, error) {
				_, err := c.files.RemoveFile(ctx, &agentv1.RemoveFileRequest{Name: args[0], Path: path, Recursive: recursive})
				return struct {
					Path    string `json:"path"`
					Removed bool   `json:"removed"`
				}{path, true}, c.fileFailure(ctx, err, args[0], path)
			})
		},
	}
	cmd.Flags().BoolVarP(&recursive, "recursive", "r", false, "remove folders with all that is in them")
	return cmd
}

func (a *app) fileMkdir() *cobra.Command {
	mode, parents := "", false
	cmd := &cobra.Command{
		Use:               "mkdir NAME PATH",
		Short:             "Make a folder in a sandbox",
		Long:              "Make a folder in a sandbox. One that is there already is left as it is.",
		Example:           "  agentctl file mkdir web /workspace/out\n  agentctl file mkdir web /srv/a/b -p --mode 0700",
		Args:              exactly("NAME", "PATH"),
		ValidArgsFunction: a.completeNames(1),
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		req := &agentv1.MakeFolderRequest{Name: args[0], Path: args[1], Parents: parents}
		if mode != "" {
			var err error
			if req.Mode, err = parseMode(mode); err != nil {
				return usagef(cmd, "--mode: %s", err)
			}
		}
		return a.withFile(func(ctx context.Context, c *client, _, path string) error {
			answer, err := c.files.MakeFolder(ctx, req)
			if err != nil {
				return err
			}
			return a.confirm(answer, path+" made")
		})(cmd, args)
	}
	cmd.Flags().StringVar(&mode, "mode", "", "permission `bits` in octal (default 0755)")
	cmd.Flags().BoolVarP(&parents, "parents", "p", false, "make the folders above it")
	return cmd
}
