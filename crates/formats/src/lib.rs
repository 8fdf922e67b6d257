//! Model files: safetensors (sharded), GGUF, Hugging Face directories. Knows no model.
#![deny(unsafe_code)]

mod atomic;
mod dtype;
mod error;
pub mod gguf;
pub mod hf;
mod locate;
pub mod safetensors;
mod source;

pub use atomic::{AtomicDir, atomic_write, sha256_file, write_json};
pub use dtype::DType;
pub use error::{Error, Result};
pub use locate::{ModelLocation, is_hub_id, resolve_model};
pub use source::{TensorInfo, TensorSource};
