//! The training loop.

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType, Device};
use tallow_adapters::{AdapterFill, AdapterPlan, TOKEN_ROWS};
use tallow_data::{Batch, Loader, Prefetch};
use tallow_models::{Decoder, ModelConfig};
use tallow_nn::{DropoutContext, Fill, Pack, ParamSpec, ParamStore, RandomInit, Role, StoreOptions, plan_params};
use tallow_ops::CrossEntropyOptions;

use crate::anomaly::{AnomalyDetector, Verdict};
use crate::audit::{audit_gradients, largest_weight};
use crate::backward::{LossSums, StepOptions, forward_backward};
use crate::batch::MicroBatch;
use crate::checkpoint::{Checkpoints, TrainState};
use crate::evaluate::Validation;
use crate::metrics::{EvalRecord, StepRecord};
use crate::optimizer::AdamW;
use crate::resolve::Resolved;
use crate::{Error, Result, memory};

/// What a run tells whoever watches it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A step is done.
    Step(&'a StepRecord),
    /// The validation data was scored.
    Eval(&'a EvalRecord),
    /// A checkpoint is about to be written: what was recorded so far must be on the disk before it.
    Saving,
    /// A checkpoint was written.
    Saved(&'a Path),
    /// The run went back to the state after this many steps: what was recorded past it is void.
    RolledBack(u64),
    /// Something that the user should read.
    Notice(String),
}

/// Watches a run: logs, draws, shows progress. Nothing that it does changes the run.
pub trait Observer {
    /// Takes an event.
    ///
    /// # Errors
    /// If it cannot be recorded; the run stops after saving a checkpoint.
    fn event(&mut self, event: Event) -> Result<()>;
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// All steps are done.
    Complete,
    /// It was asked to stop; a checkpoint holds where it was.
    Interrupted,
}

/// What a model is made of.
pub struct ModelParts<'a> {
    /// Its architecture.
    pub config: &'a dyn ModelConfig,
    /// Its values, or those of the base of an adapter.
    pub fill: &'a dyn Fill,
    /// Train an adapter beside it, and nothing else.
    pub adapter: Option<&'a AdapterPlan>,
    /// Keep what is not trained in fewer bits.
    pub pack: Option<&'a dyn Pack>,
}

/// A run in memory: model, optimizer, data, and where it stands.
pub struct Trainer {
    resolved: Resolved,
    store: ParamStore,
    model: Box<dyn Decoder>,
    optimizer: AdamW,
    loader: Loader,
    validation: Option<Validation>,
    checkpoints: Checkpoints,
    anomaly: AnomalyDetector,
    state: TrainState,
    device: Device,
    started: Instant,
    /// See [`StepRecord::memory`].
    most_memory: u64,
}

/// No weight of a working model comes near.
const LARGEST_WEIGHT: f32 = 1e4;

impl Trainer {
    /// Builds the model, fills it, and allocates what training needs.
    ///
    /// # Errors
    /// If the model cannot be built or filled.
    pub fn new(
        resolved: Resolved,
        model: ModelParts,
        loader: Loader,
        validation: Option<Validation>,
        checkpoints: Checkpoints,
    ) -> Result<Self> {
        let device = Device::Cpu;
        let ModelParts { config, fill, adapter, pack } = model;
        let dtype: DType = resolved.run.train.dtype.into();
        let (store, model, optimizer) = match adapter {
            None => {
                let (_, specs) = plan_params(|b| config.build(b))?;
                let store = ParamStore::new(specs, &StoreOptions::trainable(dtype, device.clone()), fill)?;
                let model = store.build(|b| config.build(b))?;
                let optimizer = AdamW::new(&resolved.run.optimizer, &store)?;
                (store, model, optimizer)
            }
            Some(plan) => {
                let (_, specs) = plan_params(|b| plan.build(b, |b| config.build(b)))?;
                let trainable = |spec: &ParamSpec| plan.is_trained(spec);
                let pack = pack.map(|pack| plan.pack(pack));
                let pack = pack.as_ref().map(|pack| pack as &dyn Pack);
                let options = StoreOptions { dtype, device: device.clone(), trainable: &trainable, pack };
                let random = RandomInit { seed: resolved.run.seed };
                let fill = AdapterFill::new(fill, plan, &specs, pack, dtype, random)?;
                let store = ParamStore::new(specs.clone(), &options, &fill)?;
                let model = store.build(|b| plan.build(b, |b| config.build(b)))?;
                let ratio = resolved.run.adapter.as_ref().map_or(1.0, |adapter| adapter.lr_ratio);
                let second = |spec: &ParamSpec| {
                    spec.name.ends_with(".lora_B.weight") || spec.name.ends_with(".lora_embedding_B")
                };
                let lr_factor = |spec: &ParamSpec| if second(spec) { ratio } else { 1.0 };
                let optimizer = AdamW::with_lr_factors(&resolved.run.optimizer, &store, &lr_factor)?;
                (store, model, optimizer)
            }
        };
        let anomaly = AnomalyDetector::new(resolved.run.anomaly.clone());
        let scored_on = validation.as_ref().map(Validation::identity);
        let state = TrainState { scored_on, ..TrainState::new(&loader) };
        let started = Instant::now();
        Ok(Self {
            resolved,
            store,
            model,
            optimizer,
            loader,
            validation,
            checkpoints,
            anomaly,
            state,
            device,
            started,
            most_memory: 0,
        })
    }

    /// The parameters.
    pub fn store(&self) -> &ParamStore {
        &self.store
    }

    /// The model.
    pub fn model(&self) -> &dyn Decoder {
        self.model.as_ref()
    }

    /// Steps done so far.
    pub fn step_index(&self) -> u64 {
        self.state.step
    }

    /// Continues from the newest good checkpoint. `false` if there is none.
    ///
    /// # Errors
    /// If there are checkpoints but none can be read, or they belong to another run.
    pub fn resume(&mut self, observer: &mut dyn Observer) -> Result<bool> {
        let Some((path, notices)) = self.checkpoints.newest()? else { return Ok(false) };
        for notice in notices {
            observer.event(Event::Notice(notice))?;
        }
        self.restore(&path)?;
        Ok(true)
    }

    fn restore(&mut self, path: &Path) -> Result<()> {
        self.state = self.checkpoints.restore(path, &self.store, &self.optimizer, &self.loader)?;
        let scored_on = self.validation.as_ref().map(Validation::identity);
        // The best of other text is no longer the one to beat, but it is kept until another takes its place.
        match (&self.state.scored_on, &scored_on) {
            (Some(was), Some(is)) if was != is => {
                (self.state.best_loss, self.state.scored_on) = (None, scored_on);
                self.state.worse_in_a_row = 0;
            }
            (None, Some(_)) => self.state.scored_on = scored_on,
            _ => {}
        }
        if let Some(anomaly) = self.state.anomaly.clone() {
            self.anomaly = anomaly.with_config(self.resolved.run.anomaly.clone());
        }
        Ok(())
    }

    /// Trains until all steps are done or `stop` says so (asked between steps; a checkpoint is written then).
    ///
    /// # Errors
    /// If a step fails, the gradient audit fails, training diverges under a policy of stopping, or nothing can be saved.
    pub fn train(&mut self, observer: &mut dyn Observer, stop: &dyn Fn() -> bool) -> Result<Finish> {
        let total = self.resolved.steps;
        let mut batches = self.prefetch();
        while !self.is_done() {
            if stop() {
                self.save(observer)?;
                return Ok(Finish::Interrupted);
            }
            let started = Instant::now();
            let batch = batches.next().ok_or_else(|| self.data_ended())??;
            let data_wait_s = started.elapsed().as_secs_f64();
            let sums = self.forward_backward(&batch)?;
            self.audit()?;
            let grad_norm = self.optimizer.grad_norm(&self.store)?;
            let lr = self.resolved.lr(self.state.step);
            let verdict = self.anomaly.observe(sums.mean(), grad_norm);
            let skipped = !matches!(verdict, Verdict::Ok);
            match verdict {
                Verdict::Ok => self.optimizer.step(&self.store, lr, self.state.updates + 1, grad_norm)?,
                Verdict::Skip { reason } => self.skip(&reason, observer)?,
                Verdict::Rollback { reason } => {
                    self.roll_back(&reason, observer)?;
                    batches = self.prefetch();
                    continue;
                }
                Verdict::Stop { reason } => return Err(self.diverged(reason)),
            }
            self.advance(&batch, skipped);
            let seconds = started.elapsed().as_secs_f64();
            self.most_memory = self.most_memory.max(memory::anonymous().unwrap_or(0));
            let record = StepRecord { data_wait_s, ..self.record(sums, lr, grad_norm, seconds, skipped) };
            self.tell(observer, Event::Step(&record))?;
            let last = self.state.step == total;
            let best = (self.due(self.resolved.run.eval.every) || last) && self.validate(observer)?;
            if best || last || self.due(self.resolved.run.checkpoint.every) {
                self.save(observer)?;
            }
        }
        if self.out_of_patience() {
            self.return_to_best(observer)?;
        }
        Ok(Finish::Complete)
    }

    /// Looks at the first gradients. One of the two matrices of a new adapter is zero, so the other has no gradient before
    /// the first update; rows of a few tokens of an embedding have none where no batch held one of them yet.
    fn audit(&self) -> Result<()> {
        let adapter = self.resolved.run.adapter.is_some();
        let waits =
            |spec: &ParamSpec| spec.name.ends_with(".lora_A.weight") || spec.name.ends_with(".lora_embedding_B");
        let rows = |spec: &ParamSpec| spec.role == Role::Embed && spec.name.ends_with(TOKEN_ROWS);
        match self.state.updates {
            0 => audit_gradients(&self.store, &|spec| !(adapter && (waits(spec) || rows(spec)))),
            1 if adapter => audit_gradients(&self.store, &|spec| !rows(spec)).map_err(|error| self.overflown(error)),
            _ => Ok(()),
        }
    }

    /// The same failure, unless the first update is to blame: with weights so large nothing has a gradient of use.
    fn overflown(&self, error: Error) -> Error {
        let Error::Audit { parameter, reason } = &error else { return error };
        match largest_weight(&self.store) {
            Ok(largest) if largest.is_nan() || largest > LARGEST_WEIGHT => {
                let lr = self.resolved.run.optimizer.lr;
                self.diverged(format!(
                    "after the first update weights are as large as {largest:.1e} and `{parameter}` {}: optimizer.lr = \
                     {lr:e} is too high; lower it",
                    reason.split(':').next().unwrap_or(reason)
                ))
            }
            _ => error,
        }
    }

    /// Tells the observer; if it cannot take it, what was learnt is saved before the run ends.
    fn tell(&mut self, observer: &mut dyn Observer, event: Event) -> Result<()> {
        observer.event(event).inspect_err(|_| {
            // The observer's error is the one to report, whether or not the checkpoint can be written.
            let _ = self.write_checkpoint();
        })
    }

    /// Gradients of the mean loss over all targets of the batch, whatever its micro-batches.
    fn forward_backward(&self, batch: &Batch) -> Result<LossSums> {
        let run = &self.resolved.run;
        if batch.weight_sum <= 0.0 {
            let reason = "its batch has nothing to predict: every document in it is a single token; use longer documents, \
                          data.packing = true or a larger train.batch_size";
            return Err(self.diverged(reason.into()));
        }
        let options = CrossEntropyOptions {
            scale: 1.0 / batch.weight_sum,
            z_loss: run.objective.z_loss,
            label_smoothing: run.objective.label_smoothing,
            ..Default::default()
        };
        let mut sums = LossSums::default();
        let rows = self.resolved.micro_batch_size;
        let step = StepOptions {
            checkpointing: run.train.activation_checkpointing,
            first_stage: self.store.first_trained_stage().unwrap_or(0),
            neftune_alpha: run.objective.neftune_alpha,
        };
        for (index, start) in (0..batch.batch).step_by(rows).enumerate() {
            let micro =
                MicroBatch::new(batch, start..(start + rows).min(batch.batch), self.model.shape(), &self.device)?;
            let mut cx = micro.context();
            let accumulation = batch.batch.div_ceil(rows) as u64;
            cx.dropout = Some(DropoutContext { seed: run.seed, step: self.state.step * accumulation + index as u64 });
            sums += forward_backward(self.model.as_ref(), &micro.ids, micro.targets(), &mut cx, &options, step)?;
        }
        Ok(sums)
    }

    fn prefetch(&self) -> Prefetch {
        self.loader.prefetch(self.state.next_sample, self.resolved.run.train.batch_size)
    }

    fn advance(&mut self, batch: &Batch, skipped: bool) {
        self.state.step += 1;
        self.state.updates += u64::from(!skipped);
        self.state.next_sample += batch.batch as u64;
        self.state.tokens += (batch.batch * batch.context) as u64;
    }

    /// Throws away the step's gradient.
    fn skip(&mut self, reason: &str, observer: &mut dyn Observer) -> Result<()> {
        self.forget_gradient()?;
        self.tell(observer, Event::Notice(format!("step {}: {reason}; the step is skipped", self.state.step + 1)))
    }

    fn forget_gradient(&self) -> Result<()> {
        for grad in self.store.buckets().iter().filter_map(|b| b.grad.as_ref()) {
            tallow_ops::fill_zero(grad)?;
        }
        Ok(())
    }

    /// Returns to the newest checkpoint and goes on behind the data that went wrong.
    fn roll_back(&mut self, reason: &str, observer: &mut dyn Observer) -> Result<()> {
        let (step, behind) = (self.state.step + 1, self.state.next_sample + self.resolved.run.train.batch_size as u64);
        self.forget_gradient()?;
        let Some((path, _)) = self.checkpoints.newest()? else {
            let way_out = "save one earlier with checkpoint.every";
            return Err(self.diverged(format!("{reason}, and there is no checkpoint to roll back to; {way_out}")));
        };
        let (seen, elapsed_before) = (self.anomaly.clone(), self.state.elapsed_before);
        self.restore(&path)?;
        // Losses of later, better weights would make every loss of these a spike; but this rollback counts.
        self.anomaly = self.anomaly.clone().with_counts_of(&seen);
        self.state.elapsed_before = elapsed_before;
        self.state.next_sample = behind;
        let back_at = self.state.step;
        let notice = format!("step {step}: {reason}; rolled back to step {back_at}, the data since is left out");
        observer.event(Event::RolledBack(back_at))?;
        observer.event(Event::Notice(notice))
    }

    /// Weights that are not finite are never saved: they would take the place of good ones.
    fn check_finite(&self) -> Result<()> {
        for master in self.store.buckets().iter().filter_map(|b| b.master.as_ref()) {
            if !tallow_ops::all_finite(master)? {
                let reason = "the weights are not finite and are not saved; lower optimizer.lr and go on with --resume from \
                              the last checkpoint, or start anew";
                return Err(self.diverged(reason.into()));
            }
        }
        Ok(())
    }

    fn diverged(&self, reason: String) -> Error {
        Error::Diverged { step: self.state.step + 1, reason }
    }

    fn data_ended(&self) -> Error {
        Error::Diverged { step: self.state.step + 1, reason: "the loader of the training data ended".into() }
    }

    fn due(&self, every: u64) -> bool {
        every > 0 && self.state.step.is_multiple_of(every)
    }

    fn record(&self, sums: LossSums, lr: f64, grad_norm: f64, seconds: f64, skipped: bool) -> StepRecord {
        let tokens = (self.resolved.run.train.batch_size * self.resolved.run.data.context_length) as f64;
        let tokens_per_s = tokens / seconds;
        StepRecord {
            step: self.state.step,
            tokens: self.state.tokens,
            loss: sums.mean(),
            lr,
            grad_norm,
            tokens_per_s,
            data_wait_s: 0.0,
            mfu: self.resolved.peak_flops.map(|peak| tokens_per_s * self.resolved.flops_per_token / peak),
            memory: self.most_memory,
            elapsed_s: self.state.elapsed_before + self.started.elapsed().as_secs_f64(),
            skipped,
        }
    }

    /// Scores the validation data; whether it never was better.
    fn validate(&mut self, observer: &mut dyn Observer) -> Result<bool> {
        let Some(validation) = &self.validation else { return Ok(false) };
        let score = validation.score(self.model.as_ref(), self.resolved.micro_batch_size, &self.device)?;
        let best = improves(self.state.best_loss, score.loss);
        match best {
            true => {
                self.state.best_loss = Some(score.loss);
                self.state.best_step = Some(self.state.step);
                self.state.worse_in_a_row = 0;
            }
            false => self.state.worse_in_a_row += 1,
        }
        let record = score.record(self.state.step);
        self.tell(observer, Event::Eval(&record))?;
        Ok(best)
    }

    /// Whether nothing is left to train: all steps are done, or the run stopped early.
    pub fn is_done(&self) -> bool {
        self.state.step >= self.resolved.steps || self.out_of_patience()
    }

    /// Whether the validation loss has not fallen for as long as the run is to wait for it.
    pub fn out_of_patience(&self) -> bool {
        let patience = self.resolved.run.eval.patience;
        patience > 0 && self.state.worse_in_a_row >= patience
    }

    /// Ends a run early: saves where it is, and goes back to the weights that were best.
    fn return_to_best(&mut self, observer: &mut dyn Observer) -> Result<()> {
        self.save(observer)?;
        let (step, worse) = (self.state.step, self.state.worse_in_a_row);
        let Some(best) = self.state.best_step else { return Ok(()) };
        self.restore(&self.checkpoints.path(best))?;
        let notice = format!(
            "step {step}: {worse} validations in a row without a lower loss (eval.patience): stopped; the weights are those \
             of step {best}, the best"
        );
        self.tell(observer, Event::Notice(notice))
    }

    /// Writes a checkpoint now.
    ///
    /// # Errors
    /// If it cannot be written; earlier checkpoints are as they were.
    pub fn save(&mut self, observer: &mut dyn Observer) -> Result<PathBuf> {
        self.tell(observer, Event::Saving)?;
        let path = self.write_checkpoint()?;
        observer.event(Event::Saved(&path))?;
        Ok(path)
    }

    fn write_checkpoint(&mut self) -> Result<PathBuf> {
        self.check_finite()?;
        self.state.anomaly = Some(self.anomaly.clone());
        let elapsed = self.state.elapsed_before + self.started.elapsed().as_secs_f64();
        let state = TrainState { elapsed_before: elapsed, ..self.state.clone() };
        self.checkpoints.save(&state, &self.store, &self.optimizer)
    }

    /// Writes the model and its tokenizer as a Hugging Face directory.
    ///
    /// # Errors
    /// If it cannot be written; what was there before is as it was.
    pub fn save_final(&self, path: &Path) -> Result<()> {
        self.check_finite()?;
        self.checkpoints.save_final(path, &self.store)
    }
}

impl Trainer {
    /// Whether `path` holds already what [`save_final`](Self::save_final) would write of a run that is done.
    ///
    /// # Errors
    /// If a file that is there cannot be read.
    pub fn is_saved_in(&self, path: &Path) -> Result<bool> {
        let best = self.state.best_step.filter(|_| self.out_of_patience());
        self.checkpoints.is_final_of(best.unwrap_or(self.state.step), path)
    }
}

/// Whether a loss is the best so far. One that is not finite never is: nothing would be below NaN ever after.
fn improves(best: Option<f64>, loss: f64) -> bool {
    loss.is_finite() && best.is_none_or(|best| loss < best)
}

#[cfg(test)]
mod accumulation;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_that_is_not_finite_is_never_the_best() {
        assert!(improves(None, 3.0) && improves(Some(3.0), 2.0) && !improves(Some(2.0), 2.0));
        for loss in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert!(!improves(None, loss) && !improves(Some(2.0), loss));
        }
    }
}
