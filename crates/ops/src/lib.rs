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

mod autograd;
mod weight;

pub use autograd::{backward_from, grad_enabled, no_grad};
pub use weight::Weight;
