//! Linear, embedding and normalisation layers over the ops.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use tallow_ops::{Weight, embedding, layer_norm, linear, rms_norm};

use crate::{ForwardContext, Result};

/// What stands behind a [`Linear`]: a plain matrix, or whatever a factory wrapper put there.
pub trait Projection: Debug + Send + Sync {
    /// `x [.., in] -> [.., out]`, in the dtype of `x`.
    ///
    /// # Errors
    /// If the shapes or dtypes do not fit.
    fn forward(&self, x: &Tensor, cx: &ForwardContext) -> Result<Tensor>;

    /// The plain matrix `[out, in]`, where there is nothing else.
    fn weight(&self) -> Option<&Weight>;

    /// The bias `[out]`, where there is one.
    fn bias(&self) -> Option<&Weight>;
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
    pub fn forward(&self, x: &Tensor, cx: &ForwardContext) -> Result<Tensor> {
        self.0.forward(x, cx)
    }

    /// The plain matrix `[out, in]`, where there is nothing else.
    pub fn weight(&self) -> Option<&Weight> {
        self.0.weight()
    }

    /// The bias `[out]`, where there is one.
    pub fn bias(&self) -> Option<&Weight> {
        self.0.bias()
    }
}

#[derive(Debug)]
pub(crate) struct Plain {
    pub(crate) weight: Weight,
    pub(crate) bias: Option<Weight>,
}

impl Projection for Plain {
    fn forward(&self, x: &Tensor, _: &ForwardContext) -> Result<Tensor> {
        Ok(linear(x, &self.weight, self.bias.as_ref())?)
    }

    fn weight(&self) -> Option<&Weight> {
        Some(&self.weight)
    }

    fn bias(&self) -> Option<&Weight> {
        self.bias.as_ref()
    }
}

/// What stands behind an [`Embedding`].
pub trait Lookup: Debug + Send + Sync {
    /// `ids [..] u32 -> [.., dim]`.
    ///
    /// # Errors
    /// If an id is not below the number of rows.
    fn forward(&self, ids: &Tensor, cx: &ForwardContext) -> Result<Tensor>;

    /// The table `[num, dim]`, without what a wrapper adds.
    fn weight(&self) -> &Weight;
}

/// A table of vectors, looked up by id.
#[derive(Clone, Debug)]
pub struct Embedding(Arc<dyn Lookup>);

impl Embedding {
    /// Over `weight [num, dim]`.
    pub fn new(weight: Weight) -> Self {
        Self::of(Table(weight))
    }

    /// Wraps a lookup.
    pub fn of(lookup: impl Lookup + 'static) -> Self {
        Self(Arc::new(lookup))
    }

    /// `ids [..] u32 -> [.., dim]`.
    ///
    /// # Errors
    /// If an id is not below `num`.
    pub fn forward(&self, ids: &Tensor, cx: &ForwardContext) -> Result<Tensor> {
        self.0.forward(ids, cx)
    }

    /// The table `[num, dim]` (a tied head uses the same weight), without an adapter.
    pub fn weight(&self) -> &Weight {
        self.0.weight()
    }
}

#[derive(Debug)]
struct Table(Weight);

impl Lookup for Table {
    fn forward(&self, ids: &Tensor, _: &ForwardContext) -> Result<Tensor> {
        Ok(embedding(ids, &self.0)?)
    }

    fn weight(&self) -> &Weight {
        &self.0
    }
}

/// What stands behind a [`Head`] that is more than a matrix.
pub trait HeadMatrix: Debug + Send + Sync {
    /// The matrix `[v, c]` as a pass sees it whose [`ForwardContext::adapters`] are these.
    ///
    /// # Errors
    /// If it cannot be computed.
    fn weight(&self, adapters: Option<&[f32]>) -> Result<Weight>;

    /// Its dtype, without computing it.
    fn dtype(&self) -> DType;
}

/// A language-model head: the matrix `[v, c]` that gives logits.
#[derive(Clone, Debug)]
pub enum Head {
    /// As it is; the embedding's own where they are tied.
    Plain(Weight),
    /// Computed.
    Of(Arc<dyn HeadMatrix>),
}

impl Head {
    /// The matrix `[v, c]`; on the tape, if one records and it has an adapter.
    ///
    /// # Errors
    /// If it cannot be computed.
    pub fn weight(&self) -> Result<Weight> {
        self.weight_with(None)
    }

    /// As [`weight`](Self::weight), for a pass whose [`ForwardContext::adapters`] are these.
    ///
    /// # Errors
    /// If it cannot be computed.
    pub fn weight_with(&self, adapters: Option<&[f32]>) -> Result<Weight> {
        match self {
            Head::Plain(weight) => Ok(weight.clone()),
            Head::Of(matrix) => matrix.weight(adapters),
        }
    }

    /// The dtype of its matrix, which is not computed for it.
    pub fn dtype(&self) -> DType {
        match self {
            Head::Plain(weight) => weight.dtype(),
            Head::Of(matrix) => matrix.dtype(),
        }
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
