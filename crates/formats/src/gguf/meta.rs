//! Metadata values with the types that a file gives them.

use super::read::MAX_DEPTH;
use super::write::push_text;

/// Type of a metadata value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum MetaType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl MetaType {
    /// Its number in the file.
    pub(super) fn number(self) -> u32 {
        self as u32
    }
}

/// A value to write into a GGUF header. Readers ask for exact types: llama.cpp takes `U32` where it wants one and refuses
/// `U64`.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum MetaValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    /// The type of its values, and these.
    Array(MetaType, Vec<MetaValue>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl MetaValue {
    /// Its type.
    pub fn kind(&self) -> MetaType {
        match self {
            MetaValue::U8(_) => MetaType::U8,
            MetaValue::I8(_) => MetaType::I8,
            MetaValue::U16(_) => MetaType::U16,
            MetaValue::I16(_) => MetaType::I16,
            MetaValue::U32(_) => MetaType::U32,
            MetaValue::I32(_) => MetaType::I32,
            MetaValue::F32(_) => MetaType::F32,
            MetaValue::Bool(_) => MetaType::Bool,
            MetaValue::String(_) => MetaType::String,
            MetaValue::Array(..) => MetaType::Array,
            MetaValue::U64(_) => MetaType::U64,
            MetaValue::I64(_) => MetaType::I64,
            MetaValue::F64(_) => MetaType::F64,
        }
    }

    /// Appends its bytes; `depth` arrays are around it.
    pub(super) fn push(&self, out: &mut Vec<u8>, depth: usize) -> Result<(), String> {
        match self {
            MetaValue::U8(x) => out.extend(x.to_le_bytes()),
            MetaValue::I8(x) => out.extend(x.to_le_bytes()),
            MetaValue::U16(x) => out.extend(x.to_le_bytes()),
            MetaValue::I16(x) => out.extend(x.to_le_bytes()),
            MetaValue::U32(x) => out.extend(x.to_le_bytes()),
            MetaValue::I32(x) => out.extend(x.to_le_bytes()),
            MetaValue::F32(x) => out.extend(x.to_le_bytes()),
            MetaValue::Bool(x) => out.push(u8::from(*x)),
            MetaValue::String(x) => push_text(out, x),
            MetaValue::Array(kind, values) => {
                if depth == MAX_DEPTH {
                    return Err(format!("arrays are nested deeper than {MAX_DEPTH}"));
                }
                out.extend(kind.number().to_le_bytes());
                out.extend((values.len() as u64).to_le_bytes());
                for value in values {
                    if value.kind() != *kind {
                        return Err(format!("an array of {kind:?} holds {:?}", value.kind()));
                    }
                    value.push(out, depth + 1)?;
                }
            }
            MetaValue::U64(x) => out.extend(x.to_le_bytes()),
            MetaValue::I64(x) => out.extend(x.to_le_bytes()),
            MetaValue::F64(x) => out.extend(x.to_le_bytes()),
        }
        Ok(())
    }
}
