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
use tallow_ops::{CrossEntropyOptions, Tape, Targets, constant, no_grad, record};

use crate::neftune;

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
    /// Sum of the negative log-likelihoods of all targets, each times its weight, in nats.
    pub nll: f64,
    /// Sum of the weights of the targets.
    pub weight: f64,
    /// Number of targets.
    pub targets: usize,
}

impl LossSums {
    /// Mean negative log-likelihood, in nats a target, by their weights.
    pub fn mean(&self) -> f64 {
        self.nll / self.weight
    }
}

impl std::ops::AddAssign for LossSums {
    fn add_assign(&mut self, other: Self) {
        self.nll += other.nll;
        self.weight += other.weight;
        self.targets += other.targets;
    }
}

/// How a micro-batch is run.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepOptions {
    /// What is kept for the backward.
    pub checkpointing: ActivationCheckpointing,
    /// The first stage with a trained parameter (0 embedding, `1 + i` block `i`): nothing below it is kept or
    /// differentiated.
    pub first_stage: usize,
    /// Size of the noise on the embeddings (NEFTune, Jain et al. 2023); 0 for none.
    pub neftune_alpha: f64,
}

/// What a block's backward begins with.
enum Kept {
    /// Its output and how it came about.
    Recorded(Tensor, Tape),
    /// Nothing: no parameter in it or below it is trained.
    Nothing,
    /// Its input, to run it again.
    Input(Tensor),
}

/// Runs `ids [b, t]` against targets, ids `[b, t]`, and adds every trainable parameter's gradient of
/// `options.scale * sum of weight * nll` to its bucket.
///
/// # Errors
/// If shapes do not fit, an id is out of range, or something in a stage cuts the gradient.
pub fn forward_backward(
    model: &dyn Decoder,
    ids: &Tensor,
    targets: Targets,
    cx: &mut ForwardContext,
    options: &CrossEntropyOptions,
    step: StepOptions,
) -> Result<LossSums> {
    let span = stage(false, || "embedding".into());
    let (embedded, embedding) = record(&[], || neftune::add_noise(model.embed(ids, cx)?, cx, step.neftune_alpha))?;
    drop(span);
    let mut blocks: Vec<Kept> = Vec::with_capacity(model.shape().num_layers);
    let mut x = embedded.clone();
    for index in 0..model.shape().num_layers {
        let _span = stage(false, || format!("block {index}").into());
        match step.checkpointing {
            _ if index + 1 < step.first_stage => {
                x = no_grad(|| model.block(index, &x, cx))?;
                blocks.push(Kept::Nothing);
            }
            ActivationCheckpointing::None if index + 1 == step.first_stage => {
                let (y, tape) = record(&[], || model.block(index, &constant(&x)?, cx))?;
                x = y.clone();
                blocks.push(Kept::Recorded(y, tape));
            }
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
    let blocks_train = step.first_stage <= model.shape().num_layers;
    let inputs: &[&Tensor] = if blocks_train { &[&x] } else { &[] };
    let (head, tape) = record(inputs, || match blocks_train {
        true => model.loss(&x, targets, options, cx.adapters.as_deref()),
        false => model.loss(&constant(&x)?, targets, options, cx.adapters.as_deref()),
    })?;
    let sums = LossSums { nll: head.nll_sum, weight: head.weight_sum, targets: head.num_targets };
    drop((x, span));
    let span = stage(true, || "head".into());
    let one = head.loss.ones_like()?;
    let mut dy = tape.backward(head.loss, one)?.pop();
    drop(span);

    while let Some(kept) = blocks.pop() {
        let index = blocks.len();
        let _span = stage(true, || format!("block {index}").into());
        let (y, tape) = match kept {
            Kept::Nothing => break,
            Kept::Recorded(y, tape) => (y, tape),
            Kept::Input(x) if index + 1 == step.first_stage => record(&[], || model.block(index, &constant(&x)?, cx))?,
            Kept::Input(x) => record(&[&x], || model.block(index, &x, cx))?,
        };
        dy = tape.backward(y, expected(dy.take())?)?.pop();
    }
    if !embedding.is_empty() {
        let _span = stage(true, || "embedding".into());
        embedding.backward(embedded, expected(dy)?)?;
    }
    Ok(sums)
}

/// The gradient that the stage above left.
fn expected(dy: Option<Tensor>) -> candle_core::Result<Tensor> {
    match dy {
        Some(dy) => Ok(dy),
        None => bail!("a stage was recorded without an input, but the one below it is trained"),
    }
}

/// The sums of `ids` against `targets` without a gradient.
///
/// # Errors
/// If shapes do not fit or an id is out of range.
pub fn evaluate(model: &dyn Decoder, ids: &Tensor, targets: Targets, cx: &mut ForwardContext) -> Result<LossSums> {
    no_grad(|| {
        let mut x = model.embed(ids, cx)?;
        for index in 0..model.shape().num_layers {
            x = model.block(index, &x, cx)?;
        }
        let loss = model.loss(&x, targets, &CrossEntropyOptions::default(), cx.adapters.as_deref())?;
        Ok(LossSums { nll: loss.nll_sum, weight: loss.weight_sum, targets: loss.num_targets })
    })
}
