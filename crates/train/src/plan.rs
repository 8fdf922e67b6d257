//! Memory, FLOPs and time of a run, before anything runs.

use serde::Serialize;
use tallow_adapters::{Adapted, AdapterPlan, LoraInit};
use tallow_models::ModelConfig;
use tallow_nn::{Pack, ParamSpec, Role};

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
    /// Weights: f32 masters of what is trained, the bf16 copy in mixed precision, and what is frozen.
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
    /// What packing takes while the model is loaded, before there is anything but weights.
    pub loading: u64,
}

/// What is held of a model, apart from what a step needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Parameters that are trained.
    pub trained: u64,
    /// Parameters that are not, and are held as they are computed with.
    pub frozen: u64,
    /// Bytes of parameters that are not trained and are packed.
    pub packed: u64,
    /// Elements of the largest packed matrix, which is unpacked at the worst moment.
    pub unpacked: u64,
    /// Elements of the largest packed matrix, whose values are all there while it is packed.
    pub largest_packed: u64,
    /// Whether the loss reads the head packed: it is never unpacked whole.
    pub packed_head: bool,
    /// Elements that a token leaves behind in each block for adapters.
    pub adapter_activations: u64,
    /// Elements of the largest matrix that an adapter of the head makes anew, and its gradient.
    pub merged_head: u64,
    /// Bytes held besides while an adapter gets its first values: where its matrices start, a table that it has rows of.
    pub starting: u64,
}

impl Held {
    /// All of `specs` trained.
    pub fn trained(specs: &[ParamSpec]) -> Self {
        Self { trained: specs.iter().map(|s| s.num_elements() as u64).sum(), ..Self::default() }
    }

    /// An adapter of a model of `num_layers` blocks, whose frozen matrices `pack` packs; `specs` are those of the adapted model.
    ///
    /// # Errors
    /// If one cannot be packed as asked.
    pub fn adapted(
        plan: &AdapterPlan,
        specs: &[ParamSpec],
        num_layers: usize,
        pack: Option<&dyn Pack>,
    ) -> tallow_nn::Result<Self> {
        let tied = specs.iter().all(|s| s.role != Role::Head);
        let head_adapter =
            specs.iter().find(|s| s.role == Role::Head && plan.modules().any(|(m, _)| s.name == format!("{m}.weight")));
        let mut held = Self::default();
        let pack = pack.map(|pack| plan.pack(pack));
        for spec in specs {
            let elements = spec.num_elements() as u64;
            let bytes = pack.as_ref().map(|pack| pack.planned_bytes(spec)).transpose()?.flatten();
            match bytes {
                _ if plan.is_trained(spec) => held.trained += elements,
                None => held.frozen += elements,
                Some(bytes) => {
                    held.packed += bytes as u64;
                    held.largest_packed = held.largest_packed.max(elements);
                    // Of an embedding rows are looked up; of a head with an adapter a whole one is made.
                    match spec.role {
                        Role::Embed if !tied => {}
                        Role::Embed | Role::Head => held.packed_head = head_adapter.is_none(),
                        _ => held.unpacked = held.unpacked.max(elements),
                    }
                }
            }
        }
        let dropped = |d_in: usize| if plan.config().dropout > 0.0 { d_in } else { 0 };
        let pairs = if plan.config().init == LoraInit::Olora { 2 } else { 1 };
        let kept = |m: &Adapted| pairs * m.rank + dropped(m.dims.0);
        let kept: usize = plan.modules().filter(|(_, m)| !m.embedding).map(|(_, m)| kept(m)).sum();
        held.adapter_activations = (kept / num_layers.max(1)) as u64;
        let largest = |wanted: &dyn Fn(&str) -> bool| {
            let of = |s: &&ParamSpec| s.name.strip_suffix(".weight").is_some_and(wanted);
            specs.iter().filter(of).map(|s| s.num_elements() as u64).max().unwrap_or(0)
        };
        let table = largest(&|module| plan.tokens().any(|(name, _)| name == module));
        let matrix = largest(&|module| pairs == 2 && plan.modules().any(|(name, _)| name == module));
        held.starting = 4 * (table.max(matrix) + if pairs == 2 { held.trained } else { 0 });
        held.merged_head = head_adapter.map_or(0, |s| 2 * s.num_elements() as u64);
        Ok(held)
    }
}

impl MemoryPlan {
    /// All of it at the worst moment: in a step, or while the model is loaded.
    pub fn total(&self) -> u64 {
        let step = self.weights + self.gradients + self.optimizer + self.activations + self.transient + self.fixed;
        step.max(self.loading)
    }

    /// For a model of which `held` is held.
    pub fn new(config: &dyn ModelConfig, held: Held, step: StepShape) -> Self {
        let shape = config.shape();
        let tokens = (step.micro_batch_size * step.context_length) as u64;
        let element = match step.dtype {
            TrainDtype::F32 => 4,
            TrainDtype::Bf16 => 2,
        };
        let block = (config.block_activations() as u64 + held.adapter_activations) * tokens * element;
        let input = shape.hidden_size as u64 * tokens * element;
        // A block that is computed anew is held in its backward only, when the head's memory is free again.
        let (kept, anew) = match step.checkpointing {
            ActivationCheckpointing::None => (shape.num_layers as u64 * block, 0),
            ActivationCheckpointing::Blocks => (shape.num_layers as u64 * input, block),
        };
        // In a block's backward at most: gradients of the feed-forward tensors, of which the product's is freed as they come, and
        // of the residual stream.
        let in_block = anew + (2 * shape.intermediate_size + 2 * shape.hidden_size) as u64 * tokens * element;
        let in_head = tallow_ops::cross_entropy_workspace(
            tokens as usize,
            shape.hidden_size,
            shape.vocab_size,
            step.dtype.into(),
            held.packed_head,
        ) as u64
            + 3 * input;
        Self {
            weights: held.trained * if step.dtype == TrainDtype::Bf16 { 6 } else { 4 }
                + held.frozen * element
                + held.packed,
            gradients: held.trained * 4,
            optimizer: held.trained * 8,
            activations: kept + input,
            transient: in_block.max(in_head) + held.unpacked * element + held.merged_head * 4,
            fixed: FIXED,
            loading: if held.packed > 0 || held.starting > 0 {
                FIXED + held.packed + held.frozen * element + (4 * held.largest_packed).max(held.starting)
            } else {
                0
            },
        }
    }
}

/// The largest divisor of `batch_size` whose plan fits in `budget` bytes; 1 if none does.
pub fn fitting_micro_batch(
    config: &dyn ModelConfig,
    held: Held,
    batch_size: usize,
    mut step: StepShape,
    budget: u64,
) -> usize {
    let divisors = (1..=batch_size).rev().filter(|d| batch_size.is_multiple_of(*d));
    divisors
        .into_iter()
        .find(|&rows| {
            step.micro_batch_size = rows;
            MemoryPlan::new(config, held, step).total() <= budget
        })
        .unwrap_or(1)
}
