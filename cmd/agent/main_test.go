package main

import (
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/choiros/agent/internal/sandbox"
	"github.com/choiros/agent/internal/sandbox/drivertest/process"
)

// What the environment tells a test binary that was started as an agent.
const (
	// agentEnv makes the test binary be the agent, with the product's drivers
	// and, rooted at the value, the one of child processes.
	agentEnv = "AGENT_TEST_MAIN"
	// killEnv is STEP:N: the agent kills itself, as kill -9 does, just before
	// it takes that step for the n-th time.
	killEnv = "AGENT_TEST_KILL_AT"
	// stepsEnv is a file to which each step is written.
	stepsEnv = "AGENT_TEST_STEPS"
)

func TestMain(m *testing.M) {
	process.Main()
	if len(os.Args) > 1 && os.Args[1] == shimCommand {
		os.Exit(runShim(os.Args[2:], os.Stderr))
	}
	greeterMain()
	callerMain()
	if root := os.Getenv(agentEnv); root != "" {
		p := program{drivers: testDrivers(root), onStep: stepper(os.Getenv(killEnv), os.Getenv(stepsEnv))}
		os.Exit(p.run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

func testDrivers(root string) func(Config, string, *slog.Logger) (map[string]sandbox.Driver, error) {
	return func(cfg Config, owner string, log *slog.Logger) (map[string]sandbox.Driver, error) {
		all, err := drivers(cfg, owner, log)
		if err != nil {
			return nil, err
		}
		all = maps.Clone(all)
		all[process.Name] = process.New(process.Config{
			Root: filepath.Join(root, "processes"), Owner: owner,
			Limits: sandbox.Limits{CPU: true, Memory: true, Pids: true},
		})
		return all, nil
	}
}

// stepper returns what is called at each step of an operation.
func stepper(killAt, trace string) func(string) {
	if killAt == "" && trace == "" {
		return nil
	}
	cut := strings.LastIndex(killAt, ":")
	victim, left := "", 0
	if cut >= 0 {
		victim = killAt[:cut]
		left, _ = strconv.Atoi(killAt[cut+1:])
	}
	var mu sync.Mutex
	return func(step string) {
		mu.Lock()
		defer mu.Unlock()
		if trace != "" {
			f, err := os.OpenFile(trace, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
			if err != nil {
				panic(err)
			}
			fmt.Fprintln(f, step)
			f.Close()
		}
		if step == victim {
			if left--; left == 0 {
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
		}
	}
}
