//! The header of a safetensors file, from untrusted bytes.
//!
//! Read here rather than by the `safetensors` crate because that one lets the last of two tensors of one name win, takes
//! many times the header's size in memory while it reads, and cannot say which tensor is wrong. The tests hold the two
//! against each other.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Error as _, MapAccess, Visitor};

use crate::{DType, Error, Result, TensorInfo};

/// Bytes of the header's length.
const LENGTH: usize = 8;
/// The most bytes of a header, as in the reference implementation.
const MAX_HEADER: u64 = 100_000_000;
/// The most dimensions of a tensor.
const MAX_DIMS: usize = 32;
const METADATA: &str = "__metadata__";

/// A header that has been checked against its file.
pub(super) struct Header {
    pub metadata: BTreeMap<String, String>,
    /// In the order of their bytes, with these bytes' place in the file.
    pub tensors: Vec<(TensorInfo, Range<usize>)>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// What has been read so far; on an error, `at` is the entry it is in.
#[derive(Default)]
struct Entries {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, Entry)>,
    at: Option<String>,
}

impl<'de> DeserializeSeed<'de> for &mut Entries {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Entries {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            self.at = Some(name.clone());
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom("is there twice"));
            }
            if name == METADATA {
                self.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
            } else {
                self.tensors.push((name, map.next_value()?));
            }
            self.at = None;
        }
        Ok(())
    }
}

impl Header {
    pub(super) fn read(path: &Path, bytes: &[u8]) -> Result<Self> {
        let len = bytes.len();
        let Some((length, rest)) = bytes.split_first_chunk::<LENGTH>() else {
            return Err(Error::malformed(path, format!("is no safetensors file: {len} bytes hold no header")));
        };
        let header_len = u64::from_le_bytes(*length);
        if header_len > MAX_HEADER {
            let reason = format!("is no safetensors file: a header of {header_len} bytes (at most {MAX_HEADER})");
            return Err(Error::malformed(path, reason));
        }
        let Some((header, data)) = rest.split_at_checked(header_len as usize) else {
            let reason =
                format!("its header of {header_len} bytes does not fit in {len}: it is cut off; fetch it again");
            return Err(Error::malformed(path, reason));
        };
        let entries = parse(path, header)?;
        let tensors = place(path, entries.tensors, len - data.len(), data.len())?;
        Ok(Self { metadata: entries.metadata, tensors })
    }
}

fn parse(path: &Path, header: &[u8]) -> Result<Entries> {
    let mut entries = Entries::default();
    let mut json = serde_json::Deserializer::from_slice(header);
    let read = (&mut entries).deserialize(&mut json).and_then(|()| json.end());
    match (read, entries.at.take()) {
        (Ok(()), _) => Ok(entries),
        (Err(e), Some(at)) if at == METADATA => Err(Error::key(path, METADATA, format!("in the header: {e}"))),
        (Err(e), Some(at)) => Err(Error::tensor(path, &at, format!("in the header: {e}"))),
        (Err(e), None) => Err(Error::malformed(path, format!("its header is not the JSON of a safetensors file: {e}"))),
    }
}

/// Checks that the tensors cover the `data_len` bytes from `data_start` on, each byte once.
fn place(
    path: &Path,
    mut entries: Vec<(String, Entry)>,
    data_start: usize,
    data_len: usize,
) -> Result<Vec<(TensorInfo, Range<usize>)>> {
    // By name last, so that empty tensors at one offset have an order that depends on the file only.
    entries.sort_by(|a, b| a.1.data_offsets.cmp(&b.1.data_offsets).then_with(|| a.0.cmp(&b.0)));
    let mut tensors: Vec<(TensorInfo, Range<usize>)> = Vec::with_capacity(entries.len());
    let mut covered = 0usize;
    for (name, entry) in entries {
        let (start, end) = entry.data_offsets;
        let (info, bytes) = info(name, &entry).map_err(|(name, reason)| Error::tensor(path, &name, reason))?;
        let wrong = |reason: String| Error::tensor(path, &info.name, reason);
        if start > end || end - start != bytes as u64 {
            let reason = format!(
                "data_offsets {start} to {end} are not the {bytes} bytes that {:?} of {} takes",
                info.shape, info.dtype
            );
            return Err(wrong(reason));
        }
        if end > data_len as u64 {
            let reason = format!("its bytes end at {end} but the file holds {data_len}: it is cut off; fetch it again");
            return Err(wrong(reason));
        }
        if start < covered as u64 {
            let other = tensors.last().map_or("", |(other, _)| &other.name);
            return Err(wrong(format!("its bytes overlap those of `{other}`")));
        }
        if start > covered as u64 {
            return Err(wrong(format!("bytes {covered} to {start} before it belong to no tensor")));
        }
        covered = end as usize;
        tensors.push((info, data_start + start as usize..data_start + covered));
    }
    if covered < data_len {
        let reason =
            format!("its last {} bytes belong to no tensor: it is damaged; fetch it again", data_len - covered);
        return Err(Error::malformed(path, reason));
    }
    Ok(tensors)
}

/// Dtype and shape of an entry, and the bytes they take.
fn info(name: String, entry: &Entry) -> Result<(TensorInfo, usize), (String, String)> {
    let Some(dtype) = DType::from_safetensors(&entry.dtype) else {
        let known = DType::SAFETENSORS.map(|(name, _)| name).join(", ");
        return Err((name, format!("dtype `{}` is not supported; supported are {known}", entry.dtype)));
    };
    if entry.shape.len() > MAX_DIMS {
        return Err((name, format!("has {} dimensions; at most {MAX_DIMS} are possible", entry.shape.len())));
    }
    let shape: Option<Vec<usize>> = entry.shape.iter().map(|&d| usize::try_from(d).ok()).collect();
    let elements = shape.as_ref().and_then(|shape| shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)));
    match (shape, elements.and_then(|n| dtype.bytes(n))) {
        (Some(shape), Some(bytes)) => Ok((TensorInfo { name, dtype, shape }, bytes)),
        _ => Err((name, format!("shape {:?} of {dtype} is more than a computer can hold", entry.shape))),
    }
}
