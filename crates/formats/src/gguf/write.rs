//! Writing GGUF version 3.

use std::collections::HashSet;
use std::io::{BufWriter, Write};
use std::path::Path;

use half::{bf16, f16};

use super::meta::MetaValue;
use super::types::number_of;
use crate::atomic::atomic_write_with;
use crate::{DType, Error, Result};

/// Where tensors begin: at multiples of it, as is the default of the format.
const ALIGNMENT: usize = 32;
/// ggml keeps a name in 64 bytes, the last of them zero.
const MAX_NAME: usize = 63;
/// The longest key of the format.
const MAX_KEY: usize = 65_535;
const MAX_DIMS: usize = 4;

type Bytes<'a> = Box<dyn Fn() -> Result<Vec<u8>, String> + 'a>;

/// A tensor to write, its bytes made when they are needed.
pub struct GgufTensor<'a> {
    name: String,
    /// Outermost dimension first.
    shape: Vec<usize>,
    dtype: DType,
    bytes: Bytes<'a>,
}

impl<'a> GgufTensor<'a> {
    /// A tensor of `dtype` (`F32`, `F16` or `BF16`) whose values, in row-major order, `values` makes. They are rounded to
    /// the nearest that `dtype` holds.
    pub fn from_values<E: std::fmt::Display>(
        name: String,
        shape: Vec<usize>,
        dtype: DType,
        values: impl Fn() -> std::result::Result<Vec<f32>, E> + 'a,
    ) -> Self {
        let bytes = move || {
            let values = values().map_err(|e| e.to_string())?;
            match dtype {
                DType::F32 => Ok(values.iter().flat_map(|x| x.to_le_bytes()).collect()),
                DType::F16 => Ok(values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect()),
                DType::BF16 => Ok(values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect()),
                other => Err(format!("values are written as F32, F16 or BF16, not {other}; give it as bytes")),
            }
        };
        Self { name, shape, dtype, bytes: Box::new(bytes) }
    }

    /// A tensor of any dtype of GGUF, quantized ones included, whose bytes, as they lie in a file, `bytes` makes.
    pub fn from_bytes<E: std::fmt::Display>(
        name: String,
        shape: Vec<usize>,
        dtype: DType,
        bytes: impl Fn() -> std::result::Result<Vec<u8>, E> + 'a,
    ) -> Self {
        Self { name, shape, dtype, bytes: Box::new(move || bytes().map_err(|e| e.to_string())) }
    }

    fn wrong(&self, reason: String) -> Error {
        Error::Values { tensor: self.name.clone(), reason }
    }

    /// Its size in the file, after checking that the format can hold it.
    fn size(&self) -> Result<usize> {
        if self.name.len() > MAX_NAME {
            let len = self.name.len();
            return Err(self.wrong(format!("its name has {len} bytes; llama.cpp reads at most {MAX_NAME}")));
        }
        if self.shape.len() > MAX_DIMS {
            let dims = self.shape.len();
            return Err(self.wrong(format!("has {dims} dimensions; at most {MAX_DIMS} are possible")));
        }
        let (row, block) = (self.shape.last().copied().unwrap_or(1), self.dtype.block_elements());
        if !row.is_multiple_of(block) {
            let dtype = self.dtype;
            return Err(self.wrong(format!("rows of {row} values are no whole number of {dtype} blocks of {block}")));
        }
        let elements = self.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let bytes = elements.and_then(|n| self.dtype.bytes(n)).filter(|n| n.checked_add(ALIGNMENT).is_some());
        bytes.ok_or_else(|| self.wrong(format!("shape {:?} is more than a computer can hold", self.shape)))
    }
}

/// Writes keys and tensors, in this order, as one file at `path`, one tensor in memory at a time. The file appears whole
/// or not at all.
///
/// # Errors
/// If the system refuses, a key or name is there twice or too long, an array holds values of several types, a dtype is none
/// of GGUF, or values cannot be had; `path` is as it was then.
pub fn write_gguf(path: &Path, metadata: &[(&str, MetaValue)], tensors: &[GgufTensor]) -> Result<()> {
    let header = header(path, metadata, tensors)?;
    atomic_write_with(path, |file| {
        let mut out = BufWriter::with_capacity(1 << 20, file);
        let io = |e| Error::io(path, e);
        out.write_all(&header).map_err(io)?;
        for tensor in tensors {
            let (bytes, size) = ((tensor.bytes)().map_err(|reason| tensor.wrong(reason))?, tensor.size()?);
            if bytes.len() != size {
                let (given, shape, dtype) = (bytes.len(), &tensor.shape, tensor.dtype);
                return Err(tensor.wrong(format!("{given} bytes for shape {shape:?} of {dtype}, which takes {size}")));
            }
            out.write_all(&bytes).map_err(io)?;
            out.write_all(&[0; ALIGNMENT][..padding(size)]).map_err(io)?;
        }
        out.flush().map_err(io)
    })
}

fn padding(size: usize) -> usize {
    size.next_multiple_of(ALIGNMENT) - size
}

fn header(path: &Path, metadata: &[(&str, MetaValue)], tensors: &[GgufTensor]) -> Result<Vec<u8>> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    let mut keys = HashSet::new();
    for (key, value) in metadata {
        let wrong = |reason: String| Error::key(path, key, reason);
        if !keys.insert(key) {
            return Err(wrong("is there twice".into()));
        }
        if key.is_empty() || key.len() > MAX_KEY {
            return Err(wrong(format!("a key has 1 to {MAX_KEY} bytes")));
        }
        if *key == "general.alignment" && *value != MetaValue::U32(ALIGNMENT as u32) {
            return Err(wrong(format!("tensors are aligned to {ALIGNMENT} bytes; leave the key out")));
        }
        push_text(&mut out, key);
        out.extend(value.kind().number().to_le_bytes());
        value.push(&mut out, 0).map_err(wrong)?;
    }
    let (mut names, mut offset) = (HashSet::new(), 0u64);
    for tensor in tensors {
        if !names.insert(&tensor.name) {
            return Err(tensor.wrong("is there twice".into()));
        }
        let size = tensor.size()?;
        let number =
            number_of(tensor.dtype).ok_or_else(|| tensor.wrong(format!("GGUF has no type {}", tensor.dtype)))?;
        push_text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        out.extend(tensor.shape.iter().rev().flat_map(|&d| (d as u64).to_le_bytes()));
        out.extend(number.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += (size + padding(size)) as u64;
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    Ok(out)
}

/// Length and bytes of a text.
pub(super) fn push_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
