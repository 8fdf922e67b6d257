//! Reading a header from untrusted bytes: every count is checked against the bytes that are left before memory is taken.

use super::GgufValue;

/// Arrays of arrays go no deeper.
pub(super) const MAX_DEPTH: usize = 4;

/// The most memory that a header may ask for. A vocabulary of 260,000 tokens and 500,000 merges takes a fifth of it.
const MAX_MEMORY: usize = 256 << 20;

/// The file, and how far it has been read.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    /// What is left of [`MAX_MEMORY`].
    memory: usize,
}

impl<'a> Cursor<'a> {
    /// From `at` on; positions in messages are the file's.
    pub(crate) fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { bytes, at: at.min(bytes.len()), memory: MAX_MEMORY }
    }

    /// To be called before memory is taken for what the header asks.
    pub(crate) fn charge(&mut self, bytes: usize) -> Result<(), String> {
        let left = self.memory.checked_sub(bytes).ok_or_else(|| {
            let most = MAX_MEMORY >> 20;
            format!("at byte {} the header asks for more than {most} MiB of memory: it is damaged", self.at)
        })?;
        self.memory = left;
        Ok(())
    }

    pub(crate) fn position(&self) -> usize {
        self.at
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let left = self.bytes.len() - self.at;
        if n > left {
            let end = self.bytes.len();
            return Err(format!(
                "the file ends at byte {end} where {n} bytes are needed: it is cut off; fetch it again"
            ));
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
            .ok_or_else(|| format!("{count} {what} at byte {} do not fit in the file: it is damaged", self.at - 8))
    }

    pub(crate) fn string(&mut self) -> Result<String, String> {
        let len = self.count(1, "bytes of text")?;
        let at = self.at;
        self.charge(len)?;
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
                let least = least_bytes(element)
                    .ok_or_else(|| format!("value type {element} at byte {} is unknown", self.at - 4))?;
                let count = self.count(least, "array elements")?;
                self.charge(count.saturating_mul(size_of::<GgufValue>()))?;
                let mut values = Vec::with_capacity(count);
                for _ in 0..count {
                    values.push(self.value_of(element, depth + 1)?);
                }
                GgufValue::Array(values)
            }
            10 => GgufValue::U64(self.u64()?),
            11 => GgufValue::I64(i64::from_le_bytes(self.array()?)),
            12 => GgufValue::F64(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("value type {other} at byte {} is unknown", self.at - 4)),
        })
    }
}

/// The fewest bytes a value of this type takes in the file; `None` if there is no such type.
fn least_bytes(kind: u32) -> Option<usize> {
    Some(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        9 => 12,
        _ => return None,
    })
}
