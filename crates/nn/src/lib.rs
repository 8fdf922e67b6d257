//! Layers and the seams around them: [`LayerFactory`], [`Role`], [`ParamStore`], [`KvCache`].
//!
//! For: writing a model family once, so that training, inference, adapters, sharding and quantization all use the same
//! definition. Not for: files (see `tallow-formats`), whole models (see `tallow-models`).
//!
//! A model *asks* for its layers and never loads: it says `b.linear("q_proj", Role::Qkv, d_in, d_out, bias)?` to a
//! [`Build`], and whatever factory stands behind it decides what that is: a description only ([`plan_params`]), a slice
//! of a flat bucket ([`ParamStore`]), later a shard, a quantized matrix or a matrix with an adapter.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use tallow_nn::{Build, ForwardContext, Linear, ParamStore, RandomInit, Role, StoreOptions, plan_params};
//!
//! fn model(b: &Build) -> tallow_nn::Result<Linear> {
//!     b.at("mlp").linear("up_proj", Role::MlpIn, 4, 8, false)
//! }
//! let (_, specs) = plan_params(model)?;
//! let store = ParamStore::new(specs, &StoreOptions::trainable(DType::F32, Device::Cpu), &RandomInit { seed: 1 })?;
//! let up_proj = store.build(model)?;
//! let x = Tensor::ones((1, 2, 4), DType::F32, &Device::Cpu)?;
//! let y = up_proj.forward(&x, &ForwardContext::causal(1, 2)?)?;
//! assert_eq!(y.dims(), &[1, 2, 8]);
//! # Ok::<(), tallow_nn::Error>(())
//! ```
#![forbid(unsafe_code)]

mod attention;
mod cache;
mod context;
mod error;
mod factory;
mod layers;
mod mlp;
mod packed;
mod param;
mod rope;
mod store;

pub use attention::{Attention, AttentionConfig};
pub use cache::{ContiguousCache, KvCache};
pub use context::{DropoutContext, ForwardContext, site};
pub use error::{Error, Result};
pub use factory::{Build, LayerFactory, LinearSpec, plan_params};
pub use layers::{Embedding, Head, HeadMatrix, HeadTable, LayerNorm, Linear, Lookup, Norm, Projection, RmsNorm};
pub use mlp::{Activation, GatedMlp, Mlp};
pub use packed::GgmlMatrix;
pub use param::{Init, ParamSpec, Role};
pub use rope::{RopeConfig, RopeScaling};
pub use store::{Bucket, Fill, Pack, PackedParam, Param, ParamStore, RandomInit, StoreOptions};
