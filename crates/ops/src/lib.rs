//! Every fused op of Tallow **with a backward**, over `tallow-kernels`: on candle's tape, or on a [`Tape`] of its own.
//!
//! For: training and inference code that wants fused, threaded ops whose gradients are never cut in silence.
//! Not for: layers with names and shapes from a checkpoint (see `tallow-nn`).
//!
//! Weights enter an op as a [`Weight`]: frozen (no gradient is computed for it at all), trainable (its gradient is
//! accumulated in f32 straight into a slice of a flat bucket), or an ordinary tracked candle tensor (its gradient goes
//! on candle's tape). Beside each op stands a composed-candle implementation in [`reference`](mod@reference), which is
//! what the op corpus compares with and what runs on backends without a kernel.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use tallow_ops::{Weight, rms_norm};
//!
//! # fn main() -> candle_core::Result<()> {
//! let bucket = Tensor::zeros(3, DType::F32, &Device::Cpu)?;
//! let weight = Weight::trainable(Tensor::ones(3, DType::F32, &Device::Cpu)?, bucket.clone())?;
//! let x = Tensor::new(&[[2f32, 0.0, -2.0]], &Device::Cpu)?;
//! rms_norm(&x, &weight, 0.0)?.sum_all()?.backward()?;
//! // The gradient of the weight is in its slot: x / sqrt(8 / 3).
//! assert!((bucket.to_vec1::<f32>()?[0] - 2.0 / (8f32 / 3.0).sqrt()).abs() < 1e-6);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod activation;
mod attention;
mod autograd;
mod candle_tape;
mod cross_entropy;
mod dropout;
mod elementwise;
mod embedding;
mod four_bit;
mod gradients;
mod head_rows;
mod linear;
mod lora;
mod norm;
mod operand;
mod optimizer;
pub mod reference;
mod rope;
mod table;
mod tape;
pub mod trace;
mod weight;

pub use activation::{Gelu, gelu, relu, silu, swiglu};
pub use attention::{KeyRanges, attention};
pub use autograd::{backward_from, grad_enabled, no_grad};
pub use cross_entropy::{
    CrossEntropy, CrossEntropyOptions, IGNORE_INDEX, Targets, TopLogprobs, cross_entropy_workspace, head_logits,
    linear_cross_entropy, logprobs_top,
};
pub use dropout::{DropoutKey, dropout};
pub use elementwise::residual_add;
pub use embedding::embedding;
pub use four_bit::quantize_four_bit;
pub use linear::linear;
pub use lora::{LoraWeights, lora_linear, lora_linear_sum, merge_lora, merged_norms, merged_rows, scale_outputs};
pub use norm::{layer_norm, rms_norm};
pub use optimizer::{AdamWBuckets, AdamWParams, adamw_step, all_finite, cast_to_bf16, fill_zero, global_sq_norm};
pub use rope::{RopeLayout, RopeTable, rope};
pub use table::{ReplacedRows, Table};
pub use tallow_kernels::four_bit::{FourBit, FourBitError, Kind as FourBitKind};
pub use tallow_kernels::rng::{fill_normal, fill_uniform, stream_of};
pub use tape::{Tape, composed_of, constant, narrow, record, reshape};
pub use weight::{PackedMatrix, Weight};
