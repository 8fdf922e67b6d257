//! Reading a header from untrusted bytes: every count is checked against the bytes that are left before memory is taken.

use super::GgufValue;

/// Arrays of arrays go no deeper.
const MAX_DEPTH: usize = 4;

/// Bytes not read yet.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(crate) fn position(&self) -> usize {
        self.at
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let left = self.bytes.len() - self.at;
        if n > left {
            return Err(format!("the file ends at byte {} where {n} more bytes are needed", self.bytes.len()));
        }
        self.at += n;
        Ok(&self.bytes[self.at - n..self.at])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things of at least `least` bytes each: more than the file can hold is an error.
    pub(crate) fn count(&mut self, least: usize, what: &str) -> Result<usize, String> {
        let count = self.u64()?;
        let room = (self.bytes.len() - self.at) / least.max(1);
        usize::try_from(count)
            .ok()
            .filter(|&count| count <= room)
            .ok_or_else(|| format!("{count} {what} at byte {} do not fit in the file", self.at - 8))
    }

    pub(crate) fn string(&mut self) -> Result<String, String> {
        let len = self.count(1, "bytes of text")?;
        let at = self.at;
        let bytes = self.take(len)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| format!("the text at byte {at} is not UTF-8"))
    }

    pub(crate) fn value(&mut self) -> Result<GgufValue, String> {
        let kind = self.u32()?;
        self.value_of(kind, 0)
    }

    fn value_of(&mut self, kind: u32, depth: usize) -> Result<GgufValue, String> {
        Ok(match kind {
            0 => GgufValue::U64(u64::from(self.array::<1>()?[0])),
            1 => GgufValue::I64(i64::from(i8::from_le_bytes(self.array()?))),
            2 => GgufValue::U64(u64::from(u16::from_le_bytes(self.array()?))),
            3 => GgufValue::I64(i64::from(i16::from_le_bytes(self.array()?))),
            4 => GgufValue::U64(u64::from(self.u32()?)),
            5 => GgufValue::I64(i64::from(i32::from_le_bytes(self.array()?))),
            6 => GgufValue::F32(f32::from_le_bytes(self.array()?)),
            7 => match self.array::<1>()?[0] {
                0 => GgufValue::Bool(false),
                1 => GgufValue::Bool(true),
                other => return Err(format!("{other} at byte {} is no boolean", self.at - 1)),
            },
            8 => GgufValue::String(self.string()?),
            9 => {
                if depth == MAX_DEPTH {
                    return Err(format!("arrays are nested deeper than {MAX_DEPTH} at byte {}", self.at));
                }
                let element = self.u32()?;
                let count = self.count(least_bytes(element), "array elements")?;
                let mut values = Vec::new();
                for _ in 0..count {
                    values.push(self.value_of(element, depth + 1)?);
                }
                GgufValue::Array(values)
            }
            10 => GgufValue::U64(self.u64()?),
            11 => GgufValue::I64(i64::from_le_bytes(self.array()?)),
            12 => GgufValue::F64(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("value type {other} at byte {} is unknown", self.at)),
        })
    }
}

/// The fewest bytes a value of this type takes in the file.
fn least_bytes(kind: u32) -> usize {
    match kind {
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        9 => 12,
        _ => 1,
    }
}
