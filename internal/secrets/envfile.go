package secrets

import (
	"bufio"
	"bytes"
	"errors"

	"github.com/hashicorp/go-envparse"
)

// parseEnvFile reads KEY=value lines. Of the parsers there are, this one
// leaves a $ alone, so that a password keeps it and nothing of the agent's own
// environment gets in, and it needs nothing else. A key given twice has the
// last value, as in a shell.
func parseEnvFile(content []byte) (map[string][]byte, error) {
	content = bytes.TrimPrefix(content, []byte("\xef\xbb\xbf"))
	var lines [][]byte
	for line := range bytes.Lines(content) {
		stripped, ok := stripComment(line)
		if !ok {
			return nil, corruptf("line %d has a # in a value without quotes: put the value into quotes, or a space before a comment", len(lines)+1)
		}
		lines = append(lines, stripped)
	}
	parsed, err := envparse.Parse(bytes.NewReader(bytes.Join(lines, []byte("\n"))))
	if err != nil {
		return nil, envFileProblem(err)
	}
	values := make(map[string][]byte, len(parsed))
	for key, value := range parsed {
		values[key] = []byte(value)
	}
	return values, nil
}

// stripComment removes a comment behind a value. The parser would take any #
// outside quotes for one, and so would silently shorten a password that has
// one: such a line is refused, ok false.
func stripComment(line []byte) (stripped []byte, ok bool) {
	line = bytes.TrimSpace(line)
	equals := bytes.IndexByte(line, '=')
	if equals < 0 || line[0] == '#' {
		return line, true
	}
	var quote byte
	for i := equals + 1; i < len(line); i++ {
		switch c := line[i]; {
		case quote == '"' && c == '\\':
			i++
		case quote != 0 && c == quote:
			quote = 0
		case quote != 0:
		case c == '"' || c == '\'':
			quote = c
		case c == '#':
			before := line[i-1]
			return line[:i], before == ' ' || before == '\t' || before == '='
		}
	}
	return line, true
}

// envFileProblem translates what the parser says, which quotes its input.
func envFileProblem(err error) error {
	parse, ok := errors.AsType[*envparse.ParseError](err)
	if !ok {
		return corruptf("is no file of KEY=value lines")
	}
	switch {
	case errors.Is(parse.Err, bufio.ErrTooLong):
		return corruptf("a line after line %d is longer than %d bytes; keep the value in a file of its own", parse.Line, bufio.MaxScanTokenSize)
	case errors.Is(parse.Err, envparse.ErrUnmatchedDouble), errors.Is(parse.Err, envparse.ErrUnmatchedSingle):
		return corruptf(`line %d has a quote that is not closed on it; write a value of several lines with \n in double quotes, or keep it in a file of its own`, parse.Line)
	case errors.Is(parse.Err, envparse.ErrMissingSeparator), errors.Is(parse.Err, envparse.ErrEmptyKey):
		return corruptf("line %d is not of the form KEY=value", parse.Line)
	}
	return corruptf("line %d has a key, a control character or an escape that is not allowed", parse.Line)
}
