//! Merging an adapter into its model, and measuring what that changes.
//!
//! An adapter that was trained beside a quantized model (QLoRA) was taught what the quantized values need: merged into them,
//! dequantized, the model is what was trained; merged into the model's own it is another, for better or worse.
//!
//! The merged matrix is `W + s B A` (with DoRA's magnitudes, `m / |W + s B A|` times that), added in f32. What is
//! written is a model without an adapter; how far its logits are from those of the adapter beside its base is measured on
//! text, not assumed.

use std::path::Path;

use candle_core::{Device, Tensor};
use tallow_adapters::{AdapterPlan, NamedAdapter};
use tallow_models::{Decoder, save_model};
use tallow_nn::{ForwardContext, ParamStore, StoreOptions, plan_params};
use tallow_ops::no_grad;

use crate::open::{Base, Dtype, Error, OpenModel, OpenOptions, Result, open_adapted, open_with};

/// How far two models are from each other over some tokens.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Difference {
    /// Largest difference of a logit.
    pub max_logit_difference: f64,
    /// Mean over positions of the Kullback-Leibler divergence of the second from the first, nats.
    pub mean_kl: f64,
    /// Positions at which the likeliest token differs.
    pub argmax_differs: usize,
    /// Positions compared.
    pub tokens: usize,
}

/// A model with its adapter merged, and what that changed.
pub struct Merged {
    /// The model with the adapter beside it.
    pub adapted: OpenModel,
    /// Its parameters with the adapter added, and no adapter.
    pub store: ParamStore,
    /// Merged against adapted.
    pub difference: Difference,
    /// What the adapter was merged into.
    pub into: Base,
    /// Why what the adapters were trained beside could not be compared with: then they were compared beside the model's own weights.
    pub not_compared: Option<String>,
}

/// Merges `adapters`, by their weights, into `into`, the weights of `model` or what they were trained beside, in f32, and
/// compares the merged model over `text` with the adapters beside what they were trained beside.
///
/// # Errors
/// If the model or an adapter cannot be read, or they do not belong together.
pub fn merge(model: &str, adapters: &[NamedAdapter], text: &str, into: Base) -> Result<Merged> {
    let own = || open_with(model, OpenOptions { adapters, base: Base::Original, dtype: Dtype::F32 });
    let (adapted, not_compared) = match open_adapted(model, adapters, Dtype::F32) {
        // Merging into the model's own weights needs nothing else.
        Err(error @ Error::Base { .. }) if into == Base::Original => (own()?, Some(error.to_string())),
        other => (other?, None),
    };
    let (Some(set), Some(first)) = (adapted.adapters(), adapters.first()) else {
        return Err(Error::Merge { path: model.into(), reason: "no adapter is named".into() });
    };
    let config = adapted.checkpoint().config();
    let (_, base_specs) = plan_params(|b| config.build(b))?;
    let changes_embedding = |plan: &AdapterPlan| plan.modules().any(|(_, module)| module.embedding);
    if let Some((adapter, _)) = adapters.iter().zip(set.plans()).find(|(_, plan)| changes_embedding(plan))
        && config.shape().tied
    {
        let reason =
            "its adapter changes the embedding but not the head, which is tied to it: merged they would have to part";
        return Err(Error::Merge { path: adapter.path.clone(), reason: reason.into() });
    }
    let base = adapted.base(into, &base_specs)?;
    let options = StoreOptions::frozen(candle_core::DType::F32, adapted.device().clone());
    let store = ParamStore::new(base_specs.clone(), &options, &set.merged(&base, &base_specs))?;
    let decoder = store.build(|b| config.build(b))?;
    let ids = compared_ids(&adapted, &first.path, text)?;
    let of = |decoder: &dyn Decoder| logits(decoder, adapted.device(), &ids);
    let difference = compare(&of(adapted.decoder())?, &of(decoder.as_ref())?);
    Ok(Merged { adapted, store, difference, into, not_compared })
}

/// The most tokens that are compared over.
pub(crate) const COMPARED: usize = 512;

/// The tokens of `text` that models are compared over.
pub(crate) fn compared_ids(model: &OpenModel, adapter: &Path, text: &str) -> Result<Vec<u32>> {
    let mut ids = model.tokenizer()?.encode(text, true)?;
    ids.truncate(model.checkpoint().config().shape().max_positions.min(COMPARED));
    if ids.is_empty() {
        let reason = "the text to compare over has no token; give another".into();
        return Err(Error::Merge { path: adapter.to_path_buf(), reason });
    }
    Ok(ids)
}

/// Logits of every position of `ids`.
pub(crate) fn logits(decoder: &dyn Decoder, device: &Device, ids: &[u32]) -> Result<Vec<Vec<f32>>> {
    let x = Tensor::from_slice(ids, (1, ids.len()), device).map_err(tallow_nn::Error::from)?;
    let mut cx = ForwardContext::causal(1, ids.len())?;
    let logits = no_grad(|| decoder.logits(&x, &mut cx))?;
    Ok(logits.squeeze(0).and_then(|x| x.to_vec2()).map_err(tallow_nn::Error::from)?)
}

pub(crate) fn compare(a: &[Vec<f32>], b: &[Vec<f32>]) -> Difference {
    let mut difference = Difference { max_logit_difference: 0.0, mean_kl: 0.0, argmax_differs: 0, tokens: a.len() };
    for (a, b) in a.iter().zip(b) {
        let log_softmax = |row: &[f32]| -> Vec<f64> {
            let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let lse = f64::from(top) + row.iter().map(|x| f64::from(x - top).exp()).sum::<f64>().ln();
            row.iter().map(|&x| f64::from(x) - lse).collect()
        };
        let argmax = |row: &[f32]| (0..row.len()).max_by(|&i, &j| row[i].total_cmp(&row[j]));
        let (p, q) = (log_softmax(a), log_softmax(b));
        difference.mean_kl += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        let furthest = a
            .iter()
            .zip(b)
            .map(|(x, y)| f64::from(x - y).abs())
            .fold(0.0, |a: f64, b| if b > a || b.is_nan() { b } else { a });
        // What is no number is no agreement.
        if furthest > difference.max_logit_difference || furthest.is_nan() {
            difference.max_logit_difference = furthest;
        }
        difference.argmax_differs += usize::from(argmax(a) != argmax(b));
    }
    difference.mean_kl /= a.len().max(1) as f64;
    difference
}

impl Merged {
    /// Writes the merged model and its tokenizer as a Hugging Face directory at `out`, whole or not at all.
    ///
    /// # Errors
    /// If it cannot be written; what was there is as it was then.
    pub fn save(&self, out: &Path) -> Result<()> {
        let dir = tallow_formats::AtomicDir::create(out)?;
        save_model(dir.path(), self.adapted.checkpoint().config(), &self.store)?;
        if let Ok(tokenizer) = self.adapted.tokenizer() {
            tokenizer.save(dir.path())?;
        }
        dir.commit_replacing()?;
        Ok(())
    }
}
