// Command system is the init of a machine with a root of its own, in which
// guestd is a service.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	fmt.Println("system:", run())
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) // guestd should have switched it off
}

func run() error {
	for _, kind := range []string{"devtmpfs", "sysfs", "proc"} {
		target := map[string]string{"devtmpfs": "/dev", "sysfs": "/sys", "proc": "/proc"}[kind]
		_ = os.MkdirAll(target, 0o755)
		if err := unix.Mount(kind, target, kind, 0, ""); err != nil {
			return err
		}
	}
	order, err := os.ReadFile("/modules/order")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(order)) {
		_, name, _ := strings.Cut(strings.TrimSpace(line), " ")
		file, err := os.Open("/" + name)
		if err != nil {
			return err
		}
		if err := unix.FinitModule(int(file.Fd()), "", 0); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	guestd := exec.Command("/init", "--machine")
	guestd.Stdout, guestd.Stderr = os.Stdout, os.Stderr
	return guestd.Run()
}
