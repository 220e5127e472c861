//go:build linux

package machine

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// network sets up the loopback, and the one interface if there is to be one.
func (mk *maker) network() error {
	link, err := openNetlink()
	if err != nil {
		return err
	}
	defer link.close()
	if err := link.up(1, 0); err != nil { // the loopback is always the first
		return fmt.Errorf("loopback: %w", err)
	}
	n := mk.machine.GetNetwork()
	if n == nil {
		return nil
	}
	if n.GetDhcp() {
		return mk.lease(link, n)
	}
	address, err := netip.ParsePrefix(n.GetAddress())
	if err != nil {
		return err
	}
	index, err := mk.findInterface(n.GetMac())
	if err != nil {
		return fmt.Errorf("interface %s: %w", n.GetMac(), err)
	}
	if err := link.up(index, n.GetMtu()); err != nil {
		return fmt.Errorf("interface %s: %w", n.GetMac(), err)
	}
	if err := link.addAddress(index, address); err != nil {
		return fmt.Errorf("address %s: %w", address, err)
	}
	if n.GetGateway() != "" {
		gateway, err := netip.ParseAddr(n.GetGateway())
		if err == nil {
			err = link.addDefaultRoute(index, gateway)
		}
		if err != nil {
			return fmt.Errorf("gateway %s: %w", n.GetGateway(), err)
		}
	}
	if len(n.GetNameservers()) == 0 {
		return nil
	}
	for _, server := range n.GetNameservers() {
		if _, err := netip.ParseAddr(server); err != nil {
			return fmt.Errorf("nameserver: %w", err)
		}
	}
	return replaceFile(mk.resolvPath(), resolvFile(n.GetNameservers()))
}

// resolvPath is the file that says which nameservers there are. A system of its
// own may have a link there, to where it can write, and it stays.
func (mk *maker) resolvPath() string {
	const path = "/etc/resolv.conf"
	if !mk.ownSystem {
		return path
	}
	to, err := os.Readlink(path)
	if err != nil {
		return path
	}
	if !filepath.IsAbs(to) {
		to = filepath.Join(filepath.Dir(path), to)
	}
	return to
}

// findInterface returns the index of the interface with a MAC.
func (mk *maker) findInterface(mac string) (uint32, error) {
	for end := time.Now().Add(mk.findLimit()); ; time.Sleep(5 * time.Millisecond) {
		files, err := filepath.Glob("/sys/class/net/*/address")
		if err != nil {
			return 0, err
		}
		for _, file := range files {
			if text, err := os.ReadFile(file); err != nil || !strings.EqualFold(strings.TrimSpace(string(text)), mac) {
				continue
			}
			text, err := os.ReadFile(filepath.Join(filepath.Dir(file), "ifindex"))
			if err != nil {
				return 0, err
			}
			index, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 31)
			return uint32(index), err
		}
		if time.Now().After(end) {
			return 0, errors.New("the machine has none with that address")
		}
	}
}

// Name tells the machine its name, where guestd made its root: in /etc/hosts
// and /etc/hostname. An image that does not want them is left as it is.
func (m *Made) Name(hostname string) {
	_ = replaceFile("/etc/hosts", hostsFile(hostname, m.address))
	if hostname != "" {
		_ = replaceFile("/etc/hostname", hostname+"\n")
	}
}

// replaceFile writes a file in one step. A link in its place is replaced, too:
// it leads to what only the image's own init would make.
func replaceFile(path, content string) error {
	if had, err := os.ReadFile(path); err == nil && string(had) == content {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	temporary := path + ".guestd"
	_ = os.Remove(temporary) // of a boot that was interrupted
	err := os.WriteFile(temporary, []byte(content), 0o644)
	if err == nil {
		err = os.Rename(temporary, path)
	}
	return err
}

// Secrets puts a tmpfs of a user's at dir, for the secrets that are files.
func Secrets(dir string, uid, gid uint32) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	options := fmt.Sprintf("mode=0700,uid=%d,gid=%d,size=16m,noswap", uid, gid)
	if err := unix.Mount("secrets", dir, "tmpfs", noFiles, options); err != nil {
		return fmt.Errorf("mount %s: %w", dir, err)
	}
	return nil
}
