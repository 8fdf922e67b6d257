//! Forward and backward over the stages of a decoder, block by block.
//!
//! Each block is recorded on a tape of its own; its output is kept (or dropped and recomputed, which is activation
//! checkpointing), and the gradient of its output goes through that tape and comes out as the gradient of its input.
//! Weight gradients land in the flat buckets as each block's backward runs, so a collective or an optimizer step can
//! follow a block at once.

use candle_core::{Tensor, bail};
use tallow_models::Decoder;
use tallow_nn::{ForwardContext, Result};
use tallow_ops::trace::stage;
use tallow_ops::{CrossEntropyOptions, Tape, no_grad, record};

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

/// What a block's backward begins with.
enum Kept {
    /// Its output and how it came about.
    Recorded(Tensor, Tape),
    /// Its input, to run it again.
    Input(Tensor),
}

/// Runs `ids [b, t]` against `targets [b, t]` and adds every trainable parameter's gradient of
/// `options.scale * sum of nll` to its bucket.
///
/// # Errors
/// If shapes do not fit, an id is out of range, or something in a stage cuts the gradient.
pub fn forward_backward(
    model: &dyn Decoder,
    ids: &Tensor,
    targets: &Tensor,
    cx: &mut ForwardContext,
    options: &CrossEntropyOptions,
    checkpointing: ActivationCheckpointing,
) -> Result<LossSums> {
    let span = stage(false, || "embedding".into());
    let (embedded, embedding) = record(&[], || model.embed(ids, cx))?;
    drop(span);
    let mut blocks: Vec<Kept> = Vec::with_capacity(model.shape().num_layers);
    let mut x = embedded.clone();
    for index in 0..model.shape().num_layers {
        let _span = stage(false, || format!("block {index}").into());
        match checkpointing {
            ActivationCheckpointing::None => {
                let (y, tape) = record(&[&x], || model.block(index, &x, cx))?;
                x = y.clone();
                blocks.push(Kept::Recorded(y, tape));
            }
            ActivationCheckpointing::Blocks => {
                let y = no_grad(|| model.block(index, &x, cx))?;
                blocks.push(Kept::Input(std::mem::replace(&mut x, y)));
            }
        }
    }

    let span = stage(false, || "head".into());
    let (head, tape) = record(&[&x], || model.loss(&x, targets, options))?;
    let sums = LossSums { nll: head.nll_sum, targets: head.num_targets };
    drop((x, span));
    let span = stage(true, || "head".into());
    let one = head.loss.ones_like()?;
    let mut dy = input_gradient(tape, head.loss, one)?;
    drop(span);

    while let Some(kept) = blocks.pop() {
        let index = blocks.len();
        let _span = stage(true, || format!("block {index}").into());
        let (y, tape) = match kept {
            Kept::Recorded(y, tape) => (y, tape),
            Kept::Input(x) => record(&[&x], || model.block(index, &x, cx))?,
        };
        dy = input_gradient(tape, y, dy)?;
    }
    if !embedding.is_empty() {
        let _span = stage(true, || "embedding".into());
        embedding.backward(embedded, dy)?;
    }
    Ok(sums)
}

fn input_gradient(tape: Tape, y: Tensor, dy: Tensor) -> candle_core::Result<Tensor> {
    match tape.backward(y, dy)?.pop() {
        Some(dx) => Ok(dx),
        None => bail!("a stage was recorded without an input"),
    }
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
