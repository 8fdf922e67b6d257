//! Every fused op composed of candle's own differentiable ops: what the op corpus compares with, and what runs where
//! there is no kernel. Slow and memory-hungry, and clear.

mod activation;
mod attention;
mod linear;
mod norm;
mod rope;

pub use activation::{activation, swiglu};
pub use attention::attention;
pub use linear::{embedding, linear, linear_cross_entropy, lora_linear, scale_outputs};
pub use norm::{layer_norm, rms_norm};
pub use rope::rope;
