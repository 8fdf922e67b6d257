//! Safetensors files, single and sharded.

mod header;
mod read;
mod sharded;
mod write;

pub use read::SafetensorsFile;
pub use sharded::ShardedSafetensors;
pub use write::{TensorData, write_safetensors, write_sharded, write_sharded_by};

/// The weights of a model in one file.
pub const WEIGHTS: &str = "model.safetensors";
/// The index of a model in several files.
pub const INDEX: &str = "model.safetensors.index.json";
/// A model past this many bytes is written in several files, as Hugging Face does.
pub const SHARD_BYTES: usize = 5_000_000_000;
