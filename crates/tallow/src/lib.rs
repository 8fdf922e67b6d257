//! Tallow, an LLM framework on candle: the facade that other projects import.
//!
//! Every room of the house under one name, and [`open`](mod@open) for the commonest need: a model with its tokenizer. The
//! feature `hub`, off by default, adds models by their id at the Hugging Face hub.
//!
//! ```no_run
//! use tallow::engine::{GenerateOptions, generate};
//!
//! let model = tallow::open::open("runs/quickstart/final", tallow::open::Dtype::F32)?;
//! let prompt = model.tokenizer()?.encode("The state of the union", true)?;
//! let options = GenerateOptions { max_tokens: 20, ..Default::default() };
//! let out = generate(model.decoder(), model.device(), &prompt, &options, &mut |_| true)?;
//! println!("{}", model.tokenizer()?.decode(&out.ids, true)?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

pub use tallow_adapters as adapters;
pub use tallow_data as data;
pub use tallow_engine as engine;
pub use tallow_eval as eval;
pub use tallow_formats as formats;
pub use tallow_kernels as kernels;
pub use tallow_models as models;
pub use tallow_nn as nn;
pub use tallow_ops as ops;
pub use tallow_sampler as sampler;
pub use tallow_tokenizer as tokenizer;
pub use tallow_train as train;

/// The example of the front page compiles.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
pub struct Readme;

pub mod convert;
pub mod gguf_adapter;
#[cfg(feature = "hub")]
pub mod hub;
pub mod merge;
pub mod open;
