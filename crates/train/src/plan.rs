//! Memory, FLOPs and time of a run, before anything runs.

use serde::Serialize;
use tallow_models::ModelConfig;
use tallow_nn::ParamSpec;

use crate::backward::ActivationCheckpointing;
use crate::config::TrainDtype;

/// Program, thread stacks and tables, bytes.
const FIXED: u64 = 24 << 20;

/// What a micro-batch is made of.
#[derive(Clone, Copy, Debug)]
pub struct StepShape {
    /// Rows at once.
    pub micro_batch_size: usize,
    /// Tokens a row.
    pub context_length: usize,
    /// Dtype of compute.
    pub dtype: TrainDtype,
    /// What is kept for the backward.
    pub checkpointing: ActivationCheckpointing,
}

/// Bytes of a training process on one rank, by what they hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// f32 master weights, and the bf16 copy in mixed precision.
    pub weights: u64,
    /// f32 gradient buckets.
    pub gradients: u64,
    /// The two f32 moments.
    pub optimizer: u64,
    /// What the blocks keep for the backward.
    pub activations: u64,
    /// Short-lived tensors at the worst moment: a block's gradients, or the head's.
    pub transient: u64,
    /// Program, stacks, tables.
    pub fixed: u64,
}

impl MemoryPlan {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.activations + self.transient + self.fixed
    }

    /// For `config` with parameters `specs`, all trained.
    pub fn new(config: &dyn ModelConfig, specs: &[ParamSpec], step: StepShape) -> Self {
        let shape = config.shape();
        let params: u64 = specs.iter().map(|s| s.num_elements() as u64).sum();
        let tokens = (step.micro_batch_size * step.context_length) as u64;
        let element = match step.dtype {
            TrainDtype::F32 => 4,
            TrainDtype::Bf16 => 2,
        };
        let block = config.block_activations() as u64 * tokens * element;
        let input = shape.hidden_size as u64 * tokens * element;
        let kept = match step.checkpointing {
            ActivationCheckpointing::None => shape.num_layers as u64 * block,
            ActivationCheckpointing::Blocks => shape.num_layers as u64 * input + block,
        };
        // In a block's backward at most: gradients of the three feed-forward tensors and of the residual stream.
        let in_block = (3 * shape.intermediate_size + 4 * shape.hidden_size) as u64 * tokens * element;
        let in_head = tallow_ops::cross_entropy_workspace(
            tokens as usize,
            shape.hidden_size,
            shape.vocab_size,
            step.dtype.into(),
        ) as u64
            + 3 * input;
        Self {
            weights: params * if step.dtype == TrainDtype::Bf16 { 6 } else { 4 },
            gradients: params * 4,
            optimizer: params * 8,
            activations: kept + input,
            transient: in_block.max(in_head),
            fixed: FIXED,
        }
    }
}

/// The largest divisor of `batch_size` whose plan fits in `budget` bytes; 1 if none does.
pub fn fitting_micro_batch(
    config: &dyn ModelConfig,
    specs: &[ParamSpec],
    batch_size: usize,
    mut step: StepShape,
    budget: u64,
) -> usize {
    let divisors = (1..=batch_size).rev().filter(|d| batch_size.is_multiple_of(*d));
    divisors
        .into_iter()
        .find(|&rows| {
            step.micro_batch_size = rows;
            MemoryPlan::new(config, specs, step).total() <= budget
        })
        .unwrap_or(1)
}
