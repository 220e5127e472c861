package main

import (
	"encoding/xml"
	"errors"
	"io"
	"strconv"
	"strings"
)

// asksForLocalNetwork is the first macOS that asks a person whether a program
// may reach the local network: Apple's technote TN3179.
const asksForLocalNetwork = 15

// examineMac checks what macOS alone has.
func (h *host) examineMac() []finding {
	return []finding{h.localNetwork()}
}

// localNetwork explains a question that macOS asks, and what it breaks if it
// was answered with no. Which it was no program is told.
func (h *host) localNetwork() finding {
	const check = "local network"
	found, err := h.macOS()
	if err != nil {
		return finding{check, warn, "cannot tell which macOS this is: " + err.Error(), ""}
	}
	major, _, _ := strings.Cut(found, ".")
	if n, err := strconv.Atoi(major); err == nil && n < asksForLocalNetwork {
		return finding{check, fine, "macOS " + found + " lets every program reach it", ""}
	}
	return finding{
		check, fine,
		"macOS " + found + ` asks whether "agent" may find devices on your local network, once for each build that is signed ad hoc. ` +
			"Until it may, sandboxes get no route to host there; the internet and forwarded ports need no permission",
		`switch "agent" on in System Settings > Privacy & Security > Local Network, if sandboxes are to reach it`,
	}
}

// macOS is the version of macOS, such as 15.1.
func (h *host) macOS() (string, error) {
	text, err := h.read("/System/Library/CoreServices/SystemVersion.plist")
	if err != nil {
		return "", err
	}
	decoder := xml.NewDecoder(strings.NewReader(text))
	key, element := "", ""
	for {
		token, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			return "", errors.New("SystemVersion.plist has no ProductVersion")
		}
		if err != nil {
			return "", err
		}
		switch t := token.(type) {
		case xml.StartElement:
			element = t.Name.Local
		case xml.EndElement:
			element = ""
		case xml.CharData:
			switch {
			case element == "key":
				key = string(t)
			case element == "string" && key == "ProductVersion":
				return string(t), nil
			}
		}
	}
}
