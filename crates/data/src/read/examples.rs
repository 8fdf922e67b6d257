//! Files to examples: see [`examples`].

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::files::Kind;
use super::jsonl::{JsonRecords, ParseLine, json_reason};
use super::open::{self, OpenError};
use super::reader::{Open, Reader};
use super::rows::RowRecords;
use super::{OnMalformed, ReadOptions, ReadReport, Wanted};
use crate::Result;
use crate::chat::{AlpacaAs, Content, Example, KnownWords, RecordReader, Shape, Unread, parse_json};

/// How examples are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExampleOptions {
    /// The shape of all records; `None` to recognise it by their fields, file by file.
    pub shape: Option<Shape>,
    /// What records of [`Shape::Alpaca`] become.
    pub alpaca: AlpacaAs,
    /// Roles and fields of messages that are known beside the usual ones.
    pub known: KnownWords,
    /// What to do with malformed records; stop at the first one. Examples are few and written with care: one that cannot
    /// be read is a mistake to know of.
    pub on_malformed: OnMalformed,
    /// See [`ReadOptions::max_malformed_fraction`]; 0.01.
    pub max_malformed_fraction: f64,
    /// Longest record in bytes, a longer one being malformed; 64 MiB.
    pub max_document_bytes: usize,
    /// See [`ReadOptions::keep_malformed`]; 100.
    pub keep_malformed: usize,
}

impl Default for ExampleOptions {
    fn default() -> Self {
        let read = ReadOptions::default();
        Self {
            shape: None,
            alpaca: AlpacaAs::Messages,
            known: KnownWords::default(),
            on_malformed: OnMalformed::Error,
            max_malformed_fraction: read.max_malformed_fraction,
            max_document_bytes: read.max_document_bytes,
            keep_malformed: read.keep_malformed,
        }
    }
}

/// The examples of `inputs`, in order, from JSON lines and Parquet tables of any [`Shape`]. Files are found as
/// [`documents`](crate::documents) finds them, but plain text is left out.
///
/// # Errors
/// As [`documents`](crate::documents).
pub fn examples(inputs: &[PathBuf], options: ExampleOptions) -> Result<Examples> {
    let ExampleOptions {
        shape,
        alpaca,
        known,
        on_malformed,
        max_malformed_fraction,
        max_document_bytes,
        keep_malformed,
    } = options;
    let read = ReadOptions {
        on_malformed,
        max_malformed_fraction,
        max_document_bytes,
        keep_malformed,
        ..ReadOptions::default()
    };
    let (unread, known) = (Unread::default(), Arc::new(known));
    let noted = unread.clone();
    let open: Open<Content> = Box::new(move |file, read, options| {
        let records = RecordReader::new(shape, alpaca, known.clone(), noted.of_file(&file.path));
        Ok(match file.kind {
            Kind::Text => return Err(OpenError::Damaged("plain text, not records".to_owned())),
            Kind::Jsonl => Box::new(JsonRecords::new(open::stream(file, read)?, records, options)),
            Kind::Parquet => Box::new(RowRecords::new(open::seekable(file, read)?, records, options)),
        })
    });
    Ok(Examples { reader: Reader::new(inputs, Wanted::Records, read, open)?, unread })
}

impl ParseLine for RecordReader {
    type Item = Content;

    fn parse(&mut self, json: &[u8], line: u64) -> std::result::Result<Option<Content>, String> {
        self.read(parse_json(json).map_err(|e| json_reason(json, &e, "{\"messages\": [..]}"))?, line)
    }
}

/// Iterator over examples, see [`examples`].
pub struct Examples {
    reader: Reader<Content>,
    unread: Unread,
}

impl Examples {
    /// What has been read so far, and what could not be; its documents are the examples.
    pub fn report(&self) -> &ReadReport {
        self.reader.report()
    }

    /// The report, when reading is over.
    pub fn into_report(self) -> ReadReport {
        ReadReport { unread_fields: self.unread.take(), ..self.reader.into_report() }
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

impl Iterator for Examples {
    type Item = Result<Example>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = self.reader.next()?;
        Some(found.map(|f| Example { content: f.item, path: f.path, line: f.line }))
    }
}
