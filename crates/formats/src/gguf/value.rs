//! Metadata values.

/// A value of a GGUF header.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum GgufValue {
    /// Any unsigned integer.
    U64(u64),
    /// Any signed integer.
    I64(i64),
    /// 32-bit float.
    F32(f32),
    /// 64-bit float.
    F64(f64),
    /// Boolean.
    Bool(bool),
    /// Text.
    String(String),
    /// Values of one type.
    Array(Vec<GgufValue>),
}

impl GgufValue {
    /// What it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            GgufValue::U64(_) | GgufValue::I64(_) => "an integer",
            GgufValue::F32(_) | GgufValue::F64(_) => "a float",
            GgufValue::Bool(_) => "a boolean",
            GgufValue::String(_) => "a string",
            GgufValue::Array(_) => "an array",
        }
    }

    /// As a non-negative integer.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            GgufValue::U64(x) => Some(*x),
            GgufValue::I64(x) => u64::try_from(*x).ok(),
            _ => None,
        }
    }

    /// As a float.
    pub fn as_f32(&self) -> Option<f32> {
        match self {
            GgufValue::F32(x) => Some(*x),
            GgufValue::F64(x) => Some(*x as f32),
            _ => None,
        }
    }

    /// As a boolean.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            GgufValue::Bool(x) => Some(*x),
            _ => None,
        }
    }

    /// As text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            GgufValue::String(x) => Some(x),
            _ => None,
        }
    }

    /// As an array.
    pub fn as_array(&self) -> Option<&[GgufValue]> {
        match self {
            GgufValue::Array(x) => Some(x),
            _ => None,
        }
    }
}
