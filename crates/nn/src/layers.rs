//! Linear, embedding and normalisation layers over the ops.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::Tensor;
use tallow_ops::{Weight, embedding, layer_norm, linear, rms_norm};

use crate::Result;

/// What stands behind a [`Linear`]: a plain matrix, or whatever a factory wrapper put there.
pub trait Projection: Debug + Send + Sync {
    /// `x [.., in] -> [.., out]`, in the dtype of `x`.
    ///
    /// # Errors
    /// If the shapes or dtypes do not fit.
    fn forward(&self, x: &Tensor) -> Result<Tensor>;

    /// The plain matrix `[out, in]`, where there is one.
    fn weight(&self) -> Option<&Weight>;
}

/// A projection `y = x W^T + b`.
#[derive(Clone, Debug)]
pub struct Linear(Arc<dyn Projection>);

impl Linear {
    /// Wraps a projection.
    pub fn new(projection: impl Projection + 'static) -> Self {
        Self(Arc::new(projection))
    }

    /// `x [.., in] -> [.., out]`.
    ///
    /// # Errors
    /// If the shapes or dtypes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward(x)
    }

    /// The plain matrix `[out, in]`, where there is one.
    pub fn weight(&self) -> Option<&Weight> {
        self.0.weight()
    }
}

#[derive(Debug)]
pub(crate) struct Plain {
    pub(crate) weight: Weight,
    pub(crate) bias: Option<Weight>,
}

impl Projection for Plain {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(linear(x, &self.weight, self.bias.as_ref())?)
    }

    fn weight(&self) -> Option<&Weight> {
        Some(&self.weight)
    }
}

/// A table of vectors, looked up by id.
#[derive(Clone, Debug)]
pub struct Embedding {
    weight: Weight,
}

impl Embedding {
    /// Over `weight [num, dim]`.
    pub fn new(weight: Weight) -> Self {
        Self { weight }
    }

    /// `ids [..] u32 -> [.., dim]`.
    ///
    /// # Errors
    /// If an id is not below `num`.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(embedding(ids, &self.weight)?)
    }

    /// The table `[num, dim]` (a tied head uses the same weight).
    pub fn weight(&self) -> &Weight {
        &self.weight
    }
}

/// A normalisation over the last dimension, of either kind.
#[derive(Clone, Debug)]
pub enum Norm {
    /// Root mean square.
    Rms(RmsNorm),
    /// Mean and variance, with bias.
    Layer(LayerNorm),
}

impl Norm {
    /// `x [.., dim] -> [.., dim]`.
    ///
    /// # Errors
    /// If the shapes or dtypes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Norm::Rms(norm) => norm.forward(x),
            Norm::Layer(norm) => norm.forward(x),
        }
    }
}

/// `y = x / sqrt(mean(x^2) + eps) * g` (Zhang and Sennrich 2019), arithmetic in f32.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Weight,
    eps: f64,
}

impl RmsNorm {
    /// Over the gain `weight [dim]`.
    pub fn new(weight: Weight, eps: f64) -> Self {
        Self { weight, eps }
    }

    /// `x [.., dim] -> [.., dim]`.
    ///
    /// # Errors
    /// If the shapes or dtypes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(rms_norm(x, &self.weight, self.eps)?)
    }
}

/// `y = (x - mean) / sqrt(var + eps) * g + b` (Ba et al. 2016), arithmetic in f32.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Weight,
    bias: Weight,
    eps: f64,
}

impl LayerNorm {
    /// Over gain and bias `[dim]`.
    pub fn new(weight: Weight, bias: Weight, eps: f64) -> Self {
        Self { weight, bias, eps }
    }

    /// `x [.., dim] -> [.., dim]`.
    ///
    /// # Errors
    /// If the shapes or dtypes do not fit.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(layer_norm(x, &self.weight, Some(&self.bias), self.eps)?)
    }
}
