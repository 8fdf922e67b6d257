//! Files and folders to documents, one at a time, with an account of what could not be read.
//!
//! | extension | documents |
//! |---|---|
//! | `.txt` `.md` `.text` | the file, or its parts ([`TextSplit`]) |
//! | `.jsonl` `.ndjson` | each line: an object with a text field |
//! | `.parquet` | each row of a string column |
//!
//! Each may have `.gz` (several members too) or `.zst` behind it, and is decoded as a stream.

mod files;
mod jsonl;
mod open;
mod parquet;
mod report;
mod text;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

pub use files::SkippedFile;
pub(crate) use files::join;
pub use report::{FileReport, Malformed, ReadReport};

use crate::{Error, Result};
use files::{InputFile, Kind};

/// How a plain text file becomes documents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TextSplit {
    /// The whole file is one document.
    #[default]
    WholeFile,
    /// One or more blank lines end a document.
    BlankLines,
    /// This string ends a document and belongs to none, e.g. `<|endoftext|>`.
    Separator(String),
}

/// What to do with a record that cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnMalformed {
    /// Stop at the first one.
    Error,
    /// Skip it, count it, report it; fail at the end if more than
    /// [`max_malformed_fraction`](ReadOptions::max_malformed_fraction) of all records were malformed, and at once where
    /// a file is cut short (nobody knows how much of it is lost).
    #[default]
    Report,
    /// Skip, count and report whatever happens, cut files too.
    Skip,
}

/// How documents are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReadOptions {
    /// Name of the text field of a JSON line, or of the text column of a table; `text`.
    pub field: String,
    /// How a plain text file is cut into documents.
    pub text_split: TextSplit,
    /// What to do with malformed records.
    pub on_malformed: OnMalformed,
    /// Share of malformed records that [`OnMalformed::Report`] lets pass; 0.01.
    pub max_malformed_fraction: f64,
    /// Longest document in bytes of text, which bounds memory; 64 MiB. A longer text file is cut at line ends into
    /// several documents (counted in [`ReadReport::cut_documents`]); a longer JSON line or table cell is malformed.
    pub max_document_bytes: usize,
    /// Reads `\r\n` of a plain text file as `\n`; `true`.
    pub normalize_newlines: bool,
    /// How many malformed records and skipped files are kept with place and reason (all are counted); 100.
    pub keep_malformed: usize,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self {
            field: "text".to_owned(),
            text_split: TextSplit::WholeFile,
            on_malformed: OnMalformed::Report,
            max_malformed_fraction: 0.01,
            max_document_bytes: 64 << 20,
            normalize_newlines: true,
            keep_malformed: 100,
        }
    }
}

impl ReadOptions {
    pub(crate) fn check(&self) -> Result<()> {
        if self.field.is_empty() {
            return Err(Error::option("field", "\"\"", "name the text field, e.g. \"text\""));
        }
        if !(0.0..=1.0).contains(&self.max_malformed_fraction) {
            return Err(Error::option("max_malformed_fraction", self.max_malformed_fraction, "must be in 0..=1"));
        }
        if !(16..=1 << 31).contains(&self.max_document_bytes) {
            return Err(Error::option("max_document_bytes", self.max_document_bytes, "must be in 16..=2147483648"));
        }
        if self.text_split == TextSplit::Separator(String::new()) {
            return Err(Error::option("text_split", "separator \"\"", "the separator must have a character"));
        }
        Ok(())
    }
}

/// One document of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Its text, never blank.
    pub text: String,
    /// The file that it is from.
    pub path: Arc<PathBuf>,
    /// 1-based line where it starts, or row of a table.
    pub line: u64,
}

/// What a file's reader comes to next.
pub(crate) enum Record {
    Document {
        text: String,
        line: u64,
    },
    /// A piece of a document that was longer than the limit.
    Cut {
        text: String,
        line: u64,
    },
    Blank,
    Malformed {
        line: u64,
        reason: String,
    },
    /// The file is a table without the wanted column.
    WrongField {
        reason: String,
    },
    /// Nothing more can be had from this file.
    Damaged {
        line: u64,
        reason: String,
    },
}

/// A reader of one file.
pub(crate) trait Records: Send {
    fn next_record(&mut self) -> Option<Record>;
}

/// The documents of `inputs`, in order: inputs as given, the contents of a folder by path, a file from its start.
///
/// Folders are searched recursively, hidden entries (`.name`) and unknown extensions are left out and listed in the
/// report. A file reached twice is read once.
///
/// # Errors
/// At once if an option is wrong, an input is missing, a file named itself is of an unknown kind, or nothing can be
/// read at all. Later, as an item, as [`OnMalformed`] says; the iterator ends behind an error.
pub fn documents(inputs: &[PathBuf], options: ReadOptions) -> Result<Documents> {
    options.check()?;
    let found = files::find(inputs, options.keep_malformed)?;
    let report = ReadReport {
        skipped_files: found.skipped,
        num_skipped_files: found.num_skipped,
        keep: options.keep_malformed,
        ..ReadReport::default()
    };
    let total = found.files.iter().map(|f| f.bytes).sum();
    let files = found.files.into_iter();
    Ok(Documents { options, files, current: None, report, input_bytes: total, read: Arc::default(), done: false })
}

/// The files that [`documents`] would read, in order.
pub(crate) fn input_paths(inputs: &[PathBuf]) -> Result<Vec<PathBuf>> {
    Ok(files::find(inputs, 10)?.files.into_iter().map(|f| f.path).collect())
}

struct Current {
    path: Arc<PathBuf>,
    records: Box<dyn Records>,
}

/// Iterator over documents, see [`documents`].
pub struct Documents {
    options: ReadOptions,
    files: std::vec::IntoIter<InputFile>,
    current: Option<Current>,
    report: ReadReport,
    input_bytes: u64,
    read: Arc<AtomicU64>,
    done: bool,
}

impl Documents {
    /// What has been read so far, and what could not be.
    pub fn report(&self) -> &ReadReport {
        &self.report
    }

    /// The report, when reading is over.
    pub fn into_report(self) -> ReadReport {
        self.report
    }

    /// Bytes on disk of all files to read, as they are (compressed or not).
    pub fn input_bytes(&self) -> u64 {
        self.input_bytes
    }

    /// Bytes of them that have been read.
    pub fn input_bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Opens the next file; `None` behind the last one.
    fn open_next(&mut self) -> Option<Result<()>> {
        let file = self.files.next()?;
        let path = Arc::new(file.path.clone());
        self.report.files.push(FileReport { path: file.path.clone(), bytes: file.bytes, ..FileReport::default() });
        let opened = match file.kind {
            Kind::Text => open::stream(&file, &self.read)
                .map(|s| Box::new(text::TextRecords::new(s, &self.options)) as Box<dyn Records>),
            Kind::Jsonl => open::stream(&file, &self.read)
                .map(|s| Box::new(jsonl::JsonRecords::new(s, &self.options)) as Box<dyn Records>),
            Kind::Parquet => open::seekable(&file, &self.read)
                .map(|f| Box::new(parquet::ParquetRecords::new(f, &self.options)) as Box<dyn Records>),
        };
        match opened {
            Ok(records) => self.current = Some(Current { path, records }),
            Err(open::OpenError::Io(e)) => return Some(Err(Error::io(&file.path, e))),
            Err(open::OpenError::Damaged(reason)) => return self.damaged(&path, 0, reason).map(Err).or(Some(Ok(()))),
        }
        Some(Ok(()))
    }

    /// Notes a malformed record; an error where the policy wants one.
    fn malformed(&mut self, path: &Arc<PathBuf>, line: u64, reason: String) -> Option<Error> {
        if self.options.on_malformed == OnMalformed::Error {
            return Some(Error::Malformed { path: path.to_path_buf(), line, reason });
        }
        self.report.note_malformed(Malformed { path: path.to_path_buf(), line, reason });
        None
    }

    fn damaged(&mut self, path: &Arc<PathBuf>, line: u64, reason: String) -> Option<Error> {
        if self.options.on_malformed != OnMalformed::Skip {
            return Some(Error::DamagedFile { path: path.to_path_buf(), line, reason });
        }
        self.report.damaged_files += 1;
        let reason = format!("the file is damaged from here on: {reason}");
        self.report.note_malformed(Malformed { path: path.to_path_buf(), line: line + 1, reason });
        None
    }

    fn wrong_field(&mut self, path: &Arc<PathBuf>, reason: String) -> Option<Error> {
        if self.options.on_malformed != OnMalformed::Skip {
            return Some(Error::option("field", &self.options.field, format!("{}: {reason}", path.display())));
        }
        self.malformed(path, 1, format!("`{}`: {reason}", self.options.field))
    }

    /// The policy's last word, behind the last file.
    fn finish(&mut self) -> Option<Error> {
        let report = &self.report;
        let (malformed, records) = (report.num_malformed, report.num_malformed + report.documents);
        let limit = self.options.max_malformed_fraction;
        if self.options.on_malformed == OnMalformed::Report && malformed as f64 > limit * records as f64 {
            let first = report.malformed.first().map(ToString::to_string).unwrap_or_default();
            return Some(Error::TooManyMalformed { malformed, records, percent: limit * 100.0, first });
        }
        None
    }

    fn step(&mut self) -> Option<Result<Document>> {
        loop {
            let Some(current) = &mut self.current else {
                match self.open_next() {
                    Some(Ok(())) => continue,
                    Some(Err(e)) => return Some(Err(e)),
                    None => return self.finish().map(Err),
                }
            };
            let path = current.path.clone();
            let failure = match current.records.next_record() {
                None => {
                    self.current = None;
                    None
                }
                Some(Record::Blank) => {
                    self.report.blank_documents += 1;
                    None
                }
                Some(Record::Document { text, line }) => {
                    self.report.note_document(text.len());
                    return Some(Ok(Document { text, path, line }));
                }
                Some(Record::Cut { text, line }) => {
                    self.report.cut_documents += 1;
                    self.report.note_document(text.len());
                    return Some(Ok(Document { text, path, line }));
                }
                Some(Record::Malformed { line, reason }) => self.malformed(&path, line, reason),
                Some(Record::WrongField { reason }) => {
                    self.current = None;
                    self.wrong_field(&path, reason)
                }
                Some(Record::Damaged { line, reason }) => {
                    self.current = None;
                    self.damaged(&path, line, reason)
                }
            };
            if let Some(failure) = failure {
                return Some(Err(failure));
            }
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = self.step();
        self.done = !matches!(item, Some(Ok(_)));
        item
    }
}
