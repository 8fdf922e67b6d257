//! Examples of a Parquet file: rows with lists and structs in them.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Number, Value};

use super::ReadOptions;
use super::reader::{Record, Records};
use crate::chat::{Content, RecordReader, columns};
use crate::error::panic_message;

/// Reads row after row, of the columns that may matter.
pub(super) struct RowRecords {
    file: Option<File>,
    records: RecordReader,
    cap: usize,
    rows: Option<RowIter<'static>>,
    /// Columns that are not read.
    unread: Vec<String>,
    row: u64,
    over: bool,
}

enum Failure {
    Damaged(String),
    Columns(String),
}

impl From<ParquetError> for Failure {
    fn from(error: ParquetError) -> Self {
        Self::Damaged(error.to_string())
    }
}

impl RowRecords {
    pub(super) fn new(file: File, records: RecordReader, options: &ReadOptions) -> Self {
        Self {
            file: Some(file),
            records,
            cap: options.max_document_bytes,
            rows: None,
            unread: vec![],
            row: 0,
            over: false,
        }
    }

    fn next_row(&mut self) -> Result<Option<Row>, Failure> {
        if let Some(file) = self.file.take() {
            let (rows, unread) = open(file)?;
            (self.rows, self.unread) = (Some(rows), unread);
        }
        Ok(self.rows.as_mut().and_then(Iterator::next).transpose()?)
    }

    fn record(&mut self, row: Row) -> Record<Content> {
        let line = self.row;
        self.unread.iter().for_each(|column| self.records.note_column(column, line));
        let mut bytes = 0;
        let value = object(row, &mut bytes).and_then(|value| match bytes > self.cap {
            true => Err(format!("the row is longer than {} bytes (max_document_bytes)", self.cap)),
            false => Ok(value),
        });
        match value.and_then(|value| self.records.read(value, line)) {
            Ok(Some(item)) => Record::Document { item, line },
            Ok(None) => Record::Blank,
            Err(reason) => Record::Malformed { line, reason },
        }
    }
}

/// The rows of a table, of the columns that may matter, and the names of the others.
fn open(file: File) -> Result<(RowIter<'static>, Vec<String>), Failure> {
    let reader = SerializedFileReader::new(file)?;
    let schema = reader.metadata().file_metadata().schema_descr_ptr();
    let root = schema.root_schema();
    let of_use = |field: &Arc<Type>| columns().any(|name| name == field.name());
    let (fields, others): (Vec<_>, Vec<_>) = root.get_fields().iter().cloned().partition(of_use);
    if fields.is_empty() {
        let names: Vec<_> = root.get_fields().iter().take(20).map(|f| f.name()).collect();
        return Err(Failure::Columns(format!("no column of any known shape; there are: {}", names.join(", "))));
    }
    let projection = Type::group_type_builder(root.name()).with_fields(fields).build()?;
    let unread = others.iter().map(|field| field.name().to_owned()).collect();
    Ok((RowIter::from_file_into(Box::new(reader)).project(Some(projection))?, unread))
}

impl Records<Content> for RowRecords {
    fn next_record(&mut self) -> Option<Record<Content>> {
        if self.over {
            return None;
        }
        // The decoder panics on some damaged files; to the reader that is a damaged file like any other.
        let row = catch_unwind(AssertUnwindSafe(|| self.next_row()))
            .unwrap_or_else(|panic| Err(Failure::Damaged(panic_message(&*panic))));
        match row {
            Ok(Some(row)) => {
                self.row += 1;
                Some(self.record(row))
            }
            Ok(None) => {
                self.over = true;
                None
            }
            Err(failure) => {
                self.over = true;
                Some(match failure {
                    Failure::Damaged(reason) => Record::Damaged { line: self.row, reason },
                    Failure::Columns(reason) => {
                        Record::WrongField { option: "shape", value: "recognised by its fields".to_owned(), reason }
                    }
                })
            }
        }
    }
}

/// A struct as an object. Where a table has a null, a record would have no such field.
fn object(row: Row, bytes: &mut usize) -> Result<Value, String> {
    let mut map = Map::new();
    for (name, field) in row.into_columns() {
        let value = value(field, bytes).map_err(|e| format!("`{name}`: {e}"))?;
        if !value.is_null() {
            map.insert(name, value);
        }
    }
    Ok(Value::Object(map))
}

/// A cell as JSON; `bytes` counts what it takes.
fn value(field: Field, bytes: &mut usize) -> Result<Value, String> {
    *bytes += 8;
    let text = |text: String, bytes: &mut usize| {
        *bytes += text.len();
        Value::String(text)
    };
    // What is no number in JSON stays as text, for whoever wants a number there to refuse it.
    let float = |x: f64| Number::from_f64(x).map_or_else(|| Value::String(x.to_string()), Value::Number);
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(x) => x.into(),
        Field::Byte(x) => x.into(),
        Field::Short(x) => x.into(),
        Field::Int(x) => x.into(),
        Field::Long(x) => x.into(),
        Field::UByte(x) => x.into(),
        Field::UShort(x) => x.into(),
        Field::UInt(x) => x.into(),
        Field::ULong(x) => x.into(),
        Field::Float16(x) => float(f64::from(f32::from(x))),
        Field::Float(x) => float(f64::from(x)),
        Field::Double(x) => float(x),
        Field::Str(x) => text(x, bytes),
        // Strings of writers that do not mark them as such.
        Field::Bytes(x) => match std::str::from_utf8(x.data()) {
            Ok(x) => text(x.to_owned(), bytes),
            Err(e) => return Err(format!("not UTF-8: {e}")),
        },
        Field::Group(row) => object(row, bytes)?,
        Field::ListInternal(list) => {
            list.elements().iter().map(|f| value(f.clone(), bytes)).collect::<Result<Vec<_>, _>>()?.into()
        }
        Field::MapInternal(map) => {
            let mut object = Map::new();
            for (key, field) in map.entries() {
                let key = if let Field::Str(name) = key { name.clone() } else { key.to_string() };
                object.insert(key, value(field.clone(), bytes)?);
            }
            Value::Object(object)
        }
        other => text(other.to_string(), bytes),
    })
}
