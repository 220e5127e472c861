// Command init is process 1 of the guests that the tests of internal/vm/qemu
// boot. It loads the guest kit's modules, mounts what the kernel command line
// names (test.mount=TAG:/PATH), says so on the console, and answers on
// vsock port 1024: a line with a command, then what that command is about.
package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

func main() {
	fmt.Println("init: begun")
	if err := run(); err != nil {
		fmt.Println("init:", err)
	}
	// The kernel panics without a process 1.
	select {}
}

func run() error {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := mount(m[0], m[0], m[1], 0); err != nil {
			return err
		}
	}
	if err := loadModules("/modules/order"); err != nil {
		return err
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	words := strings.Fields(string(cmdline))
	for _, word := range words {
		value, ok := strings.CutPrefix(word, "test.mount=")
		if !ok {
			continue
		}
		tag, path, _ := strings.Cut(value, ":")
		if err := mount(tag, "virtiofs", path, 0); err != nil {
			fmt.Println("init:", err)
		}
	}
	go watchPower()
	if slices.Contains(words, "test.deaf") {
		fmt.Println("init: ready")
		return nil
	}
	listener, err := vsock.Listen(1024, nil)
	if err != nil {
		return err
	}
	for _, word := range words {
		if value, ok := strings.CutPrefix(word, "test.dial="); ok {
			go func() {
				if err := dialHost(value); err != nil {
					fmt.Println("init: dial", value, err)
				}
			}()
		}
	}
	fmt.Println("init: ready")
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go serve(conn.(stream))
	}
}

type stream interface {
	net.Conn
	CloseWrite() error
}

func mount(source, kind, target string, flags uintptr) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, ""); err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	return nil
}

// loadModules loads the guest kit's modules, in its order.
func loadModules(list string) error {
	order, err := os.ReadFile(list)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(order)) {
		_, name, _ := strings.Cut(strings.TrimSpace(line), " ")
		module, err := os.ReadFile("/" + name)
		if err != nil {
			return err
		}
		if err := unix.InitModule(module, ""); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load %s: %w", name, err)
		}
	}
	return nil
}

// watchPower switches the machine off when its power button is pressed.
func watchPower() {
	const keyPress, keyPower = 1, 116
	inputs, err := filepath.Glob("/dev/input/event*")
	if err != nil {
		return
	}
	for _, name := range inputs {
		go func() {
			file, err := os.Open(name)
			if err != nil {
				return
			}
			event := make([]byte, 24)
			for {
				if _, err := io.ReadFull(file, event); err != nil {
					return
				}
				if binary.LittleEndian.Uint16(event[16:]) == keyPress && binary.LittleEndian.Uint16(event[18:]) == keyPower {
					fmt.Println("init: power button")
					powerOff()
				}
			}
		}()
	}
}

func powerOff() error {
	unix.Sync()
	return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// dialHost connects to a port of the host's, says hello, and echoes.
func dialHost(port string) error {
	number, err := strconv.ParseUint(port, 10, 32)
	if err != nil {
		return err
	}
	host, err := vsock.Dial(vsock.Host, uint32(number), nil)
	if err != nil {
		return err
	}
	defer host.Close()
	if _, err := io.WriteString(host, "hello from inside\n"); err != nil {
		return err
	}
	if _, err := io.Copy(host, host); err != nil {
		return err
	}
	return host.CloseWrite()
}

// serve answers one connection.
func serve(conn stream) {
	defer conn.Close()
	in := bufio.NewReader(conn)
	line, err := in.ReadString('\n')
	if err != nil {
		return
	}
	words := strings.Fields(line)
	if len(words) == 0 {
		return
	}
	answer, err := obey(words[0], words[1:], in, conn)
	if err != nil {
		answer = "error: " + err.Error()
	}
	if answer != "" {
		fmt.Fprintln(conn, answer)
	}
	conn.CloseWrite()
	// What is not read when a connection closes resets it.
	io.Copy(io.Discard, in)
}

// kept is what the command keep left in memory.
var (
	mu   sync.Mutex
	kept string
)

var errUsage = errors.New("usage")

func obey(command string, args []string, in io.Reader, conn stream) (string, error) {
	switch {
	case command == "echo":
		_, err := io.Copy(conn, in)
		return "", err
	case command == "drain":
		n, err := io.Copy(io.Discard, in)
		return strconv.FormatInt(n, 10), err
	case command == "give" && len(args) == 1:
		return "", give(args[0], conn)
	case command == "both" && len(args) == 1:
		drained := make(chan int64, 1)
		go func() {
			n, _ := io.Copy(io.Discard, in)
			drained <- n
		}()
		if err := give(args[0], conn); err != nil {
			return "", err
		}
		return strconv.FormatInt(<-drained, 10), nil
	case command == "keep":
		mu.Lock()
		defer mu.Unlock()
		kept = strings.Join(args, " ")
		return "ok", nil
	case command == "kept":
		mu.Lock()
		defer mu.Unlock()
		return kept, nil
	case command == "dial" && len(args) == 1:
		go dialHost(args[0])
		return "ok", nil
	case command == "clock":
		return time.Now().Format(time.RFC3339Nano), nil
	case command == "poweroff":
		go powerOff()
		return "ok", nil
	case command == "reboot":
		go unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
		return "ok", nil
	}
	return files(command, args)
}

// files are the commands on files and devices.
func files(command string, args []string) (string, error) {
	if len(args) == 0 {
		return "", fmt.Errorf("%s: %w", command, errUsage)
	}
	path := args[0]
	switch command {
	case "read":
		file, err := os.Open(path)
		if err != nil {
			return "", err
		}
		defer file.Close()
		content, err := io.ReadAll(io.LimitReader(file, 512))
		return strings.TrimRight(string(content), "\x00\n"), err
	case "write":
		file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
		if err != nil {
			return "", err
		}
		defer file.Close()
		if _, err := file.WriteString(strings.Join(args[1:], " ")); err != nil {
			return "", err
		}
		return "ok", file.Sync()
	case "zero": // discards a device
		file, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return "", err
		}
		defer file.Close()
		size, err := file.Seek(0, io.SeekEnd)
		if err != nil {
			return "", err
		}
		span := [2]uint64{0, uint64(size)}
		return "ok", discard(file, &span)
	case "up": // a network interface
		return "ok", up(path)
	case "chmod":
		return "ok", os.Chmod(path, 0o777)
	case "chown":
		return "ok", os.Chown(path, 1234, 1234)
	case "remove":
		return "ok", os.Remove(path)
	case "symlink":
		return "ok", os.Symlink(args[1], path)
	case "list":
		entries, err := os.ReadDir(path)
		var names []string
		for _, entry := range entries {
			names = append(names, entry.Name())
		}
		return strings.Join(names, " "), err
	case "owner":
		var stat unix.Stat_t
		if err := unix.Lstat(path, &stat); err != nil {
			return "", err
		}
		return fmt.Sprintf("%d:%d", stat.Uid, stat.Gid), nil
	case "as": // UID command PATH…: as another user
		return asUser(args)
	}
	return "", fmt.Errorf("%s: %w", command, errUsage)
}

func give(count string, to io.Writer) error {
	n, err := strconv.ParseInt(count, 10, 64)
	if err != nil {
		return err
	}
	_, err = io.CopyN(to, pattern{}, n)
	return err
}

// pattern is an endless stream of the same byte.
type pattern struct{}

func (pattern) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	return len(p), nil
}
