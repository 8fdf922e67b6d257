//! Model families: configuration, blocks and file names, and a registry keyed by Hugging Face `architectures`.
//!
//! For: turning a `config.json`, a preset or a GGUF header into a [`Decoder`] that trains and generates.
//! Not for: layers (`tallow-nn`), files as such (`tallow-formats`), the training loop (`tallow-train`).
//!
//! A family is one short file: its configuration with Hugging Face's keys, its block, and what its tensors are called.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use tallow_models::{Decoder, parse_config};
//! use tallow_nn::{ForwardContext, ParamStore, RandomInit, StoreOptions, plan_params};
//!
//! let config = parse_config(&serde_json::json!({
//!     "architectures": ["LlamaForCausalLM"], "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12,
//!     "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16,
//! }))?.config;
//! let (_, specs) = plan_params(|b| config.build(b))?;
//! let store = ParamStore::new(specs, &StoreOptions::frozen(DType::F32, Device::Cpu), &RandomInit { seed: 0 })?;
//! let model = store.build(|b| config.build(b))?;
//! let ids = Tensor::new(&[[1u32, 2, 3]], &Device::Cpu)?;
//! let logits = model.logits(&ids, &mut ForwardContext::causal(1, 3)?)?;
//! assert_eq!(logits.dims(), &[1, 3, 11]);
//! # Ok::<(), tallow_models::Error>(())
//! ```
#![forbid(unsafe_code)]

mod checkpoint;
mod config;
mod decoder;
mod error;
mod families;
pub mod gguf;
mod preset;
mod quantize;
mod registry;
mod save;

pub use checkpoint::Checkpoint;
pub use config::{EosTokenId, ModelConfig, ParsedConfig, Shape};
pub use decoder::Decoder;
pub use error::{Error, Result};
pub use families::gpt2::Gpt2Config;
pub use families::llama::LlamaConfig;
pub use preset::{Preset, preset_names};
pub use quantize::{Quantization, QuantizeConfig, QuantizedBase};
pub use registry::{Family, families, parse_config, parse_config_strict};
pub use save::save_model;
