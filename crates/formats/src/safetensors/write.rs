//! Writing safetensors.

use std::collections::HashSet;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Value, json};

use super::{INDEX, SHARD_BYTES, WEIGHTS};
use crate::atomic::atomic_write_with;
use crate::{Error, Result, write_json};

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

    /// Its size in the file.
    fn bytes(&self) -> Result<usize> {
        let elements = self.shape.iter().try_fold(4usize, |n, &d| n.checked_mul(d));
        elements.ok_or_else(|| self.wrong(format!("shape {:?} is more than a computer can hold", self.shape)))
    }

    fn wrong(&self, reason: String) -> Error {
        Error::Values { tensor: self.name.clone(), reason }
    }
}

/// Writes tensors, in this order, as one file at `path`, one tensor in memory at a time. The file appears whole or not
/// at all.
///
/// # Errors
/// If the system refuses, a name is there twice or is no tensor's, or values cannot be had; `path` is as it was then.
pub fn write_safetensors(path: &Path, tensors: Vec<TensorData>, metadata: &[(&str, &str)]) -> Result<()> {
    check_names(&tensors)?;
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), metadata.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect());
    }
    let mut offset = 0;
    for tensor in &tensors {
        let end = offset + tensor.bytes()?;
        let entry = json!({ "dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end] });
        header.insert(tensor.name.clone(), entry);
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    // Spaces behind the header align the data, as the format asks.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    atomic_write_with(path, |file| {
        let mut out = BufWriter::with_capacity(1 << 20, file);
        let io = |e| Error::io(path, e);
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
        out.write_all(header.as_bytes()).map_err(io)?;
        for tensor in &tensors {
            let values = (tensor.values)().map_err(|reason| tensor.wrong(reason))?;
            if values.len() * 4 != tensor.bytes()? {
                return Err(tensor.wrong(format!("{} values for shape {:?}", values.len(), tensor.shape)));
            }
            for chunk in values.chunks(1 << 16) {
                let bytes: Vec<u8> = chunk.iter().flat_map(|x| x.to_le_bytes()).collect();
                out.write_all(&bytes).map_err(io)?;
            }
        }
        out.flush().map_err(io)
    })
}

fn check_names(tensors: &[TensorData]) -> Result<()> {
    let mut seen = HashSet::new();
    for tensor in tensors {
        if tensor.name == "__metadata__" {
            return Err(tensor.wrong("the format keeps this name for itself".into()));
        }
        if !seen.insert(&tensor.name) {
            return Err(tensor.wrong("is there twice".into()));
        }
    }
    Ok(())
}

/// Writes a model's tensors into `dir`: `model.safetensors`, or numbered files and their index past [`SHARD_BYTES`].
///
/// # Errors
/// As [`write_safetensors`].
pub fn write_sharded(dir: &Path, tensors: Vec<TensorData>, metadata: &[(&str, &str)]) -> Result<()> {
    write_sharded_by(dir, tensors, metadata, SHARD_BYTES)
}

/// [`write_sharded`] past another limit. A tensor of more than `limit` bytes gets a file of its own.
///
/// # Errors
/// As [`write_safetensors`].
pub fn write_sharded_by(dir: &Path, tensors: Vec<TensorData>, metadata: &[(&str, &str)], limit: usize) -> Result<()> {
    check_names(&tensors)?;
    let (mut shards, mut held, mut total): (Vec<Vec<TensorData>>, _, _) = (vec![], 0, 0);
    for tensor in tensors {
        let bytes = tensor.bytes()?;
        total += bytes;
        match shards.last_mut() {
            Some(shard) if held + bytes <= limit => {
                held += bytes;
                shard.push(tensor);
            }
            _ => {
                held = bytes;
                shards.push(vec![tensor]);
            }
        }
    }
    if shards.len() <= 1 {
        return write_safetensors(&dir.join(WEIGHTS), shards.into_iter().flatten().collect(), metadata);
    }
    let (count, mut weight_map) = (shards.len(), serde_json::Map::new());
    for (i, shard) in shards.into_iter().enumerate() {
        let name = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), json!(name))));
        write_safetensors(&dir.join(&name), shard, metadata)?;
    }
    write_json(&dir.join(INDEX), &json!({ "metadata": { "total_size": total }, "weight_map": weight_map }))
}
