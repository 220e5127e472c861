package main

import (
	"io"
	"strings"
	"unicode/utf8"
)

// cell is a piece of a table: its text and, on a terminal, its colour.
type cell struct {
	text  string
	paint func(string) string // nil: plain
}

func plain(s string) cell { return cell{text: s} }

// table aligns rows in columns, two spaces apart.
type table struct {
	heads []string
	rows  [][]cell
}

func (t *table) add(cells ...cell) { t.rows = append(t.rows, cells) }

// write prints the table, its heads first.
func (t *table) write(w io.Writer, head func(string) string) error {
	widths := make([]int, len(t.heads))
	for i, h := range t.heads {
		widths[i] = utf8.RuneCountInString(h)
	}
	for _, row := range t.rows {
		for i, c := range row {
			row[i].text = oneLine(c.text)
			if row[i].text == "" {
				row[i].text = "-"
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(row[i].text))
		}
	}
	heads := make([]cell, len(t.heads))
	for i, h := range t.heads {
		heads[i] = cell{h, head}
	}
	var b strings.Builder
	writeRow(&b, heads, widths)
	for _, row := range t.rows {
		writeRow(&b, row, widths)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func writeRow(b *strings.Builder, row []cell, widths []int) {
	for i, c := range row {
		text := c.text
		if c.paint != nil {
			text = c.paint(text)
		}
		b.WriteString(text)
		if i < len(row)-1 {
			b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c.text)+2))
		}
	}
	b.WriteByte('\n')
}

// page is a list of keys and values, as `show` prints one.
type page struct{ lines [][2]string }

// add appends a line unless its value is empty.
func (p *page) add(key, value string) {
	if value != "" {
		p.lines = append(p.lines, [2]string{key, value})
	}
}

// each appends values, the first of them beside the key.
func (p *page) each(key string, values []string) {
	for _, v := range values {
		p.lines = append(p.lines, [2]string{key, v})
		key = ""
	}
}

func (p *page) write(w io.Writer, head func(string) string) error {
	width := 0
	for _, l := range p.lines {
		width = max(width, utf8.RuneCountInString(l[0]))
	}
	var b strings.Builder
	for _, l := range p.lines {
		b.WriteString(head(l[0]))
		b.WriteString(strings.Repeat(" ", width-utf8.RuneCountInString(l[0])+2))
		b.WriteString(oneLine(l[1]))
		b.WriteByte('\n')
	}
	_, err := io.WriteString(w, b.String())
	return err
}
