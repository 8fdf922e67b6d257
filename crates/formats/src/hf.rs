//! Hugging Face model directories.

use std::path::{Path, PathBuf};

use serde_json::Value;

pub use crate::atomic::{AtomicDir, sha256_file};
use crate::safetensors::{INDEX, SafetensorsFile, ShardedSafetensors, WEIGHTS};
use crate::{Error, Result, TensorSource};

/// The most bytes of a `config.json`.
const MAX_CONFIG: u64 = 16 << 20;

/// A directory with `config.json` and safetensors.
#[derive(Debug)]
pub struct ModelDir {
    path: PathBuf,
    config: Value,
}

impl ModelDir {
    /// Opens a directory and reads its `config.json`.
    ///
    /// # Errors
    /// If the directory or its configuration is missing or malformed.
    pub fn open(path: &Path) -> Result<Self> {
        let config_path = path.join("config.json");
        let size = match std::fs::metadata(&config_path) {
            Ok(meta) => meta.len(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::missing(path, "config.json", &found(path)));
            }
            Err(e) => return Err(Error::io(&config_path, e)),
        };
        if size > MAX_CONFIG {
            return Err(Error::malformed(&config_path, format!("{size} bytes are too many for a configuration")));
        }
        let text = std::fs::read_to_string(&config_path).map_err(|e| Error::io(&config_path, e))?;
        let config: Value = serde_json::from_str(&text).map_err(|e| Error::malformed(&config_path, e.to_string()))?;
        if !config.is_object() {
            return Err(Error::malformed(&config_path, "is not a JSON object"));
        }
        Ok(Self { path: path.to_path_buf(), config })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
    ///
    /// # Errors
    /// If there are no weights, or they are malformed.
    pub fn open_weights(&self) -> Result<Box<dyn TensorSource>> {
        let (single, index) = (self.path.join(WEIGHTS), self.path.join(INDEX));
        if index.is_file() {
            Ok(Box::new(ShardedSafetensors::open(&index)?))
        } else if single.is_file() {
            Ok(Box::new(SafetensorsFile::open(&single)?))
        } else {
            Err(Error::missing(&self.path, WEIGHTS, &found(&self.path)))
        }
    }
}

/// What a directory holds instead, and the way out.
fn found(path: &Path) -> String {
    let Ok(entries) = std::fs::read_dir(path) else {
        return "the folder cannot be read".into();
    };
    let mut names: Vec<String> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    if names.iter().any(|n| n == "pytorch_model.bin") {
        return "there is pytorch_model.bin, which is not read; convert it with transformers' save_pretrained".into();
    }
    match names.iter().find(|n| n.ends_with(".gguf")) {
        Some(gguf) => format!("there is {gguf}: give that file"),
        None if names.is_empty() => "the folder is empty".into(),
        None => {
            let shown = names.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", ");
            format!("the folder holds {shown}")
        }
    }
}
