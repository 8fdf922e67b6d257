//! AdamW over the flat buckets of a [`ParamStore`].

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use tallow_nn::{Bucket, ParamSpec, ParamStore};
use tallow_ops::trace::stage;
use tallow_ops::{AdamWBuckets, AdamWParams, adamw_step, global_sq_norm};

use crate::reference::documented;
use crate::{Error, Result};

/// Which optimizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// AdamW (Loshchilov and Hutter 2019), moments in f32.
    #[default]
    Adamw,
}

documented! {
    /// The optimizer and its settings.
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct OptimizerConfig {
        /// `adamw` (Loshchilov and Hutter 2019), moments in f32.
        pub kind: OptimizerKind,
        /// Peak learning rate.
        pub lr: f64,
        /// Decay rates of the first and second moment.
        pub betas: [f64; 2],
        /// Added to the root of the second moment.
        pub eps: f64,
        /// Decoupled decay a step, times the learning rate; matrices only, never norms, biases and embeddings.
        pub weight_decay: f64,
        /// Largest global L2 norm of the gradient; 0 for no clipping.
        pub grad_clip: f64,
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self { kind: OptimizerKind::Adamw, lr: 1e-3, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: 1.0 }
    }
}

impl OptimizerConfig {
    /// Checks every value.
    ///
    /// # Errors
    /// Naming the key.
    pub fn validate(&self) -> Result<()> {
        let not_positive = |x: f64| !(x.is_finite() && x > 0.0);
        if not_positive(self.lr) {
            return Err(Error::config("optimizer.lr", self.lr, "must be a positive number, e.g. 1e-3"));
        }
        for (beta, good) in self.betas.iter().zip([0.9, 0.95]) {
            if !(0.0..1.0).contains(beta) {
                let reason = format!("must be at least 0 and below 1, e.g. {good}");
                return Err(Error::config("optimizer.betas", beta, reason));
            }
        }
        // In f32, as it is added: one that is 0 there makes 0 / 0 of every weight whose gradient is 0.
        if not_positive(f64::from(self.eps as f32)) {
            return Err(Error::config("optimizer.eps", self.eps, "must be a positive number in f32, e.g. 1e-8"));
        }
        for (key, value) in [("optimizer.weight_decay", self.weight_decay), ("optimizer.grad_clip", self.grad_clip)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::config(key, value, "must be 0 (off) or a positive number, e.g. 0.1"));
            }
        }
        Ok(())
    }
}

/// The moments of one bucket, f32 `[len]`.
struct Moments {
    m: Tensor,
    v: Tensor,
}

/// AdamW and its moments, one pair for each trainable bucket (`None` for frozen ones).
pub struct AdamW {
    config: OptimizerConfig,
    moments: Vec<Option<Moments>>,
    /// For each bucket, its elements in runs of one decay and one factor of the learning rate.
    groups: Vec<Vec<Group>>,
}

/// A run of elements of a bucket that are stepped alike.
#[derive(Clone, Debug, PartialEq)]
struct Group {
    range: std::ops::Range<usize>,
    decays: bool,
    lr_factor: f64,
}

impl AdamW {
    /// With zero moments.
    ///
    /// # Errors
    /// If memory cannot be allocated on the device.
    pub fn new(config: &OptimizerConfig, store: &ParamStore) -> Result<Self> {
        Self::with_lr_factors(config, store, &|_| 1.0)
    }

    /// With zero moments, and a factor of the learning rate for each parameter.
    ///
    /// # Errors
    /// If memory cannot be allocated on the device.
    pub fn with_lr_factors(
        config: &OptimizerConfig,
        store: &ParamStore,
        lr_factor: &dyn Fn(&ParamSpec) -> f64,
    ) -> Result<Self> {
        let moments = store.buckets().iter().map(|bucket| {
            let zeros = || Tensor::zeros(bucket.len, DType::F32, bucket.compute.device());
            bucket.trainable.then(|| Ok(Moments { m: zeros()?, v: zeros()? })).transpose()
        });
        let groups = (0..store.buckets().len()).map(|index| groups(store, index, lr_factor)).collect();
        Ok(Self { config: config.clone(), moments: moments.collect::<Result<_>>()?, groups })
    }

    /// The moments `(m, v)` of bucket `index`, f32 `[len]`.
    pub fn moments(&self, index: usize) -> Option<(&Tensor, &Tensor)> {
        self.moments.get(index)?.as_ref().map(|moments| (&moments.m, &moments.v))
    }

    /// Global L2 norm of all gradients.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn grad_norm(&self, store: &ParamStore) -> Result<f64> {
        let mut sum = 0.0;
        for grad in store.buckets().iter().filter_map(|b| b.grad.as_ref()) {
            sum += global_sq_norm(grad)?;
        }
        Ok(sum.sqrt())
    }

    /// One step at learning rate `lr`; `step` counts from 1. The gradient, of norm `grad_norm`, is clipped and zeroed.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn step(&mut self, store: &ParamStore, lr: f64, step: u64, grad_norm: f64) -> Result<()> {
        let _span = stage(false, || "optimizer".into());
        let clip = self.config.grad_clip;
        let grad_scale = if clip > 0.0 && grad_norm > clip { clip / (grad_norm + 1e-6) } else { 1.0 };
        for ((bucket, moments), groups) in store.buckets().iter().zip(&self.moments).zip(&self.groups) {
            let Some(moments) = moments else { continue };
            for Group { range, decays, lr_factor } in groups.iter().cloned() {
                let params = AdamWParams {
                    lr: lr * lr_factor,
                    beta1: self.config.betas[0],
                    beta2: self.config.betas[1],
                    eps: self.config.eps,
                    weight_decay: if decays { self.config.weight_decay } else { 0.0 },
                    step,
                    grad_scale,
                };
                step_bucket(bucket, moments, range, &params)?;
            }
        }
        Ok(())
    }
}

/// The runs of bucket `index`: neighbours that are stepped alike are one.
fn groups(store: &ParamStore, index: usize, lr_factor: &dyn Fn(&ParamSpec) -> f64) -> Vec<Group> {
    let bucket = &store.buckets()[index];
    let mut members: Vec<_> = store.params().iter().filter(|param| param.bucket == index).collect();
    members.sort_by_key(|param| param.offset);
    let mut groups: Vec<Group> = vec![];
    for param in members {
        let (decays, lr_factor) = (param.offset < bucket.decay_len, lr_factor(&param.spec));
        match groups.last_mut() {
            Some(last) if last.decays == decays && last.lr_factor == lr_factor => {}
            last => {
                if let Some(last) = last {
                    last.range.end = param.offset;
                }
                groups.push(Group { range: param.offset..bucket.len, decays, lr_factor });
            }
        }
    }
    groups
}

fn step_bucket(bucket: &Bucket, moments: &Moments, range: std::ops::Range<usize>, params: &AdamWParams) -> Result<()> {
    let (Some(master), Some(grad)) = (&bucket.master, &bucket.grad) else {
        return Ok(());
    };
    let compute = (bucket.compute.dtype() == DType::BF16).then_some(&bucket.compute);
    adamw_step(AdamWBuckets { master, grad, m: &moments.m, v: &moments.v, compute }, range, params)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eps_that_is_zero_or_infinite_in_f32_is_an_error() {
        assert!(OptimizerConfig { eps: 1e-30, ..Default::default() }.validate().is_ok());
        for eps in [0.0, 1e-60, 1e60, -1e-8, f64::NAN] {
            assert!(OptimizerConfig { eps, ..Default::default() }.validate().is_err(), "{eps}");
        }
    }
}
