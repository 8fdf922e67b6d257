//! Safetensors files, single and sharded.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use serde_json::{Value, json};

use crate::{DType, Error, Result, TensorInfo, TensorSource, write_json};

/// The weights of a model in one file.
pub const WEIGHTS: &str = "model.safetensors";
/// The index of a model in several files.
pub const INDEX: &str = "model.safetensors.index.json";
/// A model past this many bytes is written in several files, as Hugging Face does.
pub const SHARD_BYTES: usize = 5_000_000_000;

/// A mapped safetensors file.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    names: Vec<String>,
    entries: HashMap<String, (TensorInfo, std::ops::Range<usize>)>,
}

impl SafetensorsFile {
    /// Maps a file and checks its header: offsets, overlaps, sizes.
    ///
    /// # Errors
    /// If it cannot be read or is malformed.
    pub fn open(path: &Path) -> Result<Self> {
        let map = crate::source_map(path)?;
        let (header_len, metadata) =
            SafeTensors::read_metadata(&map).map_err(|e| Error::malformed(path, format!("no safetensors: {e}")))?;
        let data_start = 8 + header_len;
        let (names, entries) = index(path, &metadata, data_start, map.len())?;
        Ok(Self { path: path.to_path_buf(), map, names, entries })
    }
}

type Entries = HashMap<String, (TensorInfo, std::ops::Range<usize>)>;

fn index(path: &Path, metadata: &Metadata, data_start: usize, len: usize) -> Result<(Vec<String>, Entries)> {
    let mut tensors: Vec<_> = metadata.tensors().into_iter().collect();
    tensors.sort_by(|a, b| a.1.data_offsets.cmp(&b.1.data_offsets).then_with(|| a.0.cmp(&b.0)));
    let mut entries = HashMap::new();
    for (name, info) in &tensors {
        let dtype = dtype_of(info.dtype)
            .ok_or_else(|| Error::tensor(path, name, format!("dtype {:?} is not supported", info.dtype)))?;
        let elements = info.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let (start, end) = info.data_offsets;
        let bytes = elements.and_then(|n| dtype.bytes(n));
        let last = data_start.checked_add(end).filter(|&last| last <= len);
        match (bytes, last) {
            (Some(bytes), Some(_)) if end >= start && end - start == bytes => {}
            _ => return Err(Error::tensor(path, name, "its bytes are not where and as many as its header says")),
        }
        let info = TensorInfo { name: name.clone(), dtype, shape: info.shape.clone() };
        entries.insert(name.clone(), (info, data_start + start..data_start + end));
    }
    Ok((tensors.into_iter().map(|(name, _)| name).collect(), entries))
}

fn dtype_of(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        Dtype::I32 => DType::I32,
        Dtype::I16 => DType::I16,
        Dtype::I8 => DType::I8,
        Dtype::U32 => DType::U32,
        Dtype::U8 => DType::U8,
        Dtype::BOOL => DType::Bool,
        _ => return None,
    })
}

impl TensorSource for SafetensorsFile {
    fn names(&self) -> Vec<&str> {
        self.names.iter().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.entries.get(name).map(|(info, _)| info)
    }

    fn bytes(&self, name: &str) -> Result<&[u8]> {
        match self.entries.get(name) {
            Some((_, range)) => Ok(&self.map[range.clone()]),
            None => Err(Error::tensor(&self.path, name, "there is no such tensor")),
        }
    }

    fn path_of(&self, _: &str) -> &Path {
        &self.path
    }
}

/// The safetensors files that an index lists.
#[derive(Debug)]
pub struct ShardedSafetensors {
    index: PathBuf,
    shards: Vec<SafetensorsFile>,
    /// Name to shard.
    place: BTreeMap<String, usize>,
}

impl ShardedSafetensors {
    /// Opens every file that the index at `path` lists, and checks that each tensor is where it says.
    ///
    /// # Errors
    /// If a file is missing or malformed, or lacks a tensor that the index promises.
    pub fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let value: Value = serde_json::from_str(&text).map_err(|e| Error::malformed(path, e.to_string()))?;
        let map = value.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| Error::key(path, "weight_map", "is missing or no object"))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let (mut shards, mut known, mut place) = (vec![], HashMap::new(), BTreeMap::new());
        for (tensor, file) in map {
            let file = file.as_str().filter(|f| !f.contains(['/', '\\']) && *f != "..");
            let file = file.ok_or_else(|| Error::tensor(path, tensor, "its file is not a plain file name"))?;
            let shard = match known.get(file) {
                Some(&shard) => shard,
                None => {
                    shards.push(SafetensorsFile::open(&folder.join(file))?);
                    known.insert(file.to_owned(), shards.len() - 1);
                    shards.len() - 1
                }
            };
            if shards[shard].info(tensor).is_none() {
                return Err(Error::tensor(&folder.join(file), tensor, format!("is not there, but {INDEX} says so")));
            }
            place.insert(tensor.clone(), shard);
        }
        Ok(Self { index: path.to_path_buf(), shards, place })
    }
}

impl TensorSource for ShardedSafetensors {
    fn names(&self) -> Vec<&str> {
        self.place.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.place.get(name).and_then(|&shard| self.shards[shard].info(name))
    }

    fn bytes(&self, name: &str) -> Result<&[u8]> {
        match self.place.get(name) {
            Some(&shard) => self.shards[shard].bytes(name),
            None => Err(Error::tensor(&self.index, name, "there is no such tensor")),
        }
    }

    fn path_of(&self, name: &str) -> &Path {
        self.place.get(name).map_or(&self.index, |&shard| &self.shards[shard].path)
    }
}

type Values<'a> = Box<dyn Fn() -> Result<Vec<f32>, String> + 'a>;

/// An f32 tensor to write, its values made when they are needed.
pub struct TensorData<'a> {
    name: String,
    shape: Vec<usize>,
    values: Values<'a>,
}

impl<'a> TensorData<'a> {
    /// A tensor whose values, in row-major order, `values` makes.
    pub fn from_fn<E: std::fmt::Display>(
        name: String,
        shape: Vec<usize>,
        values: impl Fn() -> std::result::Result<Vec<f32>, E> + 'a,
    ) -> Self {
        Self { name, shape, values: Box::new(move || values().map_err(|e| e.to_string())) }
    }

    fn bytes(&self) -> usize {
        4 * self.shape.iter().product::<usize>()
    }
}

/// Writes tensors, in this order, as one file at `path`, one tensor in memory at a time. Not atomic by itself: write into
/// an [`AtomicDir`](crate::AtomicDir).
///
/// # Errors
/// If the system refuses or values cannot be had.
pub fn write_safetensors(path: &Path, tensors: Vec<TensorData>, metadata: &[(&str, &str)]) -> Result<()> {
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), metadata.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect());
    }
    let mut offset = 0;
    for tensor in &tensors {
        let end = offset + tensor.bytes();
        let entry = json!({ "dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end] });
        if header.insert(tensor.name.clone(), entry).is_some() {
            return Err(Error::tensor(path, &tensor.name, "is written twice"));
        }
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let file = File::create(path).map_err(|e| Error::io(path, e))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(|e| Error::io(path, e));
    put(&(header.len() as u64).to_le_bytes())?;
    put(header.as_bytes())?;
    for tensor in &tensors {
        let wrong = |reason| Error::Values { tensor: tensor.name.clone(), reason };
        let values = (tensor.values)().map_err(wrong)?;
        if values.len() * 4 != tensor.bytes() {
            return Err(wrong(format!("{} values for shape {:?}", values.len(), tensor.shape)));
        }
        for chunk in values.chunks(1 << 16) {
            let bytes: Vec<u8> = chunk.iter().flat_map(|x| x.to_le_bytes()).collect();
            put(&bytes)?;
        }
    }
    let file = out.into_inner().map_err(|e| Error::io(path, e.into_error()))?;
    file.sync_all().map_err(|e| Error::io(path, e))
}

/// Writes a model's tensors into `dir`: `model.safetensors`, or numbered files and their index past [`SHARD_BYTES`].
///
/// # Errors
/// As [`write_safetensors`].
pub fn write_sharded(dir: &Path, tensors: Vec<TensorData>, metadata: &[(&str, &str)]) -> Result<()> {
    write_sharded_by(dir, tensors, metadata, SHARD_BYTES)
}

fn write_sharded_by(dir: &Path, tensors: Vec<TensorData>, metadata: &[(&str, &str)], limit: usize) -> Result<()> {
    let total: usize = tensors.iter().map(TensorData::bytes).sum();
    if total <= limit {
        return write_safetensors(&dir.join(WEIGHTS), tensors, metadata);
    }
    let mut shards: Vec<Vec<TensorData>> = vec![];
    let mut held = limit;
    for tensor in tensors {
        if held + tensor.bytes() > limit || shards.is_empty() {
            shards.push(vec![]);
            held = 0;
        }
        held += tensor.bytes();
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    let (count, mut weight_map) = (shards.len(), serde_json::Map::new());
    for (i, shard) in shards.into_iter().enumerate() {
        let name = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), json!(name))));
        write_safetensors(&dir.join(&name), shard, metadata)?;
    }
    write_json(&dir.join(INDEX), &json!({ "metadata": { "total_size": total }, "weight_map": weight_map }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, values: Vec<f32>) -> TensorData<'static> {
        TensorData::from_fn(name.into(), vec![values.len()], move || Ok::<_, String>(values.clone()))
    }

    #[test]
    fn shards_and_one_file_hold_the_same() -> Result<()> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let tensors = || vec![tensor("b", vec![1., 2., 3.]), tensor("a", vec![4., 5.])];
        write_sharded_by(dir.path(), tensors(), &[], 12)?;
        let sharded = ShardedSafetensors::open(&dir.path().join(INDEX))?;
        assert_eq!(sharded.names(), ["a", "b"]);
        write_sharded(dir.path(), tensors(), &[("format", "pt")])?;
        let single = SafetensorsFile::open(&dir.path().join(WEIGHTS))?;
        assert_eq!(single.names(), ["b", "a"]);
        for source in [&sharded as &dyn TensorSource, &single] {
            let mut out = [0f32; 3];
            source.read_f32("b", &mut out)?;
            assert_eq!(out, [1., 2., 3.]);
            assert!(source.read_f32("b", &mut out[..2]).is_err());
        }
        Ok(())
    }

    #[test]
    fn every_truncation_is_an_error() -> Result<()> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("x.safetensors");
        write_safetensors(&path, vec![tensor("a", vec![1.; 8])], &[])?;
        let whole = std::fs::read(&path).expect("readable");
        for len in 0..whole.len() {
            std::fs::write(&path, &whole[..len]).expect("writable");
            assert!(SafetensorsFile::open(&path).is_err(), "{len} bytes");
        }
        Ok(())
    }
}
