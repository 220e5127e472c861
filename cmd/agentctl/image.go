package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
	"github.com/choiros/agent/internal/sandbox"
)

func (a *app) imageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Load, pull, list and remove the images that sandboxes boot",
		Example: `  agentctl image pull docker.io/library/alpine:3
  podman save localhost/app | agentctl image load -
  agentctl image list`,
	}
	driver := ""
	cmd.PersistentFlags().StringVar(&driver, "driver", "", "`name` of the driver whose images (default: the agent's default driver)")
	cmd.AddCommand(a.imageLoad(&driver), a.imagePull(&driver), a.imageList(&driver), a.imageRemove(&driver))
	return cmd
}

// chunkSize is within the API's 1 MiB for a message of an archive.
const chunkSize = 512 << 10

func (a *app) imageLoad(driver *string) *cobra.Command {
	return &cobra.Command{
		Use:   "load FILE",
		Short: "Add the images of an OCI or docker archive",
		Long: `Add the images of an OCI or docker archive: a tar file, or one compressed with
gzip, xz or zstd, as "podman save" and "docker save" write them. FILE may be - for
stdin. A corrupt or truncated archive adds nothing.`,
		Example: "  agentctl image load app.tar\n  podman save localhost/app | agentctl image load -",
		Args:    exactly("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			images, err := a.load(cmd.Context(), c, *driver, args[0])
			if err != nil {
				return err
			}
			return a.showGained(images, "loaded")
		},
	}
}

// load sends an archive. One that comes from a file is sent once more if the
// connection drops; the request id keeps it from being added twice.
func (a *app) load(ctx context.Context, c *client, driver, path string) ([]*agentv1.Image, error) {
	id := requestID()
	for attempt := 1; ; attempt++ {
		archive, length, err := a.openArchive(path)
		if err != nil {
			return nil, err
		}
		shown := a.newProgress(path)
		images, err := c.upload(ctx, archive, func(sent uint64) { shown.say(sentText(sent, length), false) },
			&agentv1.LoadImageRequest_Header{Driver: driver, SizeBytes: length, RequestId: id})
		shown.stop()
		if path != "-" {
			err = errors.Join(err, archive.Close())
		}
		connected, _ := c.link.state()
		if !lost(err) || !connected || path == "-" || attempt == 2 {
			return images, c.link.explain(ctx, err)
		}
		a.notef("the connection to the agent was lost; sending %s once more", path)
		if err := c.reconnect(ctx); err != nil {
			return nil, err
		}
	}
}

// openArchive opens a file, or stdin for -. length is zero if not known.
func (a *app) openArchive(path string) (archive io.ReadCloser, length uint64, err error) {
	if path == "-" {
		if f, ok := a.stdin.(*os.File); ok && newTerminal(f, a.getenv).live {
			return nil, 0, withHint(sandbox.Invalidf("FILE", "- reads an archive from stdin, which is a terminal"), "agentctl image load FILE")
		}
		return io.NopCloser(a.stdin), 0, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, &fileError{file: path, problem: unwrapAll(err).Error()}
	}
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		err = sandbox.Invalidf("FILE", "%s is a folder; write the layout as one archive: tar -C %s -c . | agentctl image load -", path, path)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	if info.Mode().IsRegular() {
		length = uint64(max(info.Size(), 0))
	}
	return f, length, nil
}

func sentText(sent, length uint64) string {
	switch {
	case length == 0:
		return "sent " + size(sent)
	case sent >= length:
		return "sent; the agent is adding it"
	}
	return fmt.Sprintf("%d%% of %s", 100*sent/length, size(length))
}

// upload sends one archive and returns what it held.
func (c *client) upload(ctx context.Context, archive io.Reader, sent func(uint64), header *agentv1.LoadImageRequest_Header) ([]*agentv1.Image, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.images.LoadImage(ctx)
	if err != nil {
		return nil, err
	}
	// A send fails with io.EOF when the agent has answered already: the answer
	// is what CloseAndRecv returns.
	err = stream.Send(&agentv1.LoadImageRequest{Part: &agentv1.LoadImageRequest_Header_{Header: header}})
	chunk, total := make([]byte, chunkSize), uint64(0)
	for err == nil {
		n, readErr := io.ReadFull(archive, chunk)
		if readErr != nil && !errors.Is(readErr, io.EOF) && !errors.Is(readErr, io.ErrUnexpectedEOF) {
			return nil, fmt.Errorf("read archive: %w", readErr) // cancels the stream: nothing is added
		}
		if n > 0 {
			// gRPC has marshalled the chunk when Send returns.
			err = stream.Send(&agentv1.LoadImageRequest{Part: &agentv1.LoadImageRequest_Data{Data: chunk[:n]}})
			total += uint64(n)
			sent(total)
		}
		if readErr != nil {
			break
		}
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	answer, err := stream.CloseAndRecv()
	return answer.GetImages(), err
}

func (a *app) imagePull(driver *string) *cobra.Command {
	return &cobra.Command{
		Use:     "pull REFERENCE",
		Short:   "Fetch an image from its registry",
		Long:    "Fetch an image from its registry. The reference is fully qualified: the registry\nis part of it.",
		Example: "  agentctl image pull docker.io/library/alpine:3\n  agentctl image pull ghcr.io/acme/app@sha256:…",
		Args:    exactly("REFERENCE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			req := &agentv1.PullImageRequest{Driver: *driver, Reference: args[0], RequestId: requestID()}
			for attempt := 1; ; attempt++ {
				image, err := a.pull(cmd.Context(), c, req)
				connected, _ := c.link.state()
				if err == nil {
					return a.showGained([]*agentv1.Image{image}, "pulled")
				}
				if !lost(err) || !connected || attempt == 2 {
					return c.link.explain(cmd.Context(), err)
				}
				a.notef("the connection to the agent was lost; trying once more")
				if err := c.reconnect(cmd.Context()); err != nil {
					return err
				}
			}
		},
	}
}

func (a *app) pull(ctx context.Context, c *client, req *agentv1.PullImageRequest) (*agentv1.Image, error) {
	stream, err := c.images.PullImage(ctx, req)
	if err != nil {
		return nil, err
	}
	shown := a.newProgress(req.GetReference())
	defer shown.stop()
	shown.say("waiting for the registry", false)
	var image *agentv1.Image
	for {
		answer, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			if image == nil {
				return nil, errors.New("the agent did not say which image it pulled")
			}
			return image, nil
		}
		if err != nil {
			return nil, err
		}
		if text := answer.GetProgress(); text != "" {
			shown.say(text, true)
		}
		if answer.GetImage() != nil {
			image = answer.GetImage()
		}
	}
}

// showGained tells which images there are now.
func (a *app) showGained(images []*agentv1.Image, done string) error {
	if a.forPrograms() {
		return a.print(messages(images))
	}
	for _, image := range images {
		if a.quiet {
			fmt.Fprintln(a.stdout, imageNames(image)[0])
			continue
		}
		for _, name := range imageNames(image) {
			fmt.Fprintf(a.stdout, "%s %s %s\n", done, name, a.out.dim("("+size(image.GetSizeBytes())+")"))
		}
	}
	return nil
}

// imageNames are an image's names, or its id if it has none.
func imageNames(image *agentv1.Image) []string {
	if len(image.GetNames()) == 0 {
		return []string{image.GetId()}
	}
	return image.GetNames()
}

func (a *app) imageList(driver *string) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the images that sandboxes can boot",
		Example: "  agentctl image list\n  agentctl image list -o json | jq -r '.[].names[]'",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			ctx, cancel := quick(cmd.Context())
			defer cancel()
			answer, err := c.images.ListImages(ctx, &agentv1.ListImagesRequest{Driver: *driver})
			if err != nil {
				return err
			}
			return a.showImages(answer.GetImages())
		},
	}
}

func (a *app) showImages(images []*agentv1.Image) error {
	if a.forPrograms() {
		return a.print(messages(images))
	}
	if len(images) == 0 && !a.quiet {
		fmt.Fprintln(a.stderr, "no images")
		return nil
	}
	t, now := table{heads: []string{"NAME", "ID", "SIZE", "AGE"}}, time.Now()
	for _, image := range images {
		for _, name := range imageNames(image) {
			if a.quiet {
				fmt.Fprintln(a.stdout, name)
				continue
			}
			created := ""
			// Images that build the same anywhere say that they are of 1970.
			if image.GetCreateTime().GetSeconds() > 0 {
				created = age(now.Sub(image.GetCreateTime().AsTime()))
			}
			t.add(plain(name), plain(shortID(image.GetId())), plain(size(image.GetSizeBytes())), plain(created))
		}
	}
	if a.quiet {
		return nil
	}
	return t.write(a.stdout, a.out.bold)
}

func (a *app) imageRemove(driver *string) *cobra.Command {
	force := false
	cmd := &cobra.Command{
		Use:     "remove REFERENCE...",
		Aliases: []string{"rm"},
		Short:   "Remove images, by name or id",
		Long:    "Remove images, by name or id; of an image with several names, one name. An image\nthat a sandbox uses is kept.",
		Example: "  agentctl image remove localhost/app:old\n  agentctl image remove --force localhost/app:old",
		Args:    atLeastOne("REFERENCE"),
		RunE: func(cmd *cobra.Command, references []string) error {
			return a.each(cmd.Context(), references, "removed", func(ctx context.Context, c *client, reference string) (any, error) {
				_, err := c.images.RemoveImage(ctx, &agentv1.RemoveImageRequest{
					Driver: *driver, Reference: reference, AllowMissing: force, RequestId: requestID(),
				})
				return struct {
					Reference string `json:"reference"`
					Removed   bool   `json:"removed"`
				}{reference, true}, imageHint(err)
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "succeed also if there is no such image")
	return cmd
}

func imageHint(err error) error {
	switch reasonOf(err) {
	case "NOT_FOUND":
		return withHint(err, "agentctl image list")
	case "WRONG_STATE":
		return withHint(err, "agentctl sandbox list shows what uses it")
	}
	return err
}
