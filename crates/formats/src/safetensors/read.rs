//! [`SafetensorsFile`].

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::header::Header;
use crate::source::source_map;
use crate::{Error, Result, TensorInfo, TensorSource};

/// A mapped safetensors file.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    metadata: BTreeMap<String, String>,
    names: Vec<String>,
    tensors: HashMap<String, (TensorInfo, Range<usize>)>,
}

impl SafetensorsFile {
    /// Maps a file and checks its header: sizes, offsets, overlaps and gaps, names that are there twice. What it takes
    /// in memory is bounded by the header, which is bounded by the file and by 100 MB.
    ///
    /// # Errors
    /// If it cannot be read or is malformed, naming the file and the tensor.
    pub fn open(path: &Path) -> Result<Self> {
        let map = source_map(path)?;
        let header = Header::read(path, &map)?;
        let names = header.tensors.iter().map(|(info, _)| info.name.clone()).collect();
        let tensors = header.tensors.into_iter().map(|(info, range)| (info.name.clone(), (info, range))).collect();
        Ok(Self { path: path.to_path_buf(), map, metadata: header.metadata, names, tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file says of itself (`__metadata__`).
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

impl TensorSource for SafetensorsFile {
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
