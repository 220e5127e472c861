package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
)

// goodHost is a host on which everything works.
func goodHost() (*host, fstest.MapFS) {
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	root := fstest.MapFS{
		"sys/fs/cgroup/cgroup.controllers":                                              file("cpu memory pids"),
		"sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/cgroup.controllers": file("cpu io memory pids\n"),
		"proc/sys/user/max_user_namespaces":                                             file("12345\n"),
		"etc/subuid":                                                                    file("ada:100000:65536\n"),
		"etc/subgid":                                                                    file("root:1:2\n1000:100000:65536\n"),
		"etc/os-release":                                                                file("NAME=\"Debian\"\nID=debian\n"),
		"run/user/1000/x":                                                               file(""),
		"run/systemd/system/x":                                                          file(""),
		"var/lib/systemd/linger/ada":                                                    file(""),
		"home/ada/.local/x":                                                             file(""),
	}
	env := map[string]string{"XDG_RUNTIME_DIR": "/run/user/1000", "HOME": "/home/ada"}
	return &host{
		root: root, getenv: func(name string) string { return env[name] }, uid: 1000, user: "ada",
		lookPath: func(name string) (string, error) { return "/usr/bin/" + name, nil },
		podman: func(_ context.Context, socket string) (string, error) {
			if socket != "/run/user/1000/podman/podman.sock" {
				return "", fmt.Errorf("asked at %s", socket)
			}
			return "5.4.2", nil
		},
		free: func(string) (uint64, error) { return 50 << 30, nil },
	}, root
}

func TestDoctorFindsNothingWrongWithAGoodHost(t *testing.T) {
	t.Parallel()
	h, _ := goodHost()
	findings := append(h.examineLinux(t.Context()), h.disk())
	for _, f := range findings {
		if f.Status != fine || f.Cure != "" {
			t.Errorf("%+v", f)
		}
	}
	if len(findings) < 10 {
		t.Errorf("only %d checks", len(findings))
	}
}

func TestDoctorNamesTheCure(t *testing.T) {
	t.Parallel()
	missing := func(name string) (string, error) { return "", errors.New(name + " not found") }
	for _, test := range []struct {
		name   string
		spoil  func(*host, fstest.MapFS)
		check  string
		status verdict
		detail string
		cure   string
	}{
		{"cgroup v1", func(_ *host, fs fstest.MapFS) { delete(fs, "sys/fs/cgroup/cgroup.controllers") }, "cgroup", warn, "version 1", "unified_cgroup_hierarchy"},
		{"nothing delegated", func(_ *host, fs fstest.MapFS) {
			fs["sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/cgroup.controllers"].Data = []byte("memory pids")
		}, "limits", warn, "not delegated to this user: cpu", "Delegate=cpu"},
		{"no user manager", func(_ *host, fs fstest.MapFS) {
			delete(fs, "sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/cgroup.controllers")
		}, "limits", warn, "systemd runs nothing", "enable-linger ada"},
		{"no user namespaces", func(_ *host, fs fstest.MapFS) {
			fs["proc/sys/user/max_user_namespaces"].Data = []byte("0")
		}, "user namespaces", failed, "none", "sysctl -w user.max_user_namespaces"},
		{"namespaces for root only", func(_ *host, fs fstest.MapFS) {
			fs["proc/sys/kernel/unprivileged_userns_clone"] = &fstest.MapFile{Data: []byte("0\n")}
		}, "user namespaces", failed, "ordinary users", "unprivileged_userns_clone=1"},
		{"no newuidmap", func(h *host, _ fstest.MapFS) { h.lookPath = missing }, "id maps", failed, "newuidmap", "sudo apt install uidmap"},
		{"no subuid", func(_ *host, fs fstest.MapFS) {
			fs["etc/subuid"].Data = []byte("bob:100000:65536\n")
		}, "subuid", failed, "no entry for ada", "usermod --add-subuids 165536-231071 ada"},
		{"few subgids", func(_ *host, fs fstest.MapFS) {
			fs["etc/subgid"].Data = []byte("ada:5000:10\n")
		}, "subgid", failed, "10 ids", "usermod --add-subgids 100000-165535 ada"},
		{"no subuid file", func(_ *host, fs fstest.MapFS) { delete(fs, "etc/subuid") }, "subuid", failed, "no entry", "100000-165535"},
		{"ids from elsewhere", func(_ *host, fs fstest.MapFS) {
			fs["etc/nsswitch.conf"] = &fstest.MapFile{Data: []byte("subid: sss\n")}
			delete(fs, "etc/subuid")
		}, "subuid", fine, "given by sss", ""},
		{"no runtime folder", func(h *host, _ fstest.MapFS) {
			h.getenv = func(string) string { return "" }
		}, "runtime folder", failed, "not set", "export XDG_RUNTIME_DIR=/run/user/1000"},
		{"runtime folder is gone", func(_ *host, fs fstest.MapFS) { delete(fs, "run/user/1000/x") }, "runtime folder", failed, "does not exist", "enable-linger"},
		{"podman silent", func(h *host, _ fstest.MapFS) {
			h.podman = func(context.Context, string) (string, error) { return "", os.ErrNotExist }
		}, "podman", failed, "does not answer", "systemctl --user enable --now podman.socket"},
		{"podman silent, no systemd", func(h *host, fs fstest.MapFS) {
			delete(fs, "run/systemd/system/x")
			h.podman = func(context.Context, string) (string, error) { return "", os.ErrNotExist }
		}, "podman", failed, "does not answer", "podman system service --time 0 unix:///run/user/1000/podman/podman.sock"},
		{"podman absent, on Fedora", func(h *host, fs fstest.MapFS) {
			fs["etc/os-release"].Data = []byte("ID=fedora\n")
			h.lookPath = missing
			h.podman = func(context.Context, string) (string, error) { return "", os.ErrNotExist }
		}, "podman", failed, "not installed", "sudo dnf install podman"},
		{"podman old", func(h *host, _ fstest.MapFS) {
			h.podman = func(context.Context, string) (string, error) { return "4.3.1", nil }
		}, "podman", failed, "4.3.1 is too old", "apt install"},
		{"no linger", func(_ *host, fs fstest.MapFS) { delete(fs, "var/lib/systemd/linger/ada") }, "linger", warn, "last logout", "loginctl enable-linger ada"},
		{"root", func(h *host, _ fstest.MapFS) { h.uid = 0 }, "user", warn, "you are root", "as the user that the agent runs as"},
		{"disk full", func(h *host, _ fstest.MapFS) {
			h.free = func(string) (uint64, error) { return 100 << 20, nil }
		}, "disk", failed, "100 MiB free at /home/ada/.local", "image remove"},
		{"disk low", func(h *host, _ fstest.MapFS) {
			h.free = func(string) (uint64, error) { return 2 << 30, nil }
		}, "disk", warn, "2 GiB", "make room"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			h, fs := goodHost()
			test.spoil(h, fs)
			for _, f := range append(h.examineLinux(t.Context()), h.disk()) {
				if f.Check != test.check {
					continue
				}
				if f.Status != test.status || !strings.Contains(f.Detail, test.detail) || !strings.Contains(f.Cure, test.cure) {
					t.Errorf("%+v", f)
				}
				return
			}
			t.Errorf("no check %q", test.check)
		})
	}
}

func TestDoctorExplainsTheLocalNetworkPrompt(t *testing.T) {
	t.Parallel()
	const file = "System/Library/CoreServices/SystemVersion.plist"
	version := func(v string) []byte {
		return []byte(`<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0"><dict>
	<key>ProductBuildVersion</key> <string>24B83</string>
	<key>ProductVersion</key>
	<string>` + v + `</string>
</dict></plist>`)
	}
	for _, test := range []struct {
		text         []byte
		status       verdict
		detail, cure string
	}{
		{version("14.7.1"), fine, "macOS 14.7.1 lets every program reach it", ""},
		{version("15.1"), fine, `asks whether "agent" may find devices`, "Privacy & Security > Local Network"},
		{version("26.0"), fine, "no route to host", "Local Network"},
		{[]byte("<plist><dict></dict></plist>"), warn, "no ProductVersion", ""},
		{[]byte("<plist><dict>"), warn, "cannot tell", ""},
		{nil, warn, "cannot tell which macOS this is", ""},
	} {
		root := fstest.MapFS{}
		if test.text != nil {
			root[file] = &fstest.MapFile{Data: test.text}
		}
		findings := (&host{root: root}).examineMac()
		if len(findings) != 1 {
			t.Fatalf("%d findings", len(findings))
		}
		f := findings[0]
		if f.Status != test.status || !strings.Contains(f.Detail, test.detail) || !strings.Contains(f.Cure, test.cure) || (f.Cure == "") != (test.cure == "") {
			t.Errorf("%s: %+v", test.text, f)
		}
	}
}

func TestPodmanVersionIsAskedOverTheSocket(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "agentctl") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := filepath.Join(dir, "podman.sock")
	if _, err := podmanVersion(t.Context(), socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a socket: %v", err)
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	answer := `{"Version":"5.8.6","ApiVersion":"1.41"}`
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, "/libpod/version") {
			w.WriteHeader(http.StatusNotFound)
		}
		fmt.Fprint(w, answer)
	})}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(listener)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-served
	})
	if got, err := podmanVersion(t.Context(), socket); got != "5.8.6" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
}
