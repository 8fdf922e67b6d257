//! GGUF files: versions 2 and 3 are read, 3 is written.

pub(crate) mod dequantize;
mod file;
mod header;
mod meta;
mod read;
mod tokenizer;
mod types;
mod value;
mod write;

pub use dequantize::{dequantize_blocks, quantize_q8_0};
pub use file::GgufFile;
pub use meta::{MetaType, MetaValue};
pub use tokenizer::TokenizerFields;
pub use types::GgmlType;
pub use value::GgufValue;
pub use write::{GgufTensor, write_gguf};
