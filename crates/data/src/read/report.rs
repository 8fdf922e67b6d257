//! The account of a reading.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::SkippedFile;

/// A record that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Malformed {
    /// The file.
    pub path: PathBuf,
    /// 1-based line of text, or row of a table.
    pub line: u64,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, line {}: {}", self.path.display(), self.line, self.reason)
    }
}

/// A field of one file's records that nothing is read from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnreadField {
    /// The file.
    pub path: PathBuf,
    /// Its name; `messages[].NAME` for one of a message.
    pub field: String,
    /// How many records have it.
    pub records: u64,
    /// The first of them: its 1-based line, or row of a table.
    pub line: u64,
    /// The field that may have been meant.
    pub nearest: Option<String>,
}

impl fmt::Display for UnreadField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, field, records, line, nearest } = self;
        let records = if *records == 1 { "1 record".to_owned() } else { format!("{records} records") };
        write!(f, "{}: the field `{field}` of {records} is not read (first in line {line})", path.display())?;
        nearest.as_ref().map_or(Ok(()), |nearest| write!(f, "; the nearest that is read is `{nearest}`"))
    }
}

/// What one file gave.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FileReport {
    /// The file.
    pub path: PathBuf,
    /// Its size on disk, as it is (compressed or not).
    pub bytes: u64,
    /// Documents with text.
    pub documents: u64,
    /// Records that could not be read.
    pub malformed: u64,
}

/// What was read, and what could not be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReadReport {
    /// Files opened, in order.
    pub files: Vec<FileReport>,
    /// Documents with text.
    pub documents: u64,
    /// Bytes of their text as UTF-8.
    pub bytes: u64,
    /// Documents without a character that is not white space; left out.
    pub blank_documents: u64,
    /// Pieces that documents longer than the limit were cut into, the last piece of each not counted.
    pub cut_documents: u64,
    /// Malformed records, all of them.
    pub num_malformed: u64,
    /// The first of them, with place and reason.
    pub malformed: Vec<Malformed>,
    /// Fields of examples that nothing is read from, file by file; known when reading is over.
    pub unread_fields: Vec<UnreadField>,
    /// Files that broke off before their end (each is also one malformed record).
    pub damaged_files: u64,
    /// Files and folders left out, all of them.
    pub num_skipped_files: u64,
    /// The first of them, with the reason.
    pub skipped_files: Vec<SkippedFile>,
    #[serde(skip)]
    pub(super) keep: usize,
}

impl ReadReport {
    pub(super) fn note_document(&mut self, bytes: usize) {
        self.documents += 1;
        self.bytes += bytes as u64;
        if let Some(file) = self.files.last_mut() {
            file.documents += 1;
        }
    }

    pub(super) fn note_malformed(&mut self, malformed: Malformed) {
        self.num_malformed += 1;
        if let Some(file) = self.files.last_mut() {
            file.malformed += 1;
        }
        if self.malformed.len() < self.keep {
            self.malformed.push(malformed);
        }
    }

    /// What was left out, in a few lines for a person; empty if nothing was.
    pub fn problems(&self) -> String {
        let mut lines = vec![];
        if self.num_malformed > 0 {
            lines.push(format!("{} malformed records were left out:", self.num_malformed));
            lines.extend(self.malformed.iter().take(10).map(|m| format!("  {m}")));
        }
        if self.num_skipped_files > 0 {
            lines.push(format!("{} files were skipped:", self.num_skipped_files));
            lines.extend(self.skipped_files.iter().take(10).map(|s| format!("  {s}")));
        }
        if self.cut_documents > 0 {
            lines.push(format!("documents longer than the limit were cut {} times", self.cut_documents));
        }
        lines.extend(self.unread_fields.iter().map(ToString::to_string));
        lines.join("\n")
    }
}
