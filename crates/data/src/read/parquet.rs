//! Documents of a column of a Parquet file.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};

use parquet::basic::Type as PhysicalType;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::{ReadOptions, Record, Records};
use crate::error::panic_message;

const ROWS: usize = 256;

/// Reads row group after row group, a few hundred rows at once.
pub(super) struct ParquetRecords {
    file: Option<File>,
    field: String,
    cap: usize,
    open: Option<Open>,
    /// Rows that were decoded and not yet given away, last one first.
    ready: Vec<Option<ByteArray>>,
    row: u64,
    over: bool,
}

enum Failure {
    Damaged(String),
    Column(String),
}

impl From<ParquetError> for Failure {
    fn from(error: ParquetError) -> Self {
        Self::Damaged(error.to_string())
    }
}

struct Open {
    reader: SerializedFileReader<File>,
    column: usize,
    optional: bool,
    group: usize,
    values: Option<ColumnReaderImpl<ByteArrayType>>,
}

impl ParquetRecords {
    pub(super) fn new(file: File, options: &ReadOptions) -> Self {
        let (field, cap) = (options.field.clone(), options.max_document_bytes);
        Self { file: Some(file), field, cap, open: None, ready: vec![], row: 0, over: false }
    }

    /// Decodes the next rows; `false` behind the last.
    fn fill(&mut self) -> Result<bool, Failure> {
        if let Some(file) = self.file.take() {
            self.open = Some(Open::new(file, &self.field)?);
        }
        let Some(open) = &mut self.open else { return Ok(false) };
        loop {
            let Some(values) = &mut open.values else {
                if open.group == open.reader.num_row_groups() {
                    return Ok(false);
                }
                open.next_group()?;
                continue;
            };
            let (mut levels, mut found) = (vec![], vec![]);
            let wanted = open.optional.then_some(&mut levels);
            let (rows, ..) = values.read_records(ROWS, wanted, None, &mut found)?;
            if rows == 0 {
                open.values = None;
                continue;
            }
            let mut found = found.into_iter();
            self.ready = match open.optional {
                true => levels.iter().map(|&level| if level > 0 { found.next() } else { None }).collect(),
                false => found.map(Some).collect(),
            };
            self.ready.reverse();
            return Ok(!self.ready.is_empty());
        }
    }

    fn record(&self, cell: Option<ByteArray>) -> Record {
        let line = self.row;
        let Some(cell) = cell else {
            return Record::Malformed { line, reason: format!("`{}` is null", self.field) };
        };
        if cell.len() > self.cap {
            let reason = format!("`{}` is longer than {} bytes (max_document_bytes)", self.field, self.cap);
            return Record::Malformed { line, reason };
        }
        match std::str::from_utf8(cell.data()) {
            Ok(text) if text.trim().is_empty() => Record::Blank,
            Ok(text) => Record::Document { item: text.to_owned(), line },
            Err(e) => Record::Malformed { line, reason: format!("`{}` is not UTF-8: {e}", self.field) },
        }
    }
}

impl Open {
    fn new(file: File, field: &str) -> Result<Self, Failure> {
        let reader = SerializedFileReader::new(file)?;
        let schema = reader.metadata().file_metadata().schema_descr_ptr();
        let Some(column) = schema.columns().iter().position(|c| c.path().string() == field) else {
            let names: Vec<_> = schema.columns().iter().take(20).map(|c| c.path().string()).collect();
            return Err(Failure::Column(format!("no such column; there are: {}", names.join(", "))));
        };
        let found = schema.column(column);
        if found.physical_type() != PhysicalType::BYTE_ARRAY || found.max_rep_level() > 0 {
            return Err(Failure::Column(format!("column of {:?}, not of one string a row", found.physical_type())));
        }
        let optional = found.max_def_level() > 0;
        Ok(Self { reader, column, optional, group: 0, values: None })
    }

    fn next_group(&mut self) -> Result<(), Failure> {
        let group = self.reader.get_row_group(self.group)?;
        match group.get_column_reader(self.column)? {
            ColumnReader::ByteArrayColumnReader(values) => self.values = Some(values),
            _ => return Err(Failure::Damaged("a column of another type than the schema says".to_owned())),
        }
        self.group += 1;
        Ok(())
    }
}

impl Records for ParquetRecords {
    fn next_record(&mut self) -> Option<Record> {
        if self.over {
            return None;
        }
        if self.ready.is_empty() {
            // The decoder panics on some damaged files; to the reader that is a damaged file like any other.
            let filled = catch_unwind(AssertUnwindSafe(|| self.fill()))
                .unwrap_or_else(|panic| Err(Failure::Damaged(panic_message(&*panic))));
            match filled {
                Ok(true) => {}
                Ok(false) => {
                    self.over = true;
                    return None;
                }
                Err(failure) => {
                    self.over = true;
                    return Some(match failure {
                        Failure::Damaged(reason) => Record::Damaged { line: self.row, reason },
                        Failure::Column(reason) => {
                            Record::WrongField { option: "field", value: self.field.clone(), reason }
                        }
                    });
                }
            }
        }
        let cell = self.ready.pop()?;
        self.row += 1;
        Some(self.record(cell))
    }
}
