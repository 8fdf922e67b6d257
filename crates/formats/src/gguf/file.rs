//! [`GgufFile`].

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::read::Cursor;
use super::types::dtype_of;
use super::{GgufValue, TokenizerFields, tokenizer};
use crate::{Error, Result, TensorInfo, TensorSource};

const MAGIC: &[u8] = b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_DIMS: u32 = 4;

/// A mapped GGUF file.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    metadata: Vec<(String, GgufValue)>,
    names: Vec<String>,
    tensors: HashMap<String, (TensorInfo, Range<usize>)>,
}

impl GgufFile {
    /// Maps a file and checks its header.
    ///
    /// # Errors
    /// If it cannot be read, is no GGUF of version 2 or 3, or is malformed; or holds a tensor type that is not supported.
    pub fn open(path: &Path) -> Result<Self> {
        let map = crate::source_map(path)?;
        let header = Header::read(&map).map_err(|reason| Error::malformed(path, reason))?;
        let mut tensors = HashMap::new();
        let mut names = vec![];
        for raw in header.tensors {
            let (info, range) =
                raw.place(header.data_start, map.len()).map_err(|(name, reason)| Error::tensor(path, &name, reason))?;
            names.push(info.name.clone());
            if let Some((earlier, _)) = tensors.insert(info.name.clone(), (info, range)) {
                return Err(Error::tensor(path, &earlier.name, "is there twice"));
            }
        }
        Ok(Self { path: path.to_path_buf(), map, metadata: header.metadata, names, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All keys and values, in the order of the file.
    pub fn metadata(&self) -> &[(String, GgufValue)] {
        &self.metadata
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&GgufValue> {
        self.metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }

    fn typed<'a, T>(&'a self, key: &str, what: &str, read: impl Fn(&'a GgufValue) -> Option<T>) -> Result<T> {
        let value = self.get(key).ok_or_else(|| Error::key(&self.path, key, "is missing"))?;
        read(value).ok_or_else(|| Error::key(&self.path, key, format!("is {}, not {what}", value.kind())))
    }

    /// A non-negative integer.
    ///
    /// # Errors
    /// If the key is missing or of another type.
    pub fn get_u64(&self, key: &str) -> Result<u64> {
        self.typed(key, "a non-negative integer", GgufValue::as_u64)
    }

    /// A float.
    ///
    /// # Errors
    /// If the key is missing or of another type.
    pub fn get_f32(&self, key: &str) -> Result<f32> {
        self.typed(key, "a float", GgufValue::as_f32)
    }

    /// Text.
    ///
    /// # Errors
    /// If the key is missing or of another type.
    pub fn get_str(&self, key: &str) -> Result<&str> {
        self.typed(key, "a string", GgufValue::as_str)
    }

    /// An array.
    ///
    /// # Errors
    /// If the key is missing or of another type.
    pub fn get_array(&self, key: &str) -> Result<&[GgufValue]> {
        self.typed(key, "an array", GgufValue::as_array)
    }

    /// What the file says of its tokenizer.
    ///
    /// # Errors
    /// If it has none, or a key is of the wrong type.
    pub fn tokenizer_fields(&self) -> Result<TokenizerFields> {
        tokenizer::read(self)
    }
}

impl TensorSource for GgufFile {
    fn names(&self) -> Vec<&str> {
        self.names.iter().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info)
    }

    fn bytes(&self, name: &str) -> Result<&[u8]> {
        match self.tensors.get(name) {
            Some((_, range)) => Ok(&self.map[range.clone()]),
            None => Err(Error::tensor(&self.path, name, "there is no such tensor")),
        }
    }

    fn path_of(&self, _: &str) -> &Path {
        &self.path
    }
}

struct Header {
    metadata: Vec<(String, GgufValue)>,
    tensors: Vec<RawTensor>,
    data_start: u64,
}

struct RawTensor {
    name: String,
    /// Innermost first, as the file has them.
    dims: Vec<u64>,
    kind: u32,
    offset: u64,
}

impl Header {
    fn read(bytes: &[u8]) -> Result<Self, String> {
        if !bytes.starts_with(MAGIC) {
            return Err("is no GGUF file: it does not begin with GGUF".into());
        }
        let mut cursor = Cursor::new(&bytes[MAGIC.len()..]);
        match cursor.u32()? {
            2 | 3 => {}
            1 => return Err("is GGUF version 1, which is not supported; convert the model anew".into()),
            v if v.swap_bytes() <= 3 => return Err("is big-endian, which is not supported".into()),
            v => return Err(format!("is GGUF version {v}; 2 and 3 are supported")),
        }
        // A tensor's entry takes at least 8 + 4 + 8 + 4 + 8 bytes, a key and value at least 8 + 4 + 1.
        let num_tensors = cursor.count(32, "tensors")?;
        let num_keys = cursor.count(13, "keys")?;
        let mut metadata: Vec<(String, GgufValue)> = vec![];
        let mut seen = std::collections::HashSet::new();
        for _ in 0..num_keys {
            let key = cursor.string()?;
            let value = cursor.value().map_err(|reason| format!("`{key}`: {reason}"))?;
            if !seen.insert(key.clone()) {
                return Err(format!("`{key}` is there twice"));
            }
            metadata.push((key, value));
        }
        let mut tensors = vec![];
        for _ in 0..num_tensors {
            tensors.push(RawTensor::read(&mut cursor)?);
        }
        let alignment = match metadata.iter().find(|(k, _)| k == "general.alignment").map(|(_, v)| v.as_u64()) {
            None => DEFAULT_ALIGNMENT,
            Some(Some(a)) if a.is_power_of_two() && a <= 1 << 20 => a,
            Some(_) => return Err("`general.alignment` is no power of two up to 2^20".into()),
        };
        let end = (MAGIC.len() + cursor.position()) as u64;
        Ok(Self { metadata, tensors, data_start: end.next_multiple_of(alignment) })
    }
}

impl RawTensor {
    fn read(cursor: &mut Cursor) -> Result<Self, String> {
        let name = cursor.string()?;
        let num_dims = cursor.u32()?;
        if num_dims > MAX_DIMS {
            return Err(format!("tensor `{name}` has {num_dims} dimensions; at most {MAX_DIMS} are possible"));
        }
        let dims = (0..num_dims).map(|_| cursor.u64()).collect::<Result<_, _>>()?;
        Ok(Self { name, dims, kind: cursor.u32()?, offset: cursor.u64()? })
    }

    /// Checks where the tensor says it lies.
    fn place(self, data_start: u64, len: usize) -> Result<(TensorInfo, Range<usize>), (String, String)> {
        let wrong = |reason: String| (self.name.clone(), reason);
        let dtype = dtype_of(self.kind).map_err(|kind| wrong(format!("type {kind} is not supported")))?;
        let shape: Option<Vec<usize>> = self.dims.iter().rev().map(|&d| usize::try_from(d).ok()).collect();
        let shape = shape.ok_or_else(|| wrong("a dimension does not fit this machine".into()))?;
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let row_is_whole = shape.last().is_none_or(|&row| dtype.bytes(row).is_some());
        let bytes = elements.and_then(|n| dtype.bytes(n)).filter(|_| row_is_whole);
        let bytes = bytes.ok_or_else(|| wrong(format!("shape {shape:?} makes no whole number of {dtype} blocks")))?;
        let start = data_start.checked_add(self.offset).and_then(|s| usize::try_from(s).ok());
        let end = start.and_then(|s| s.checked_add(bytes)).filter(|&end| end <= len);
        match (start, end) {
            (Some(start), Some(end)) => Ok((TensorInfo { name: self.name, dtype, shape }, start..end)),
            _ => Err(wrong(format!("its {bytes} bytes lie beyond the end of the file ({len} bytes): is it cut off?"))),
        }
    }
}
