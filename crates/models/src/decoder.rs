//! [`Decoder`]: embed, blocks, head. Whoever walks it owns the order.

use candle_core::Tensor;
use tallow_nn::{ForwardContext, Head, Result};
use tallow_ops::{CrossEntropy, CrossEntropyOptions, Targets, linear_cross_entropy, reshape};

use crate::Shape;

/// A decoder as a row of stages. Shapes: b batch, t time, c channels, v vocabulary.
///
/// The trainer walks the stages forward and backward itself, which is what makes activation checkpointing, sharding,
/// pipelines and offload one mechanism. Nothing here keeps state between calls.
pub trait Decoder: Send + Sync {
    /// Its sizes.
    fn shape(&self) -> &Shape;

    /// `ids [b, t] u32 -> [b, t, c]`.
    ///
    /// # Errors
    /// If an id is outside the vocabulary or a position outside the model's.
    fn embed(&self, ids: &Tensor, cx: &mut ForwardContext) -> Result<Tensor>;

    /// Block `index`: `[b, t, c] -> [b, t, c]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    fn block(&self, index: usize, x: &Tensor, cx: &mut ForwardContext) -> Result<Tensor>;

    /// The normalisation before the head, `[.., c] -> [.., c]`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    fn final_norm(&self, x: &Tensor) -> Result<Tensor>;

    /// The head, a matrix `[v, c]`.
    fn head(&self) -> &Head;

    /// Everything before the head's matrix: `ids [b, t] -> [b, t, c]`, normalised.
    ///
    /// # Errors
    /// As the stages.
    fn hidden(&self, ids: &Tensor, cx: &mut ForwardContext) -> Result<Tensor> {
        let mut x = self.embed(ids, cx)?;
        for index in 0..self.shape().num_layers {
            x = self.block(index, &x, cx)?;
        }
        if let Some(cache) = cx.cache.as_deref_mut() {
            cache.advance(ids.dim(1)?);
        }
        self.final_norm(&x)
    }

    /// `ids [b, t] -> logits [b, t, v]`, in the compute dtype. For generation take [`hidden`](Self::hidden) and the
    /// rows that are needed: the logits of a long prompt are large.
    ///
    /// # Errors
    /// As the stages.
    fn logits(&self, ids: &Tensor, cx: &mut ForwardContext) -> Result<Tensor> {
        let x = self.hidden(ids, cx)?;
        self.head().table(cx.adapters.as_deref())?.logits(&x)
    }

    /// The last stage of training: final norm, head and cross-entropy, `x [b, t, c]`, ids of targets `[b, t] u32`; `adapters` are
    /// [`ForwardContext::adapters`].
    ///
    /// # Errors
    /// If the shapes do not fit or a target is outside the vocabulary.
    fn loss(
        &self,
        x: &Tensor,
        targets: Targets,
        options: &CrossEntropyOptions,
        adapters: Option<&[f32]>,
    ) -> Result<CrossEntropy> {
        let (b, t, c) = x.dims3()?;
        let Targets { ids, weights } = targets;
        if ids.dims() != [b, t] {
            Err(candle_core::Error::msg(format!("targets {:?} do not match x {:?}", ids.dims(), x.dims())))?;
        }
        let x = reshape(&self.final_norm(x)?, (b * t, c))?;
        let targets = Targets { ids: &ids.flatten_all()?, weights };
        Ok(linear_cross_entropy(&x, self.head().table(adapters)?.table(), targets, options)?)
    }
}

/// Refuses positions past what the model has, which would read beyond its tables.
pub(crate) fn check_positions(cx: &ForwardContext, shape: &Shape) -> Result<()> {
    match cx.positions.iter().max() {
        Some(&max) if max as usize >= shape.max_positions => Err(tallow_nn::Error::Context {
            requested: max as usize + 1,
            limit: shape.max_positions,
            what: "the model's max_position_embeddings",
        }),
        Some(_) => Ok(()),
        None => Err(candle_core::Error::msg("a forward pass needs at least one token").into()),
    }
}
