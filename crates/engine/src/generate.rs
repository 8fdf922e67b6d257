//! Continuing one row of ids.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use tallow_models::Decoder;
use tallow_nn::{ContiguousCache, ForwardContext, KvCache};
use tallow_ops::{KeyRanges, head_logits, no_grad};
use tallow_sampler::{Sampler, SamplerOptions};

use crate::{Error, Result};

/// Tokens of a prompt that are run at once, so that a long prompt needs bounded memory.
const PROMPT_CHUNK: usize = 512;

/// How to continue.
#[derive(Clone, Debug, Default)]
pub struct GenerateOptions {
    /// The most tokens to generate; generation also ends where the model's positions do.
    pub max_tokens: usize,
    /// How a token is drawn.
    pub sampler: SamplerOptions,
    /// Ids that end the text; the one that ended it is not part of the result.
    pub stop_ids: Vec<u32>,
    /// Weight of each adapter that the model holds; `None` for those it was opened with.
    pub adapters: Option<Arc<[f32]>>,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// A stop id, or the caller said so.
    Stop,
    /// `max_tokens`, or the model has no more positions.
    Length,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The new ids, without the prompt and without a stop id.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// Continues `prompt`. `on_token` gets each new id as it is drawn and returns whether to go on.
///
/// A prefix LM ([`Shape::prefix_lm`](tallow_models::Shape)) sees the whole of `prompt` both ways, as it was trained to.
///
/// # Errors
/// If the prompt is empty, longer than the model's positions, or has an id outside its vocabulary.
pub fn generate(
    model: &dyn Decoder,
    device: &Device,
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(u32) -> bool,
) -> Result<Generation> {
    let limit = check(model, prompt, 1)?;
    let shape = model.shape();
    if let Some(window) = shape.sliding_window.filter(|&window| shape.prefix_lm && window < prompt.len()) {
        return Err(Error::PrefixWindow { given: prompt.len(), window });
    }
    let mut sampler = Sampler::new(options.sampler.clone())?;
    let capacity = limit.min(prompt.len().saturating_add(options.max_tokens));
    let mut cache = ContiguousCache::new(model.shape().num_layers, capacity, model.head().dtype(), device);
    let mut history = prompt.to_vec();
    let mut pending = prompt.to_vec();
    let mut finish_reason = FinishReason::Length;
    for _ in 0..options.max_tokens {
        if history.len() > capacity {
            break;
        }
        let logits = no_grad(|| next_logits(model, device, &pending, &mut cache, options.adapters.as_ref()))?;
        let id = sampler.sample(&logits, &history)?.id;
        if options.stop_ids.contains(&id) {
            finish_reason = FinishReason::Stop;
            break;
        }
        history.push(id);
        pending = vec![id];
        if !on_token(id) {
            finish_reason = FinishReason::Stop;
            break;
        }
    }
    Ok(Generation { ids: history.split_off(prompt.len()), finish_reason })
}

/// Runs `ids` behind what the cache holds; the logits of the token after them, f32 `[v]`. A prefix LM sees the first of them,
/// which are the prompt, both ways: all of it is run at once.
fn next_logits(
    model: &dyn Decoder,
    device: &Device,
    ids: &[u32],
    cache: &mut ContiguousCache,
    adapters: Option<&Arc<[f32]>>,
) -> Result<Vec<f32>> {
    let mut last = None;
    let prefix = model.shape().prefix_lm && cache.is_empty();
    for chunk in ids.chunks(if prefix { ids.len() } else { PROMPT_CHUNK }) {
        let (held, t) = (cache.len(), chunk.len());
        let ranges = match prefix {
            true => KeyRanges::bidirectional(1, t, None)?,
            false => windowed(KeyRanges::causal(1, t, held + t)?, model)?,
        };
        let positions = (held as u32..(held + t) as u32).collect();
        let mut cx = ForwardContext::whole(Arc::new(positions), Arc::new(ranges));
        cx.cache = Some(cache);
        cx.adapters = adapters.cloned();
        let x = model.hidden(&Tensor::from_slice(chunk, (1, t), device)?, &mut cx)?;
        last = Some(x.narrow(1, t - 1, 1)?);
    }
    let x = last.ok_or(Error::Empty { needed: 1 })?;
    Ok(head_logits(&x.squeeze(0)?, &model.head().weight_with(adapters.map(|weights| &weights[..]))?)?)
}

/// The model's sliding window applied to what a query sees.
pub(crate) fn windowed(ranges: KeyRanges, model: &dyn Decoder) -> Result<KeyRanges> {
    Ok(match model.shape().sliding_window {
        Some(window) => ranges.with_window(window)?,
        None => ranges,
    })
}

/// Refuses ids that the model cannot take; returns the number of its positions.
pub(crate) fn check(model: &dyn Decoder, ids: &[u32], needed: usize) -> Result<usize> {
    let (vocab_size, limit) = (model.shape().vocab_size, model.shape().max_positions);
    if ids.len() < needed {
        return Err(Error::Empty { needed });
    }
    if ids.len() > limit {
        return Err(Error::Context { given: ids.len(), limit });
    }
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(&id) => Err(Error::Vocabulary { id, vocab_size }),
        None => Ok(limit),
    }
}
