//! Feed-forward layers.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use tallow_ops::{Gelu, gelu, relu, silu, swiglu};

use crate::{ForwardContext, Linear, Result};

/// The activation of an ungated feed-forward layer, by its Hugging Face name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// `x * Phi(x)`, exact.
    #[serde(rename = "gelu")]
    Gelu,
    /// The tanh approximation of GELU.
    #[serde(rename = "gelu_new", alias = "gelu_pytorch_tanh")]
    GeluNew,
    /// `max(x, 0)`.
    #[serde(rename = "relu")]
    Relu,
    /// `x * sigmoid(x)`.
    #[serde(rename = "silu", alias = "swish")]
    Silu,
}

impl Activation {
    /// Applies it elementwise.
    ///
    /// # Errors
    /// If the dtype is neither f32 nor bf16.
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Activation::Gelu => gelu(x, Gelu::Exact)?,
            Activation::GeluNew => gelu(x, Gelu::Tanh)?,
            Activation::Relu => relu(x)?,
            Activation::Silu => silu(x)?,
        })
    }
}

/// `down(silu(gate(x)) * up(x))` (SwiGLU, Shazeer 2020).
#[derive(Clone, Debug)]
pub struct GatedMlp {
    /// `gate_proj [ffn, hidden]`.
    pub gate_proj: Linear,
    /// `up_proj [ffn, hidden]`.
    pub up_proj: Linear,
    /// `down_proj [hidden, ffn]`.
    pub down_proj: Linear,
}

impl GatedMlp {
    /// `x [.., hidden] -> [.., hidden]`.
    ///
    /// # Errors
    /// If the shapes or dtypes do not fit.
    pub fn forward(&self, x: &Tensor, cx: &ForwardContext) -> Result<Tensor> {
        let h = swiglu(&self.gate_proj.forward(x, cx)?, &self.up_proj.forward(x, cx)?)?;
        self.down_proj.forward(&h, cx)
    }
}

/// `down(act(up(x)))`.
#[derive(Clone, Debug)]
pub struct Mlp {
    /// `[ffn, hidden]`.
    pub up: Linear,
    /// `[hidden, ffn]`.
    pub down: Linear,
    /// Between the two.
    pub activation: Activation,
}

impl Mlp {
    /// `x [.., hidden] -> [.., hidden]`.
    ///
    /// # Errors
    /// If the shapes or dtypes do not fit.
    pub fn forward(&self, x: &Tensor, cx: &ForwardContext) -> Result<Tensor> {
        self.down.forward(&self.activation.forward(&self.up.forward(x, cx)?)?, cx)
    }
}
