//! Linear, embedding and normalisation layers over the ops.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use tallow_ops::{ReplacedRows, Table, Weight, composed_of, embedding, layer_norm, linear, rms_norm};

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

    /// The head that is tied to this table.
    fn tied_head(&self) -> Head {
        Head::Plain(self.weight().clone())
    }
}

/// A table of vectors, looked up by id.
#[derive(Clone, Debug)]
pub struct Embedding(Arc<dyn Lookup>);

impl Embedding {
    /// Over `weight [num, dim]`.
    pub fn new(weight: Weight) -> Self {
        Self::of(Whole(weight))
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

    /// The table `[num, dim]`, without an adapter.
    pub fn weight(&self) -> &Weight {
        self.0.weight()
    }

    /// The head that is tied to it: the same weight.
    pub fn tied_head(&self) -> Head {
        self.0.tied_head()
    }
}

#[derive(Debug)]
struct Whole(Weight);

impl Lookup for Whole {
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
    /// With other rows for some tokens.
    Replaced(Weight, ReplacedRows),
    /// Computed.
    Of(Arc<dyn HeadMatrix>),
}

/// The matrix `[v, c]` of a head as one pass sees it.
#[derive(Clone, Debug)]
pub struct HeadTable {
    weight: Weight,
    replaced: Option<ReplacedRows>,
}

impl HeadTable {
    /// For the ops of a head.
    pub fn table(&self) -> Table<'_> {
        Table { weight: &self.weight, replaced: self.replaced.as_ref() }
    }

    /// `x [.., c] -> [.., v]`, in the dtype of `x`: all logits, on the tape.
    ///
    /// # Errors
    /// If the shapes or dtypes do not fit.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let y = linear(x, &self.weight, None)?;
        let Some(replaced) = &self.replaced else { return Ok(y) };
        let theirs = linear(x, replaced.rows(), None)?;
        let (ids, last) = (Tensor::new(replaced.ids(), x.device())?, y.rank() - 1);
        Ok(composed_of("head-rows", &[&y, &theirs], |y| {
            // Taken away first: a difference of the two would be rounded to the larger.
            let old = y[0].contiguous()?.index_select(&ids, last)?.neg()?;
            y[0].index_add(&ids, &old, last)?.index_add(&ids, &y[1], last)
        })?)
    }
}

impl Head {
    /// Its dtype.
    pub fn dtype(&self) -> DType {
        match self {
            Head::Plain(weight) | Head::Replaced(weight, _) => weight.dtype(),
            Head::Of(matrix) => matrix.dtype(),
        }
    }

    /// The matrix `[v, c]` for a pass whose [`ForwardContext::adapters`] are these; on the tape, if one records and it has an
    /// adapter.
    ///
    /// # Errors
    /// If it cannot be computed.
    pub fn table(&self, adapters: Option<&[f32]>) -> Result<HeadTable> {
        Ok(match self {
            Head::Plain(weight) => HeadTable { weight: weight.clone(), replaced: None },
            Head::Replaced(weight, rows) => HeadTable { weight: weight.clone(), replaced: Some(rows.clone()) },
            Head::Of(matrix) => HeadTable { weight: matrix.weight(adapters)?, replaced: None },
        })
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
