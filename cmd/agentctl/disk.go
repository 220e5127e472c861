package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	agentv1 "github.com/choiros/agent/api/choiros/agent/v1"
)

func (a *app) diskCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "disk",
		Short: "Copy disks of sandboxes, and make them what they were",
		Long: `Copy disks of sandboxes, and make them what they were, on drivers with disks. The
last 3 copies of a disk are kept, beside it and for as long as it is there.`,
		Example: `  agentctl disk snapshot db
  agentctl disk list db
  agentctl disk restore db 20261126T104500.000000Z`,
	}
	cmd.AddCommand(a.diskSnapshot(), a.diskList(), a.diskRestore())
	return cmd
}

const targetUsage = "where the disk is mounted, an absolute `path`; needed if there are several"

func (a *app) diskSnapshot() *cobra.Command {
	var target string
	cmd := &cobra.Command{
		Use:   "snapshot NAME",
		Short: "Copy a disk of a sandbox that is stopped, hibernated or paused",
		Long: `Copy a disk of a sandbox that is stopped, hibernated or paused. The copy of a
paused one is as after a power cut. Where the file system can, no block is copied.`,
		Example:           "  agentctl disk snapshot db\n  agentctl disk snapshot db --target /var/lib/db",
		Args:              exactly("NAME"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			answer, err := c.sandboxes.CreateDiskSnapshot(cmd.Context(), &agentv1.CreateDiskSnapshotRequest{
				Name: args[0], Target: target, RequestId: requestID(),
			})
			if err != nil {
				return err
			}
			s := answer.GetSnapshot()
			return a.confirm(s, fmt.Sprintf("%s: copied as %s (%s)", args[0], oneLine(s.GetId()), size(s.GetSizeBytes())))
		},
	}
	cmd.Flags().StringVar(&target, "target", "", targetUsage)
	return cmd
}

func (a *app) diskList() *cobra.Command {
	var target string
	cmd := &cobra.Command{
		Use:               "list NAME",
		Short:             "List the copies of a disk, the latest first",
		Example:           "  agentctl disk list db\n  agentctl disk list db -q",
		Args:              exactly("NAME"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			ctx, cancel := quick(cmd.Context())
			defer cancel()
			answer, err := c.sandboxes.ListDiskSnapshots(ctx, &agentv1.ListDiskSnapshotsRequest{Name: args[0], Target: target})
			if err != nil {
				return err
			}
			return a.showSnapshots(answer.GetSnapshots(), time.Now())
		},
	}
	cmd.Flags().StringVar(&target, "target", "", targetUsage)
	return cmd
}

func (a *app) showSnapshots(snapshots []*agentv1.DiskSnapshot, now time.Time) error {
	if a.forPrograms() {
		return a.print(messages(snapshots))
	}
	if a.quiet {
		for _, s := range snapshots {
			fmt.Fprintln(a.stdout, oneLine(s.GetId()))
		}
		return nil
	}
	t := table{heads: []string{"SNAPSHOT", "SIZE", "AGE"}}
	for _, s := range snapshots {
		t.add(plain(s.GetId()), plain(size(s.GetSizeBytes())), plain(age(now.Sub(s.GetCreateTime().AsTime()))))
	}
	return t.write(a.stdout, a.out.bold)
}

func (a *app) diskRestore() *cobra.Command {
	var target string
	cmd := &cobra.Command{
		Use:   "restore NAME SNAPSHOT",
		Short: "Make a disk of a sandbox that does not run what it was",
		Long: `Make a disk of a sandbox that does not run what it was when the copy was made, all
or nothing. What was written since is gone, as is a memory that was kept of it
(hibernate). The copy stays.`,
		Example:           "  agentctl disk restore db 20261126T104500.000000Z",
		Args:              exactly("NAME", "SNAPSHOT"),
		ValidArgsFunction: a.completeNames(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			answer, err := c.sandboxes.RestoreDiskSnapshot(cmd.Context(), &agentv1.RestoreDiskSnapshotRequest{
				Name: args[0], Target: target, Snapshot: args[1], RequestId: requestID(),
			})
			if err != nil {
				return err
			}
			return a.confirm(answer, fmt.Sprintf("%s: restored %s", args[0], oneLine(args[1])))
		},
	}
	cmd.Flags().StringVar(&target, "target", "", targetUsage)
	return cmd
}
