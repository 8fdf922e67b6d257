//! Files and folders to documents, one at a time, with an account of what could not be read.
//!
//! | extension | documents |
//! |---|---|
//! | `.txt` `.md` `.text` | the file, or its parts ([`TextSplit`]) |
//! | `.jsonl` `.ndjson` | each line: an object with a text field |
//! | `.parquet` | each row of a string column |
//!
//! Each may have `.gz` (several members too) or `.zst` behind it, and is decoded as a stream.

mod examples;
mod files;
mod jsonl;
mod open;
mod parquet;
mod reader;
mod report;
mod rows;
mod text;

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use examples::{ExampleOptions, Examples, examples};
pub use files::SkippedFile;
pub(crate) use files::{Wanted, join};
pub use report::{FileReport, Malformed, ReadReport, UnreadField};

use crate::{Error, Result};
use files::Kind;
pub(crate) use reader::Item;
use reader::{Open, Reader, Record, Records};

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

/// The documents of `inputs`, in order: inputs as given, the contents of a folder by path, a file from its start.
///
/// Folders are searched recursively, hidden entries (`.name`) and unknown extensions are left out and listed in the
/// report. A file reached twice is read once.
///
/// # Errors
/// At once if an option is wrong, an input is missing, a file named itself is of an unknown kind, or nothing can be
/// read at all. Later, as an item, as [`OnMalformed`] says; the iterator ends behind an error.
pub fn documents(inputs: &[PathBuf], options: ReadOptions) -> Result<Documents> {
    let open: Open<String> = Box::new(|file, read, options| {
        Ok(match file.kind {
            Kind::Text => Box::new(text::TextRecords::new(open::stream(file, read)?, options)),
            Kind::Jsonl => {
                let field = jsonl::TextField(options.field.clone());
                Box::new(jsonl::JsonRecords::new(open::stream(file, read)?, field, options))
            }
            Kind::Parquet => Box::new(parquet::ParquetRecords::new(open::seekable(file, read)?, options)),
        })
    });
    Ok(Documents { reader: Reader::new(inputs, Wanted::Anything, options, open)? })
}

/// The files that a reading would go through, in order.
pub(crate) fn input_paths(inputs: &[PathBuf], wanted: Wanted) -> Result<Vec<PathBuf>> {
    Ok(files::find(inputs, wanted, 10)?.files.into_iter().map(|f| f.path).collect())
}

/// Iterator over documents, see [`documents`].
pub struct Documents {
    reader: Reader<String>,
}

impl Documents {
    /// What has been read so far, and what could not be.
    pub fn report(&self) -> &ReadReport {
        self.reader.report()
    }

    /// The report, when reading is over.
    pub fn into_report(self) -> ReadReport {
        self.reader.into_report()
    }

    /// Bytes on disk of all files to read, as they are (compressed or not).
    pub fn input_bytes(&self) -> u64 {
        self.reader.input_bytes()
    }

    /// Bytes of them that have been read.
    pub fn input_bytes_read(&self) -> u64 {
        self.reader.input_bytes_read()
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = self.reader.next()?;
        Some(found.map(|f| Document { text: f.item, path: f.path, line: f.line }))
    }
}
