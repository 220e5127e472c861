package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

func (a *app) fileWatch() *cobra.Command {
	recursive := false
	cmd := &cobra.Command{
		Use:   "watch NAME PATH",
		Short: "Print every change in a folder of a sandbox as it happens",
		Long: `Print every change of a file, or in a folder, of a sandbox as it happens, until
Ctrl-C. If changes come faster than they are read, it says that some were lost.
With -o json, each step of the API's stream is a line of JSON; the first one is
empty and says that it watches.`,
		Example:           "  agentctl file watch web /workspace\n  agentctl file watch web /workspace -r -o json",
		Args:              exactly("NAME", "PATH"),
		ValidArgsFunction: a.completeNames(1),
		RunE: a.withFile(func(ctx context.Context, c *client, name, path string) error {
			stream, err := c.files.WatchFiles(ctx, &agentv1.WatchFilesRequest{Name: name, Path: path, Recursive: recursive})
			if err != nil {
				return err
			}
			for first := true; ; first = false {
				step, err := stream.Recv()
				if errors.Is(err, io.EOF) {
					return nil
				}
				if err != nil {
					return err
				}
				if first && !a.forPrograms() {
					a.notef("watching %s", path)
				}
				if err := a.printFileChanges(step); err != nil {
					return err
				}
			}
		}),
	}
	cmd.Flags().BoolVarP(&recursive, "recursive", "r", false, "the folders below it, too")
	return cmd
}

func (a *app) printFileChanges(step *agentv1.WatchFilesResponse) error {
	if a.forPrograms() {
		return a.printEvent(step)
	}
	clock := a.out.dim(time.Now().Format(time.TimeOnly))
	for _, change := range step.GetChanges() {
		paint := map[agentv1.FileChange_Kind]func(string) string{
			agentv1.FileChange_KIND_CREATED: a.out.green, agentv1.FileChange_KIND_REMOVED: a.out.red,
		}[change.GetKind()]
		if paint == nil {
			paint = a.out.yellow
		}
		kind := strings.ToLower(strings.TrimPrefix(change.GetKind().String(), "KIND_"))
		if _, err := fmt.Fprintf(a.stdout, "%s  %s  %s\n", clock, paint(kind), oneLine(change.GetPath())); err != nil {
			return err
		}
	}
	if step.GetLost() {
		a.notef("some changes were lost: they came faster than they were read")
	}
	return nil
}
