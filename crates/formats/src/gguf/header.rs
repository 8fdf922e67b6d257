//! The header of a GGUF file: what it says, checked against the file.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;

use super::GgufValue;
use super::read::Cursor;
use super::types::dtype_of;
use crate::{Error, TensorInfo};

const MAGIC: &[u8] = b"GGUF";
const ALIGNMENT: &str = "general.alignment";
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;
const MAX_DIMS: u32 = 4;
/// Fewest bytes of a tensor's entry: length of the name, number of dimensions, type, offset.
const LEAST_TENSOR: usize = 8 + 4 + 4 + 8;
/// Fewest bytes of a key and its value: length of the key, type, value.
const LEAST_KEY: usize = 8 + 4 + 1;

/// What is wrong, of the file or of something in it.
pub(super) enum Wrong {
    File(String),
    Key(String, String),
    Tensor(String, String),
}

impl Wrong {
    pub(super) fn in_file(self, path: &Path) -> Error {
        match self {
            Wrong::File(reason) => Error::malformed(path, reason),
            Wrong::Key(key, reason) => Error::key(path, &key, reason),
            Wrong::Tensor(tensor, reason) => Error::tensor(path, &tensor, reason),
        }
    }
}

impl From<String> for Wrong {
    fn from(reason: String) -> Self {
        Wrong::File(reason)
    }
}

/// A header that has been checked against its file.
pub(super) struct Header {
    pub metadata: Vec<(String, GgufValue)>,
    /// In the order of the header, with the place of their bytes in the file.
    pub tensors: Vec<(TensorInfo, Range<usize>)>,
}

struct RawTensor {
    name: String,
    /// Innermost first, as the file has them.
    dims: Vec<u64>,
    kind: u32,
    offset: u64,
}

impl Header {
    pub(super) fn read(bytes: &[u8]) -> Result<Self, Wrong> {
        if !bytes.starts_with(MAGIC) {
            return Err(Wrong::File("is no GGUF file: it does not begin with GGUF".into()));
        }
        let mut cursor = Cursor::new(bytes, MAGIC.len());
        check_version(cursor.u32()?)?;
        let num_tensors = cursor.count(LEAST_TENSOR, "tensors")?;
        let num_keys = cursor.count(LEAST_KEY, "keys")?;
        let metadata = read_metadata(&mut cursor, num_keys)?;
        let alignment = alignment(&metadata)?;
        let mut raw = vec![];
        for index in 0..num_tensors {
            let tensor =
                RawTensor::read(&mut cursor).map_err(|e| Wrong::File(format!("tensor number {index}: {e}")))?;
            raw.push(tensor);
        }
        let data_start = (cursor.position() as u64).next_multiple_of(alignment);
        let mut tensors = vec![];
        for tensor in raw {
            tensors.push(tensor.place(data_start, alignment, bytes.len())?);
        }
        check_apart(&tensors)?;
        Ok(Self { metadata, tensors })
    }
}

fn check_version(version: u32) -> Result<(), Wrong> {
    match (version, version.swap_bytes()) {
        (2 | 3, _) => Ok(()),
        (1, _) => Err(Wrong::File("is GGUF version 1, which is not supported; convert the model anew".into())),
        (_, 1..=3) => Err(Wrong::File("is a big-endian GGUF, which is not supported; convert the model anew".into())),
        _ => Err(Wrong::File(format!("is GGUF version {version}; 2 and 3 are supported"))),
    }
}

fn read_metadata(cursor: &mut Cursor, num_keys: usize) -> Result<Vec<(String, GgufValue)>, Wrong> {
    let mut metadata: Vec<(String, GgufValue)> = vec![];
    let mut seen = HashSet::new();
    for index in 0..num_keys {
        let key = cursor.string().map_err(|e| Wrong::File(format!("key number {index}: {e}")))?;
        cursor.charge(size_of::<(String, GgufValue)>() + size_of::<String>() + key.len())?;
        if !seen.insert(key.clone()) {
            return Err(Wrong::Key(key, "is there twice".into()));
        }
        match cursor.value() {
            Ok(value) => metadata.push((key, value)),
            Err(reason) => return Err(Wrong::Key(key, reason)),
        }
    }
    Ok(metadata)
}

fn alignment(metadata: &[(String, GgufValue)]) -> Result<u64, Wrong> {
    let Some((_, value)) = metadata.iter().find(|(key, _)| key == ALIGNMENT) else { return Ok(DEFAULT_ALIGNMENT) };
    match value.as_u64() {
        Some(a) if a.is_power_of_two() && a <= MAX_ALIGNMENT => Ok(a),
        Some(a) => {
            Err(Wrong::Key(ALIGNMENT.into(), format!("is {a}, which is no power of two from 1 to {MAX_ALIGNMENT}")))
        }
        None => Err(Wrong::Key(ALIGNMENT.into(), format!("is {}, not a power of two", value.kind()))),
    }
}

/// Checks that no name is there twice and no byte belongs to two tensors.
fn check_apart(tensors: &[(TensorInfo, Range<usize>)]) -> Result<(), Wrong> {
    let mut by_name = HashMap::new();
    for (info, _) in tensors {
        if by_name.insert(info.name.as_str(), ()).is_some() {
            return Err(Wrong::Tensor(info.name.clone(), "is there twice".into()));
        }
    }
    let mut sorted: Vec<_> = tensors.iter().filter(|(_, range)| !range.is_empty()).collect();
    sorted.sort_by_key(|(_, range)| range.start);
    for pair in sorted.windows(2) {
        let [(first, earlier), (second, later)] = [pair[0], pair[1]];
        if later.start < earlier.end {
            return Err(Wrong::Tensor(second.name.clone(), format!("its bytes overlap those of `{}`", first.name)));
        }
    }
    Ok(())
}

impl RawTensor {
    fn read(cursor: &mut Cursor) -> Result<Self, String> {
        let name = cursor.string()?;
        // Name and shape are held twice, and in maps.
        cursor.charge(4 * size_of::<RawTensor>() + 3 * name.len())?;
        let num_dims = cursor.u32()?;
        if num_dims > MAX_DIMS {
            return Err(format!("`{name}` has {num_dims} dimensions; at most {MAX_DIMS} are possible"));
        }
        let dims =
            (0..num_dims).map(|_| cursor.u64()).collect::<Result<_, _>>().map_err(|e| format!("`{name}`: {e}"))?;
        let number = |what: &str, e: Result<u64, String>| e.map_err(|e| format!("`{name}`: its {what}: {e}"));
        let kind = number("type", cursor.u32().map(u64::from))? as u32;
        let offset = number("offset", cursor.u64())?;
        Ok(Self { name, dims, kind, offset })
    }

    /// Checks where the tensor says it lies.
    fn place(self, data_start: u64, alignment: u64, len: usize) -> Result<(TensorInfo, Range<usize>), Wrong> {
        let wrong = |reason: String| Wrong::Tensor(self.name.clone(), reason);
        let dtype = dtype_of(self.kind).map_err(|kind| {
            wrong(format!("type {kind} is not supported; convert the model with another type, e.g. Q8_0 or Q4_K_M"))
        })?;
        let too_large = || wrong(format!("dimensions {:?} of {dtype} are more than a computer can hold", self.dims));
        let shape: Option<Vec<usize>> = self.dims.iter().rev().map(|&d| usize::try_from(d).ok()).collect();
        let shape = shape.ok_or_else(too_large)?;
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(too_large)?;
        // A quantized block never crosses from one row into the next; a tensor without dimensions is one row of one.
        let (row, block) = (shape.last().copied().unwrap_or(1), dtype.block_elements());
        if !row.is_multiple_of(block) {
            return Err(wrong(format!("rows of {row} values are no whole number of {dtype} blocks of {block}")));
        }
        let bytes = dtype.bytes(elements).ok_or_else(too_large)?;
        if !self.offset.is_multiple_of(alignment) {
            return Err(wrong(format!("its offset {} is no multiple of the alignment {alignment}", self.offset)));
        }
        let start = data_start.checked_add(self.offset).and_then(|s| usize::try_from(s).ok());
        let end = start.and_then(|s| s.checked_add(bytes)).filter(|&end| end <= len);
        match (start, end) {
            (Some(start), Some(end)) => Ok((TensorInfo { name: self.name, dtype, shape }, start..end)),
            _ => Err(wrong(format!(
                "its {bytes} bytes lie beyond the end of the file ({len} bytes): it is cut off; fetch it again"
            ))),
        }
    }
}
