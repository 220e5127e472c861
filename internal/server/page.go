package server

import (
	"crypto/sha256"
	"encoding/base64"
	"strings"

	"github.com/choiros/agent/internal/sandbox"
)

// pageToken tells the next List where to go on: after a name, and for which
// selector, since a page of another selection would mean nothing.
func pageToken(after, selector string) string {
	return base64.RawURLEncoding.EncodeToString([]byte(selectorMark(selector) + after))
}

func parsePageToken(token, selector string) (after string, err error) {
	if token == "" {
		return "", nil
	}
	data, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil {
		return "", sandbox.Invalidf("page_token", "was not handed out by this agent")
	}
	after, found := strings.CutPrefix(string(data), selectorMark(selector))
	if !found {
		return "", sandbox.Invalidf("page_token", "is not of a list with this label_selector")
	}
	if sandbox.ValidateName("page_token", after) != nil {
		return "", sandbox.Invalidf("page_token", "was not handed out by this agent")
	}
	return after, nil
}

func selectorMark(selector string) string {
	sum := sha256.Sum256([]byte("1\n" + selector))
	return string(sum[:8])
}
