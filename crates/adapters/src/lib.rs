//! Adapters: LoRA, rsLoRA and DoRA as factories around a model's factory. No model knows them.
//!
//! For: training a few small matrices beside a frozen model, loading and writing them as PEFT directories, merging them.
//! Not for: the training loop (`tallow-train`), reading the base model (`tallow-models`).
//!
//! [`LoraConfig`] says what is wanted, [`AdapterPlan`] what that means for one model, and [`AdapterPlan::build`] puts it
//! around the model's own `build`:
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use tallow_adapters::{AdapterFill, AdapterPlan, LoraConfig};
//! use tallow_nn::{Build, ForwardContext, Linear, ParamStore, RandomInit, Role, StoreOptions, plan_params};
//!
//! fn model(b: &Build) -> tallow_nn::Result<Linear> {
//!     b.at("mlp").linear("up_proj", Role::MlpIn, 4, 8, false)
//! }
//! let (_, base) = plan_params(model)?;
//! let config = LoraConfig { rank: 2, ..LoraConfig::default() };
//! let plan = AdapterPlan::new(&config, &base)?;
//! let (_, specs) = plan_params(|b| plan.build(b, model))?;
//! assert_eq!(specs.len(), 3);
//!
//! let random = RandomInit { seed: 1 };
//! let options = StoreOptions { trainable: &|spec| plan.is_trained(spec), ..StoreOptions::frozen(DType::F32, Device::Cpu) };
//! let fill = AdapterFill::new(&random, &plan, &specs, None, DType::F32, random)?;
//! let store = ParamStore::new(specs.clone(), &options, &fill)?;
//! assert_eq!(store.trained().count(), 2);
//! let up_proj = store.build(|b| plan.build(b, model))?;
//! let y = up_proj.forward(&Tensor::ones((1, 1, 4), DType::F32, &Device::Cpu)?, &ForwardContext::causal(1, 1)?)?;
//! assert_eq!(y.dims(), &[1, 1, 8]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod config;
mod error;
mod factory;
mod fill;
mod layer;
mod merge;
mod peft;
mod plan;
mod save;
mod set;
mod start;
mod tokens;

pub use config::{LoraConfig, LoraInit, Targets};
pub use error::{Error, Result};
pub use factory::AdapterFactory;
pub use fill::AdapterFill;
pub use merge::merge_into;
pub use peft::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_PREFIX, PeftAdapter};
pub use plan::{Adapted, AdapterPlan};
pub use save::{SavedAdapter, write_peft};
pub use set::{AdapterSet, NamedAdapter};
pub use tokens::TOKEN_ROWS;
