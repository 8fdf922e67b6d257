//! `tallow bench train`: training steps of a given shape, timed.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use serde::Serialize;
use tallow_models::{Decoder, ModelConfig, parse_config_strict};
use tallow_nn::{ForwardContext, ParamStore, RandomInit, StoreOptions, plan_params};
use tallow_ops::{CrossEntropyOptions, KeyRanges, trace};

use crate::backward::{ActivationCheckpointing, StepOptions, forward_backward};
use crate::config::TrainDtype;
use crate::optimizer::{AdamW, OptimizerConfig};
use crate::plan::{Held, MemoryPlan, StepShape};
use crate::profile::Profile;
use crate::{Result, memory};

/// The shape and length of a benchmark.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the flags of `tallow bench train`, by their names")]
pub struct TrainBench {
    pub dim: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub ffn: usize,
    pub context: usize,
    pub vocab: usize,
    pub batch: usize,
    pub tied: bool,
    pub dtype: DType,
    pub steps: usize,
    pub warmup: usize,
    pub checkpointing: ActivationCheckpointing,
}

/// What a benchmark measured.
#[derive(Clone, Debug, Serialize)]
pub struct TrainBenchReport {
    /// Tokens a second, of the median step.
    pub tokens_per_s: f64,
    /// Milliseconds of the median step.
    pub step_ms: f64,
    /// Model FLOPs a second over 1e9, `6 N + 12 L C T` a token.
    pub model_gflops: f64,
    /// `model_gflops` over the machine's measured peak in this dtype; set by the caller that measured one.
    pub mfu: Option<f64>,
    /// Largest resident set of the process, bytes.
    pub peak_bytes: u64,
    /// What `tallow plan` expects that to be, bytes.
    pub planned_bytes: u64,
    /// Parameters.
    pub params: usize,
    /// Loss of the last step, nats a token.
    pub loss: f64,
    /// `f32` or `bf16`.
    pub dtype: &'static str,
}

impl TrainBench {
    fn config(&self) -> Result<Box<dyn ModelConfig>> {
        let value = serde_json::json!({
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocab,
            "hidden_size": self.dim,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": self.tied,
        });
        Ok(parse_config_strict(&value)?.config)
    }

    fn shape(&self) -> StepShape {
        StepShape {
            micro_batch_size: self.batch,
            context_length: self.context,
            dtype: if self.dtype == DType::BF16 { TrainDtype::Bf16 } else { TrainDtype::F32 },
            checkpointing: self.checkpointing,
        }
    }

    /// Trains `warmup + steps` steps on one random batch and reports the median of the last `steps`.
    ///
    /// A step is what a training step is: gradients zeroed, forward, cross-entropy over all tokens, backward, AdamW over
    /// every parameter.
    ///
    /// # Errors
    /// If the shape makes no model.
    pub fn run(&self, device: &Device) -> Result<TrainBenchReport> {
        Ok(self.measure(device, false)?.0)
    }

    /// As [`run`](Self::run), and where the time of the last `steps` went. Noting it costs a little itself.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn profile(&self, device: &Device) -> Result<(TrainBenchReport, Profile)> {
        self.measure(device, true)
    }

    fn measure(&self, device: &Device, traced: bool) -> Result<(TrainBenchReport, Profile)> {
        let config = self.config()?;
        let (_, specs) = plan_params(|b| config.build(b))?;
        let flops_per_token = config.shape().train_flops_per_token(&specs, self.context);
        let planned_bytes = MemoryPlan::new(config.as_ref(), Held::trained(&specs), self.shape()).total();
        let options = StoreOptions::trainable(self.dtype, device.clone());
        let store = ParamStore::new(specs, &options, &RandomInit { seed: 0 })?;
        let model = store.build(|b| config.build(b))?;
        let optimizer = OptimizerConfig { lr: 3e-4, weight_decay: 0.01, grad_clip: 0.0, ..Default::default() };
        let mut optimizer = AdamW::new(&optimizer, &store)?;
        let batch = self.batch(device)?;
        let mut times = Vec::with_capacity(self.steps);
        let mut loss = f64::NAN;
        let mut tracing = None;
        for step in 0..self.warmup + self.steps {
            if traced && step == self.warmup {
                tracing = Some(Tracing::start());
            }
            let start = Instant::now();
            loss = self.step(model.as_ref(), &store, &mut optimizer, &batch, step as u64 + 1)?;
            device.synchronize()?;
            if step >= self.warmup {
                times.push(start.elapsed().as_secs_f64());
            }
        }
        let events = if tracing.is_some() { trace::stop() } else { vec![] };
        let profile = Profile { events, steps: times.len(), seconds: times.iter().sum() };
        times.sort_by(f64::total_cmp);
        let median = times.get(times.len() / 2).copied().unwrap_or(f64::NAN);
        let tokens = (self.batch * self.context) as f64;
        let report = TrainBenchReport {
            tokens_per_s: tokens / median,
            step_ms: median * 1e3,
            model_gflops: flops_per_token * tokens / median / 1e9,
            mfu: None,
            peak_bytes: memory::peak_resident().unwrap_or(0),
            planned_bytes,
            params: store.num_elements(),
            loss,
            dtype: self.dtype.as_str(),
        };
        Ok((report, profile))
    }

    fn batch(&self, device: &Device) -> Result<Batch> {
        let (b, t) = (self.batch, self.context);
        let row = self.context + 1;
        let mut state = 0x2545_f491_4f6c_dd1du64;
        let ids: Vec<u32> = (0..b * row)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 33) as u32 % self.vocab as u32
            })
            .collect();
        let ids = Tensor::from_vec(ids, (b, row), device)?;
        Ok(Batch {
            ids: ids.narrow(1, 0, t)?.contiguous()?,
            targets: ids.narrow(1, 1, t)?.contiguous()?,
            positions: Arc::new((0..b).flat_map(|_| 0..t as u32).collect()),
            ranges: Arc::new(KeyRanges::causal(b, t, t)?),
        })
    }

    fn step(
        &self,
        model: &dyn Decoder,
        store: &ParamStore,
        optimizer: &mut AdamW,
        batch: &Batch,
        step: u64,
    ) -> Result<f64> {
        let mut cx = ForwardContext::whole(batch.positions.clone(), batch.ranges.clone());
        let scale = 1.0 / (self.batch * self.context) as f64;
        let options = CrossEntropyOptions { scale, ..Default::default() };
        let sums = forward_backward(
            model,
            &batch.ids,
            (&batch.targets).into(),
            &mut cx,
            &options,
            StepOptions { checkpointing: self.checkpointing, ..Default::default() },
        )?;
        optimizer.step(store, 3e-4, step, 0.0)?;
        Ok(sums.mean())
    }
}

/// Spans are noted until it is dropped, also by an error.
struct Tracing;

impl Tracing {
    fn start() -> Self {
        trace::start();
        Self
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        trace::stop();
    }
}

struct Batch {
    ids: Tensor,
    targets: Tensor,
    positions: Arc<Vec<u32>>,
    ranges: Arc<KeyRanges>,
}
