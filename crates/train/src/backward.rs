//! Forward and backward over the stages of a decoder, block by block.
//!
//! Each block is differentiated on its own: its input is detached, its output is kept (or dropped and recomputed, which
//! is activation checkpointing), and the gradient of its output is handed to a vector-Jacobian product whose result is
//! the gradient of its input. Weight gradients land in the flat buckets as each block's backward runs, so a collective
//! or an optimizer step can follow a block at once.

use candle_core::{Tensor, Var, bail};
use tallow_models::Decoder;
use tallow_nn::{ForwardContext, Result};
use tallow_ops::{CrossEntropyOptions, backward_from, no_grad};

/// What is kept of a block's forward for its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActivationCheckpointing {
    /// Everything: the fastest.
    #[default]
    None,
    /// Only each block's input; the block runs again in the backward. One more forward, memory of one block.
    Blocks,
}

/// The sums of a micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSums {
    /// Sum of the negative log-likelihoods of all targets, in nats.
    pub nll: f64,
    /// Number of targets.
    pub targets: usize,
}

impl LossSums {
    /// Mean negative log-likelihood, in nats a target.
    pub fn mean(&self) -> f64 {
        self.nll / self.targets as f64
    }
}

impl std::ops::AddAssign for LossSums {
    fn add_assign(&mut self, other: Self) {
        self.nll += other.nll;
        self.targets += other.targets;
    }
}

/// A block's input, as the leaf that its backward ends on, and its output unless that is to be recomputed.
struct Kept {
    input: Var,
    output: Option<Tensor>,
}

/// Runs `ids [b, t]` against `targets [b, t]` and adds every trainable parameter's gradient of
/// `options.scale * sum of nll` to its bucket.
///
/// # Errors
/// If shapes do not fit, an id is out of range, or a block's input gets no gradient.
pub fn forward_backward(
    model: &dyn Decoder,
    ids: &Tensor,
    targets: &Tensor,
    cx: &mut ForwardContext,
    options: &CrossEntropyOptions,
    checkpointing: ActivationCheckpointing,
) -> Result<LossSums> {
    let embedded = model.embed(ids, cx)?;
    let mut blocks: Vec<Kept> = Vec::with_capacity(model.shape().num_layers);
    let mut x = embedded.detach();
    for index in 0..model.shape().num_layers {
        let input = Var::from_tensor(&x)?;
        let output = match checkpointing {
            ActivationCheckpointing::None => Some(model.block(index, &input, cx)?),
            ActivationCheckpointing::Blocks => None,
        };
        x = match &output {
            Some(y) => y.detach(),
            None => no_grad(|| model.block(index, &x, cx))?,
        };
        blocks.push(Kept { input, output });
    }

    let input = Var::from_tensor(&x)?;
    drop(x);
    let head = model.loss(&input, targets, options)?;
    let sums = LossSums { nll: head.nll_sum, targets: head.num_targets };
    let mut dy = input_gradient(head.loss.backward()?, &input, "head")?;
    drop((head, input));

    while let Some(Kept { input, output }) = blocks.pop() {
        let index = blocks.len();
        let y = match output {
            Some(y) => y,
            None => model.block(index, &input, cx)?,
        };
        dy = input_gradient(backward_from(&y, &dy)?, &input, "block")?;
    }
    if embedded.track_op() {
        backward_from(&embedded, &dy)?;
    }
    Ok(sums)
}

fn input_gradient(mut grads: candle_core::backprop::GradStore, input: &Var, stage: &str) -> Result<Tensor> {
    match grads.remove(input.as_tensor()) {
        Some(dx) => Ok(dx.detach()),
        None => Ok(no_gradient(stage)?),
    }
}

fn no_gradient(stage: &str) -> candle_core::Result<Tensor> {
    bail!("the input of a {stage} got no gradient: an op in it cuts the tape")
}

/// The sums of `ids` against `targets` without a gradient.
///
/// # Errors
/// If shapes do not fit or an id is out of range.
pub fn evaluate(model: &dyn Decoder, ids: &Tensor, targets: &Tensor, cx: &mut ForwardContext) -> Result<LossSums> {
    no_grad(|| {
        let mut x = model.embed(ids, cx)?;
        for index in 0..model.shape().num_layers {
            x = model.block(index, &x, cx)?;
        }
        let loss = model.loss(&x, targets, &CrossEntropyOptions::default())?;
        Ok(LossSums { nll: loss.nll_sum, targets: loss.num_targets })
    })
}
