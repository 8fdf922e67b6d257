//! [`GgufFile`].

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::header::Header;
use super::{GgufValue, TokenizerFields, tokenizer};
use crate::source::source_map;
use crate::{Error, Result, TensorInfo, TensorSource};

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
    /// Maps a file and checks its header: counts, types, names and keys that are there twice, the place of every tensor.
    /// What it takes in memory is bounded by 256 MiB, whatever the header says.
    ///
    /// # Errors
    /// If it cannot be read, is no GGUF of version 2 or 3, or is malformed; or holds a tensor type that is not supported.
    /// The file and the key or tensor are named.
    pub fn open(path: &Path) -> Result<Self> {
        let map = source_map(path)?;
        let header = Header::read(&map).map_err(|wrong| wrong.in_file(path))?;
        let names = header.tensors.iter().map(|(info, _)| info.name.clone()).collect();
        let tensors = header.tensors.into_iter().map(|(info, range)| (info.name.clone(), (info, range))).collect();
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

    fn opt<'a, T>(&'a self, key: &str, what: &str, read: impl Fn(&'a GgufValue) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(Error::key(&self.path, key, format!("is {}, not {what}", value.kind()))),
        }
    }

    fn need<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| Error::key(&self.path, key, "is missing; convert the model anew"))
    }

    /// A non-negative integer, if the key is there.
    ///
    /// # Errors
    /// If the key is of another type.
    pub fn opt_u64(&self, key: &str) -> Result<Option<u64>> {
        self.opt(key, "a non-negative integer", GgufValue::as_u64)
    }

    /// A finite float, if the key is there.
    ///
    /// # Errors
    /// If the key is of another type, or its value infinite or not a number.
    pub fn opt_f32(&self, key: &str) -> Result<Option<f32>> {
        match self.opt(key, "a float", GgufValue::as_f32)? {
            Some(x) if !x.is_finite() => Err(Error::key(&self.path, key, format!("is {x}, which is no finite number"))),
            value => Ok(value),
        }
    }

    /// A boolean, if the key is there.
    ///
    /// # Errors
    /// If the key is of another type.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>> {
        self.opt(key, "a boolean", GgufValue::as_bool)
    }

    /// Text, if the key is there.
    ///
    /// # Errors
    /// If the key is of another type.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        self.opt(key, "a string", GgufValue::as_str)
    }

    /// An array, if the key is there.
    ///
    /// # Errors
    /// If the key is of another type.
    pub fn opt_array(&self, key: &str) -> Result<Option<&[GgufValue]>> {
        self.opt(key, "an array", GgufValue::as_array)
    }

    /// A non-negative integer.
    ///
    /// # Errors
    /// If the key is missing or of another type.
    pub fn get_u64(&self, key: &str) -> Result<u64> {
        self.need(key, self.opt_u64(key)?)
    }

    /// A finite float.
    ///
    /// # Errors
    /// If the key is missing or of another type, or its value infinite or not a number.
    pub fn get_f32(&self, key: &str) -> Result<f32> {
        self.need(key, self.opt_f32(key)?)
    }

    /// Text.
    ///
    /// # Errors
    /// If the key is missing or of another type.
    pub fn get_str(&self, key: &str) -> Result<&str> {
        self.need(key, self.opt_str(key)?)
    }

    /// An array.
    ///
    /// # Errors
    /// If the key is missing or of another type.
    pub fn get_array(&self, key: &str) -> Result<&[GgufValue]> {
        self.need(key, self.opt_array(key)?)
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
