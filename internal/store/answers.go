package store

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"
)

// Answers are kept for answerAge, and the file is rewritten without the old
// ones when it is opened or has grown past twice maxAnswers lines, maxAnswers
// of them staying at most.
const (
	answerAge  = 24 * time.Hour
	maxAnswers = 50_000
	maxLine    = 8 << 20
)

// Answer is what an identified request was answered with.
type Answer struct {
	Request
	At   time.Time `json:"at"`
	Body []byte    `json:"body,omitempty"`
}

// answerLog is an append-only file of answers with an index in memory of
// where each is, so that many answers cost little memory.
type answerLog struct {
	path string

	mu    sync.Mutex
	file  *os.File
	size  int64
	index map[string]place
	order []string // ids, oldest first
}

type place struct {
	fingerprint string
	at          time.Time
	offset      int64
	length      int
}

func openAnswers(path string, now time.Time) (*answerLog, error) {
	log := &answerLog{path: path}
	answers, err := readAnswers(path, now.Add(-answerAge))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(answers) > maxAnswers {
		answers = answers[len(answers)-maxAnswers:]
	}
	if err := log.rewrite(answers); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return log, nil
}

// readAnswers reads the answers given since, oldest first. A last line cut
// short by a crash was never acknowledged, and any other line that cannot be
// read only means that its request would be carried out again.
func readAnswers(path string, since time.Time) ([]Answer, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var answers []Answer
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		var answer Answer
		if json.Unmarshal(lines.Bytes(), &answer) == nil && answer.ID != "" && answer.At.After(since) {
			answers = append(answers, answer)
		}
	}
	if err := lines.Err(); err != nil && !errors.Is(err, bufio.ErrTooLong) {
		return nil, err
	}
	return answers, nil
}

// rewrite replaces the file by one with just these answers.
func (l *answerLog) rewrite(answers []Answer) error {
	l.index, l.order, l.size = make(map[string]place, len(answers)), nil, 0
	var data []byte
	for _, answer := range answers {
		line, err := json.Marshal(answer)
		if err != nil {
			return err
		}
		l.note(answer, int64(len(data)), len(line)+1)
		data = append(append(data, line...), '\n')
	}
	if err := writeFile(l.path, data); err != nil {
		return err
	}
	l.size = int64(len(data))
	f, err := os.OpenFile(l.path, os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if l.file != nil {
		_ = l.file.Close()
	}
	l.file = f
	return nil
}

func (l *answerLog) note(answer Answer, offset int64, length int) {
	if _, known := l.index[answer.ID]; !known {
		l.order = append(l.order, answer.ID)
	}
	l.index[answer.ID] = place{answer.Fingerprint, answer.At, offset, length}
}

// Answer returns what a request was answered with. found is true if its id is
// known, whatever the fingerprint: compare it.
func (s *Store) Answer(id string) (answer Answer, found bool, err error) {
	l := s.answers
	l.mu.Lock()
	defer l.mu.Unlock()
	at, found := l.index[id]
	if !found || time.Since(at.at) > answerAge {
		return Answer{}, false, nil
	}
	line := make([]byte, at.length)
	if _, err := l.file.ReadAt(line, at.offset); err != nil {
		return Answer{}, true, fmt.Errorf("answer to request %q: %w", id, err)
	}
	if err := json.Unmarshal(line, &answer); err != nil {
		return Answer{}, true, fmt.Errorf("answer to request %q: %w", id, err)
	}
	return answer, true, nil
}

// PutAnswer keeps an answer durably.
func (s *Store) PutAnswer(req Request, body []byte) error {
	answer := Answer{Request: req, At: time.Now(), Body: body}
	line, err := json.Marshal(answer)
	if err != nil {
		return err
	}
	line = append(line, '\n')
	if len(line) > maxLine {
		return fmt.Errorf("answer to request %q: %d bytes are too many", req.ID, len(line))
	}
	l := s.answers
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.order) >= 2*maxAnswers {
		if err := l.compact(answer.At); err != nil {
			return err
		}
	}
	_, err = l.file.WriteAt(line, l.size)
	if err == nil {
		err = l.file.Sync()
	}
	if err != nil {
		// Half a line must not swallow the next one.
		return errors.Join(fmt.Errorf("answer to request %q: %w", req.ID, err), l.file.Truncate(l.size))
	}
	l.note(answer, l.size, len(line))
	l.size += int64(len(line))
	return nil
}

func (l *answerLog) compact(now time.Time) error {
	answers, err := readAnswers(l.path, now.Add(-answerAge))
	if err != nil {
		return err
	}
	return l.rewrite(answers[max(0, len(answers)-maxAnswers):])
}

func (l *answerLog) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	return l.file.Close()
}
