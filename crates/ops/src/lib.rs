//! Every fused op of Tallow as a candle custom op **with a backward**, over `tallow-kernels`.
//!
//! For: training and inference code that wants fused, threaded ops whose gradients are never cut in silence.
//! Not for: layers with names and shapes from a checkpoint (see `tallow-nn`).
//!
//! Weights enter an op as a [`Weight`]: frozen (no gradient is computed for it at all), trainable (its gradient is
//! accumulated in f32 straight into a slice of a flat bucket), or an ordinary tracked candle tensor (its gradient goes
//! on candle's tape). Beside each op stands a composed-candle implementation in [`reference`](mod@reference), which is
//! what the op corpus compares with and what runs on backends without a kernel.
#![forbid(unsafe_code)]

mod activation;
mod attention;
mod autograd;
mod dropout;
mod elementwise;
mod norm;
mod operand;
pub mod reference;
mod rope;
mod weight;

pub use activation::{Gelu, gelu, relu, silu, swiglu};
pub use attention::{KeyRanges, attention};
pub use autograd::{backward_from, grad_enabled, no_grad};
pub use dropout::{DropoutKey, dropout};
pub use elementwise::residual_add;
pub use norm::{layer_norm, rms_norm};
pub use rope::{RopeLayout, RopeTable, rope};
pub use weight::Weight;
