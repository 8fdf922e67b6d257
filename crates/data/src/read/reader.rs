//! Files to whatever their records hold, one at a time, whatever the format.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::files::{self, InputFile, Wanted};
use super::open::OpenError;
use super::{FileReport, Malformed, OnMalformed, ReadOptions, ReadReport};
use crate::{Error, Result};

/// What a file's reader comes to next.
pub(crate) enum Record<T = String> {
    Document {
        item: T,
        line: u64,
    },
    /// A piece of a document that was longer than the limit.
    Cut {
        item: T,
        line: u64,
    },
    Blank,
    Malformed {
        line: u64,
        reason: String,
    },
    /// The file is a table without the wanted column: the option that names it, its value, and what there is.
    WrongField {
        option: &'static str,
        value: String,
        reason: String,
    },
    /// Nothing more can be had from this file.
    Damaged {
        line: u64,
        reason: String,
    },
}

/// A reader of one file.
pub(crate) trait Records<T = String>: Send {
    fn next_record(&mut self) -> Option<Record<T>>;
}

/// What is read out of files.
pub(crate) trait Item {
    /// Bytes of its text.
    fn text_bytes(&self) -> usize;
}

impl Item for String {
    fn text_bytes(&self) -> usize {
        self.len()
    }
}

/// Opens a file of any kind as records, counting what is read of the disk.
pub(super) type Open<T> = Box<dyn Fn(&InputFile, &Arc<AtomicU64>, &ReadOptions) -> Opened<T> + Send>;
type Opened<T> = std::result::Result<Box<dyn Records<T>>, OpenError>;

/// An item and where it is from.
pub(crate) struct Found<T> {
    pub(crate) item: T,
    pub(crate) path: Arc<PathBuf>,
    /// 1-based line where it starts, or row of a table.
    pub(crate) line: u64,
}

struct Current<T> {
    path: Arc<PathBuf>,
    records: Box<dyn Records<T>>,
}

/// Goes through the files and keeps the account of them.
pub(crate) struct Reader<T> {
    options: ReadOptions,
    open: Open<T>,
    files: std::vec::IntoIter<InputFile>,
    current: Option<Current<T>>,
    report: ReadReport,
    input_bytes: u64,
    read: Arc<AtomicU64>,
    done: bool,
}

impl<T: Item> Reader<T> {
    pub(super) fn new(inputs: &[PathBuf], wanted: Wanted, options: ReadOptions, open: Open<T>) -> Result<Self> {
        options.check()?;
        let found = files::find(inputs, wanted, options.keep_malformed)?;
        let report = ReadReport {
            skipped_files: found.skipped,
            num_skipped_files: found.num_skipped,
            keep: options.keep_malformed,
            ..ReadReport::default()
        };
        let input_bytes = found.files.iter().map(|f| f.bytes).sum();
        let files = found.files.into_iter();
        Ok(Self { options, open, files, current: None, report, input_bytes, read: Arc::default(), done: false })
    }

    pub(crate) fn report(&self) -> &ReadReport {
        &self.report
    }

    pub(crate) fn into_report(self) -> ReadReport {
        self.report
    }

    pub(crate) fn input_bytes(&self) -> u64 {
        self.input_bytes
    }

    pub(crate) fn input_bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Opens the next file; `None` behind the last one.
    fn open_next(&mut self) -> Option<Result<()>> {
        let file = self.files.next()?;
        let path = Arc::new(file.path.clone());
        self.report.files.push(FileReport { path: file.path.clone(), bytes: file.bytes, ..FileReport::default() });
        match (self.open)(&file, &self.read, &self.options) {
            Ok(records) => self.current = Some(Current { path, records }),
            Err(OpenError::Io(e)) => return Some(Err(Error::io(&file.path, e))),
            Err(OpenError::Damaged(reason)) => return self.damaged(&path, 0, reason).map(Err).or(Some(Ok(()))),
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

    fn wrong_field(&mut self, path: &Arc<PathBuf>, option: &'static str, value: &str, reason: &str) -> Option<Error> {
        if self.options.on_malformed != OnMalformed::Skip {
            return Some(Error::option(option, value, format!("{}: {reason}", path.display())));
        }
        self.malformed(path, 1, format!("`{value}`: {reason}"))
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

    fn step(&mut self) -> Option<Result<Found<T>>> {
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
                Some(Record::Document { item, line }) => {
                    self.report.note_document(item.text_bytes());
                    return Some(Ok(Found { item, path, line }));
                }
                Some(Record::Cut { item, line }) => {
                    self.report.cut_documents += 1;
                    self.report.note_document(item.text_bytes());
                    return Some(Ok(Found { item, path, line }));
                }
                Some(Record::Malformed { line, reason }) => self.malformed(&path, line, reason),
                Some(Record::WrongField { option, value, reason }) => {
                    self.current = None;
                    self.wrong_field(&path, option, &value, &reason)
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

impl<T: Item> Iterator for Reader<T> {
    type Item = Result<Found<T>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = self.step();
        self.done = !matches!(item, Some(Ok(_)));
        item
    }
}
