package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/choiros/agent/internal/sandbox"
)

// meanings says for people what the reasons of the error table mean.
func meanings() map[string]string {
	return map[string]string{
		"INVALID":            "the request is wrong in itself: a flag, a field, a file",
		"REQUEST_ID_REUSED":  "that --request-id was used for another request",
		"CORRUPT":            "an archive or a record is not what it says it is",
		"NOT_FOUND":          "there is no such sandbox, image, driver or class",
		"ALREADY_EXISTS":     "there already is one of that name",
		"WRONG_STATE":        "right in itself, but not in the state that things are in",
		"UNSUPPORTED":        "this agent, driver or host cannot do it",
		"RESOURCE_EXHAUSTED": "the host is out of something; later it may do",
		"HOST_DRAINING":      "the host takes no boots at present",
		"DRIVER_UNAVAILABLE": "the agent, or what it drives, does not answer",
		"GUEST_UNAVAILABLE":  "the guestd inside the sandbox does not answer",
		"CONNECTION_REFUSED": "nothing inside the sandbox accepts connections on that port",
		"NOT_READY":          "the sandbox did not become ready in its time",
		"TIMEOUT":            "a time limit passed: the agent's own, or --timeout",
		"WORKLOAD_ENDED":     "the workload ended before it was ready",
		"SUPERSEDED":         "a later request (stop, delete) ended this one",
		"PERMISSION_DENIED":  "you may not",
		"INTERNAL":           "anything else",
	}
}

// exitCodes is the list of exit statuses, made from the error table.
func exitCodes() string {
	var b strings.Builder
	line := func(exit any, reason, meaning string) { fmt.Fprintf(&b, "  %4v  %-20s%s\n", exit, reason, meaning) }
	line(exitOK, "", "success")
	ours := map[int]string{
		exitFailed: "a check of doctor failed, or several sandboxes failed in several ways",
		exitUsage:  "wrong usage: an unknown flag, a malformed value, a bad sandbox.yaml",
	}
	for exit := range exitSignal {
		if meaning := ours[exit]; meaning != "" {
			line(exit, "", meaning)
		}
		for _, row := range sandbox.Failures() {
			if row.Exit == exit {
				line(exit, row.Reason, meanings()[row.Reason])
			}
		}
	}
	line(exitNotExecutable, "", "of exec and shell: the command cannot be executed")
	line(exitNoCommand, "", "of exec and shell: there is no such command")
	line(exitSignal+2, "", "interrupted (Ctrl-C); what was asked for goes on")
	line(exitSignal+15, "", "terminated (SIGTERM); likewise")
	return b.String()
}

func exitCodesTopic() *cobra.Command {
	return &cobra.Command{
		Use:   "exit-codes",
		Short: "What agentctl's exit statuses mean",
		Long: `What agentctl's exit statuses mean, and the reason that the agent's error carries
(google.rpc.ErrorInfo.reason over gRPC):

` + strings.TrimRight(exitCodes(), "\n"),
	}
}
