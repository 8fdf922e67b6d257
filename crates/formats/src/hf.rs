//! Hugging Face model directories.

use std::path::{Path, PathBuf};

use serde_json::Value;

pub use crate::atomic::{AtomicDir, sha256_file};
use crate::safetensors::{INDEX, SafetensorsFile, ShardedSafetensors, WEIGHTS};
use crate::source::read_capped;
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
        if !path.is_dir() {
            return Err(Error::missing(path, "the folder", "give a Hugging Face folder"));
        }
        if !config_path.exists() {
            return Err(Error::missing(path, "config.json", &found(path)));
        }
        let text = read_capped(&config_path, MAX_CONFIG, "a configuration")?;
        let config: Value =
            serde_json::from_slice(&text).map_err(|e| Error::malformed(&config_path, format!("is not JSON: {e}")))?;
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

    /// Opens `model.safetensors`, else the shards that `model.safetensors.index.json` lists: with both there, the single
    /// file counts, as in transformers.
    ///
    /// # Errors
    /// If there are no weights, or they are malformed.
    pub fn open_weights(&self) -> Result<Box<dyn TensorSource>> {
        let (single, index) = (self.path.join(WEIGHTS), self.path.join(INDEX));
        if single.exists() {
            Ok(Box::new(SafetensorsFile::open(&single)?))
        } else if index.exists() {
            Ok(Box::new(ShardedSafetensors::open(&index)?))
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
    let has = |name: &str| path.join(name).is_file();
    let as_adapter = "as --adapter where a command takes one";
    if has("adapter_config.json") {
        return format!("this is an adapter, no model: name the model that it was made for, and this {as_adapter}");
    }
    if has("final/adapter_config.json") {
        let adapter = path.join("final");
        return format!(
            "this is the folder of a run of an adapter: name the model that it was made for, and {} {as_adapter}",
            adapter.display()
        );
    }
    if has("final/config.json") {
        return format!("this is the folder of a run, whose model is {}/final: give that", path.display());
    }
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
