//! GGUF files, versions 2 and 3.

pub(crate) mod dequantize;
mod file;
mod header;
mod read;
mod tokenizer;
mod types;
mod value;

pub use dequantize::{dequantize_blocks, quantize_q8_0};
pub use file::GgufFile;
pub use tokenizer::TokenizerFields;
pub use types::GgmlType;
pub use value::GgufValue;
