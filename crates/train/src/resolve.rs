//! From what the user wrote to what will run: one pure function, its result saved as `resolved.toml`.

use serde::Serialize;
use tallow_adapters::AdapterPlan;
use tallow_models::ModelConfig;
use tallow_nn::{Pack, ParamSpec};

use crate::config::RunConfig;
use crate::plan::{Held, MemoryPlan, StepShape, fitting_micro_batch};
use crate::{Error, Result};

/// Facts that the run file does not hold: about data and machine.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Rows that one epoch of the training data makes.
    pub rows_per_epoch: u64,
    /// Memory that may be used, bytes; `None` where the system does not say.
    pub memory: Option<u64>,
    /// Peak FLOPs a second in the run's dtype, where it was measured.
    pub peak_flops: Option<f64>,
    /// Rows at once of the run that is continued: what fitted then is kept, whatever memory is free now, since another
    /// division of a step sums in another order.
    pub earlier_micro_batch: Option<usize>,
}

/// A run, with nothing left to decide.
#[derive(Clone, Debug, Serialize)]
pub struct Resolved {
    /// The run file, every default filled in.
    pub run: RunConfig,
    /// Optimizer steps.
    pub steps: u64,
    /// Rows at once.
    pub micro_batch_size: usize,
    /// Warm-up steps of the schedule.
    pub warmup_steps: u64,
    /// Parameters.
    pub params: u64,
    /// Parameters that are trained.
    pub trained: u64,
    /// FLOPs to train on one token.
    pub flops_per_token: f64,
    /// See [`Facts::peak_flops`].
    pub peak_flops: Option<f64>,
    /// Bytes by what they hold.
    pub memory: MemoryPlan,
}

impl Resolved {
    /// Decides what `run` leaves open for the model `config` with parameters `specs`, of which `adapter`, if there is one,
    /// trains its own beside what `pack` packs.
    ///
    /// # Errors
    /// For any value or combination that cannot run: key, value, reason and a working value.
    pub fn new(
        mut run: RunConfig,
        config: &dyn ModelConfig,
        specs: &[ParamSpec],
        adapter: Option<&AdapterPlan>,
        pack: Option<&dyn Pack>,
        facts: Facts,
    ) -> Result<Self> {
        run.validate()?;
        config.check_training()?;
        let shape = config.shape();
        let (batch, context) = (run.train.batch_size, run.data.context_length);
        if context > shape.max_positions {
            let reason = format!("the model has {0} positions; at most {0}", shape.max_positions);
            return Err(Error::config("data.context_length", context, reason));
        }
        if let Some(window) = shape.sliding_window.filter(|&window| shape.prefix_lm && window < context) {
            let reason = format!(
                "the model sees no further than {window} tokens (sliding_window), and a prompt is seen both ways only where \
                 all of a row is seen; at most {window}, or objective.kind = \"sft\""
            );
            return Err(Error::config("data.context_length", context, reason));
        }
        let steps = steps(&run, facts.rows_per_epoch)?;
        run.schedule.validate(steps).map_err(|e| Error::config(&format!("schedule.{}", e.key), e.value, e.reason))?;
        let warmup_steps = run.schedule.warmup(steps);
        run.schedule.warmup_steps = Some(warmup_steps);
        let mut shape = StepShape {
            micro_batch_size: batch,
            context_length: context,
            dtype: run.train.dtype,
            checkpointing: run.train.activation_checkpointing,
        };
        let held = match adapter {
            Some(plan) => Held::adapted(plan, specs, config.shape().num_layers, pack)?,
            None => Held::trained(specs),
        };
        let earlier = facts.earlier_micro_batch.filter(|&rows| rows > 0 && batch.is_multiple_of(rows));
        let micro = run.train.micro_batch_size.or(earlier).unwrap_or_else(|| {
            let budget = facts.memory.map_or(u64::MAX, |bytes| bytes / 10 * 8);
            fitting_micro_batch(config, held, batch, shape, budget)
        });
        shape.micro_batch_size = micro;
        Ok(Self {
            steps,
            micro_batch_size: micro,
            warmup_steps,
            params: specs.iter().map(|s| s.num_elements() as u64).sum(),
            trained: held.trained,
            flops_per_token: flops_per_token(config, specs, adapter, context),
            peak_flops: facts.peak_flops,
            memory: MemoryPlan::new(config, held, shape),
            run,
        })
    }

    /// Learning rate of step `step`, from 0.
    pub fn lr(&self, step: u64) -> f64 {
        self.run.schedule.lr(self.run.optimizer.lr, step, self.steps)
    }

    /// Tokens that the whole run trains on.
    pub fn tokens(&self) -> u64 {
        self.steps * (self.run.train.batch_size * self.run.data.context_length) as u64
    }
}

/// FLOPs to train on one token: a weight that is not trained has no gradient product of its own.
fn flops_per_token(
    config: &dyn ModelConfig,
    specs: &[ParamSpec],
    adapter: Option<&AdapterPlan>,
    context: usize,
) -> f64 {
    let shape = config.shape();
    let frozen: Vec<ParamSpec> =
        specs.iter().filter(|spec| adapter.is_some_and(|plan| !plan.is_trained(spec))).cloned().collect();
    shape.train_flops_per_token(specs, context) - 2.0 * shape.matmul_params(&frozen) as f64
}

fn steps(run: &RunConfig, rows_per_epoch: u64) -> Result<u64> {
    let rows = run.train.batch_size as u64;
    let tokens_per_step = rows * run.data.context_length as u64;
    let steps = match (run.train.steps, run.train.tokens, run.train.epochs) {
        (Some(steps), _, _) => steps,
        (_, Some(tokens), _) => tokens.div_ceil(tokens_per_step.max(1)),
        (_, _, Some(epochs)) => (epochs * rows_per_epoch as f64 / rows as f64).ceil() as u64,
        (None, None, None) => 0,
    };
    let too_many = |steps: u64| steps.checked_mul(tokens_per_step).is_none_or(|tokens| tokens > i64::MAX as u64);
    match steps {
        0 => Err(Error::config("train.steps", 0, "must be at least 1")),
        steps if too_many(steps) => {
            let reason = format!("are more tokens than can be counted at {tokens_per_step} a step");
            let key = match (run.train.tokens, run.train.epochs) {
                (Some(_), _) => "train.tokens",
                (_, Some(_)) => "train.epochs",
                (None, None) => "train.steps",
            };
            Err(Error::config(key, format!("{steps} steps"), reason))
        }
        steps => Ok(steps),
    }
}
