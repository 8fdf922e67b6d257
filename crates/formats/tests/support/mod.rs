//! Files made by hand, so that a test can say any lie in them.
#![allow(dead_code, reason = "each test takes what it needs")]

pub mod gguf;

use std::path::{Path, PathBuf};

use tallow_formats::TensorSource;

/// A temporary folder and files in it.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        // Some file systems wait for the disk when a file is cut to nothing and written anew.
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// Names in the folder, hidden ones too.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path()).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// A safetensors file of this header and these bytes.
pub fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Reads everything that a source offers; what cannot be read as f32 may be an error, never a panic.
pub fn read_all(source: &dyn TensorSource) {
    for name in source.names() {
        let info = source.info(name).unwrap();
        assert_eq!(source.bytes(name).unwrap().len(), info.dtype.bytes(info.num_elements()).unwrap());
        let mut out = vec![0f32; info.num_elements()];
        let _ = source.read_f32(name, &mut out);
    }
}

/// The values of a tensor.
pub fn values(source: &dyn TensorSource, name: &str) -> Vec<f32> {
    let mut out = vec![0f32; source.info(name).unwrap().num_elements()];
    source.read_f32(name, &mut out).unwrap();
    out
}

/// Asserts that a message says all of these.
pub fn assert_says(case: &str, message: &str, fragments: &[&str]) {
    for fragment in fragments {
        assert!(message.contains(fragment), "{case}: {message:?} does not say {fragment:?}");
    }
}
