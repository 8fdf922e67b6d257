//! Documents of a plain text file.

use std::io::Read;

use super::open::Stream;
use super::{ReadOptions, Record, Records, TextSplit};

const CHUNK: usize = 1 << 18;

pub(super) struct TextRecords {
    stream: Stream,
    split: TextSplit,
    cap: usize,
    normalize: bool,
    /// Bytes that were read and not yet given away, from `start` on.
    buffer: Vec<u8>,
    start: usize,
    /// Up to where the rest has been searched for a document's end.
    searched: usize,
    /// 1-based line of `start`.
    line: u64,
    at_eof: bool,
    opened: bool,
    over: bool,
}

/// Where a document ends: its text is before `end`, the next one begins at `next`.
struct Border {
    end: usize,
    next: usize,
    cut: bool,
}

impl TextRecords {
    pub(super) fn new(stream: Stream, options: &ReadOptions) -> Self {
        Self {
            stream,
            split: options.text_split.clone(),
            cap: options.max_document_bytes,
            normalize: options.normalize_newlines,
            buffer: vec![],
            start: 0,
            searched: 0,
            line: 1,
            at_eof: false,
            opened: false,
            over: false,
        }
    }

    fn fill(&mut self) -> std::io::Result<()> {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.searched -= self.start;
            self.start = 0;
        }
        let n = self.stream.by_ref().take(CHUNK as u64).read_to_end(&mut self.buffer)?;
        self.at_eof = n == 0;
        Ok(())
    }

    /// The end of the document at `start`, if it has been read that far.
    fn border(&mut self) -> Option<Border> {
        let rest = &self.buffer[self.searched..];
        let found = match &self.split {
            TextSplit::WholeFile => None,
            TextSplit::BlankLines => blank_line(rest),
            TextSplit::Separator(s) => find(rest, s.as_bytes()).map(|at| (at, at + s.len())),
        };
        if let Some((end, next)) = found {
            let border = Border { end: self.searched + end, next: self.searched + next, cut: false };
            if border.end - self.start <= self.cap {
                return Some(border);
            }
        }
        let len = self.buffer.len() - self.start;
        if len > self.cap {
            let end = self.start + cut(&self.buffer[self.start..self.start + self.cap]);
            return Some(Border { end, next: end, cut: true });
        }
        if self.at_eof {
            return Some(Border { end: self.buffer.len(), next: self.buffer.len(), cut: false });
        }
        // What could be the beginning of a border stays to be searched again.
        self.searched = match &self.split {
            TextSplit::WholeFile => self.buffer.len(),
            TextSplit::BlankLines => line_start(&self.buffer, self.searched),
            TextSplit::Separator(s) => self.buffer.len().saturating_sub(s.len() - 1).max(self.searched),
        };
        None
    }

    fn take(&mut self, border: Border) -> Record {
        let mut line = self.line;
        let mut bytes = &self.buffer[self.start..border.end];
        if self.split == TextSplit::BlankLines {
            // More blank lines than the one that ended the document before.
            let blank = blank_lines(bytes);
            line += newlines(&bytes[..blank]);
            bytes = &bytes[blank..];
        }
        let record = match std::str::from_utf8(bytes) {
            Ok(text) if text.trim().is_empty() => Record::Blank,
            Ok(text) => {
                let text = match self.normalize && text.contains("\r\n") {
                    true => text.replace("\r\n", "\n"),
                    false => text.to_owned(),
                };
                match border.cut {
                    true => Record::Cut { item: text, line },
                    false => Record::Document { item: text, line },
                }
            }
            Err(e) => {
                let line = line + newlines(&bytes[..e.valid_up_to()]);
                let byte = bytes[e.valid_up_to()];
                Record::Malformed { line, reason: format!("not UTF-8 (byte 0x{byte:02x}); convert the file to UTF-8") }
            }
        };
        self.line += newlines(&self.buffer[self.start..border.next]);
        self.start = border.next;
        self.searched = border.next;
        record
    }

    /// Looks at the first bytes: drops a byte order mark, refuses UTF-16 in words that help.
    fn open(&mut self) -> Option<Record> {
        self.opened = true;
        if let Err(e) = self.fill() {
            return Some(self.damaged(&e));
        }
        if self.buffer.starts_with(&[0xff, 0xfe]) || self.buffer.starts_with(&[0xfe, 0xff]) {
            self.over = true;
            return Some(Record::Malformed { line: 1, reason: "UTF-16; convert the file to UTF-8".to_owned() });
        }
        if self.buffer.starts_with(b"\xef\xbb\xbf") {
            (self.start, self.searched) = (3, 3);
        }
        None
    }

    fn damaged(&mut self, error: &std::io::Error) -> Record {
        self.over = true;
        let line = self.line.saturating_sub(1) + newlines(&self.buffer[self.start..]);
        Record::Damaged { line, reason: error.to_string() }
    }
}

impl Records for TextRecords {
    fn next_record(&mut self) -> Option<Record> {
        if !self.opened
            && let Some(record) = self.open()
        {
            return Some(record);
        }
        while !self.over {
            if self.at_eof && self.start == self.buffer.len() {
                self.over = true;
                break;
            }
            if let Some(border) = self.border() {
                match (self.take(border), &self.split) {
                    // Several blank lines are one border, not blank documents.
                    (Record::Blank, TextSplit::BlankLines) => continue,
                    (record, _) => return Some(record),
                }
            }
            if let Err(e) = self.fill() {
                return Some(self.damaged(&e));
            }
        }
        None
    }
}

fn newlines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|&&b| b == b'\n').count() as u64
}

/// Where to cut a text that is too long: behind its last line end, else behind its last whole character.
fn cut(bytes: &[u8]) -> usize {
    if let Some(at) = bytes.iter().rposition(|&b| b == b'\n') {
        return at + 1;
    }
    // Up to three bytes of a character that goes on behind the cut; what is not UTF-8 anyway is cut anywhere.
    let character = (1..=4.min(bytes.len())).find(|back| bytes[bytes.len() - back] & 0xc0 != 0x80);
    match character {
        Some(back) if bytes.len() > back && bytes[bytes.len() - back] >= 0xc0 => bytes.len() - back,
        _ => bytes.len(),
    }
}

fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    let first = *needle.first()?;
    let mut from = 0;
    while let Some(at) = hay[from..].iter().position(|&b| b == first) {
        if hay[from + at..].starts_with(needle) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

/// The first blank line behind a line end: (end of the text before it, start of what follows it).
fn blank_line(hay: &[u8]) -> Option<(usize, usize)> {
    let mut from = 0;
    while let Some(at) = hay[from..].iter().position(|&b| b == b'\n').map(|at| from + at) {
        let blank = hay[at + 1..].iter().position(|b| !matches!(b, b' ' | b'\t' | b'\r'));
        match blank {
            Some(n) if hay[at + 1 + n] == b'\n' => return Some((at + 1, at + 1 + n + 1)),
            _ => from = at + 1,
        }
    }
    None
}

/// Bytes of the blank lines that a text begins with.
fn blank_lines(text: &[u8]) -> usize {
    let blank = text.iter().position(|b| !b.is_ascii_whitespace()).unwrap_or(text.len());
    text[..blank].iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1)
}

/// Start of the last line with text, so that a line end before a not yet read blank line is seen again.
fn line_start(buffer: &[u8], from: usize) -> usize {
    let text = buffer[from..].iter().rposition(|b| !b.is_ascii_whitespace());
    text.map_or(from, |at| from + at)
}
