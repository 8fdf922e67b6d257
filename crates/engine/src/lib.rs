//! Generation and scoring with a decoder: token ids in, token ids out.
//!
//! For: continuing a row of ids with a [`Sampler`](tallow_sampler::Sampler) over a KV cache, and the log-probabilities
//! of given ids in bounded memory. Not for: text (see `tallow-tokenizer`) or many requests at once.
//!
//! ```
//! use candle_core::{DType, Device};
//! use tallow_engine::{FinishReason, GenerateOptions, generate};
//! use tallow_models::parse_config;
//! use tallow_nn::{ParamStore, RandomInit, StoreOptions, plan_params};
//!
//! let config = parse_config(&serde_json::json!({
//!     "architectures": ["LlamaForCausalLM"], "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12,
//!     "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16,
//! }))?.config;
//! let (_, specs) = plan_params(|b| config.build(b))?;
//! let store = ParamStore::new(specs, &StoreOptions::frozen(DType::F32, Device::Cpu), &RandomInit { seed: 0 })?;
//! let model = store.build(|b| config.build(b))?;
//! let options = GenerateOptions { max_tokens: 3, ..Default::default() };
//! let out = generate(model.as_ref(), &Device::Cpu, &[1, 2], &options, &mut |_| true)?;
//! assert_eq!((out.ids.len(), out.finish_reason), (3, FinishReason::Length));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod error;
mod generate;
mod score;

pub use error::{Error, Result};
pub use generate::{FinishReason, GenerateOptions, Generation, generate};
pub use score::{Score, score};
