//! One file a family.

pub mod gpt2;
pub mod llama;
