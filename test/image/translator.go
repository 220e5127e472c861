package image

import (
	"fmt"
	"os"
	"path/filepath"
)

// TranslatorEnv names the environment variable that tells tests in which folder
// the program is that stands in for Rosetta: see test/env/translator.
const TranslatorEnv = "AGENT_TEST_TRANSLATOR"

// TranslatorDir returns that folder, or else where make test puts it in the
// module, which the working directory has to be in. It is an error if there is
// no such program.
func TranslatorDir() (string, error) {
	dir := os.Getenv(TranslatorEnv)
	if dir == "" {
		dir = inModule(".cache", "translator")
	}
	if _, err := os.Stat(filepath.Join(dir, "rosetta")); err != nil {
		return "", fmt.Errorf("no translator: %w (test/env/translator build .cache/translator, or set %s)", err, TranslatorEnv)
	}
	return dir, nil
}
