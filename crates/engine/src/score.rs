//! Log-probabilities of given ids.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use serde::Serialize;
use tallow_models::Decoder;
use tallow_nn::ForwardContext;
use tallow_ops::{KeyRanges, logprobs_top, no_grad};

use crate::generate::{check, windowed};
use crate::{Error, Result};

/// How likely a model finds a text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Score {
    /// The ids that were scored.
    pub ids: Vec<u32>,
    /// Natural log-probability of each id after those before it; `None` for the first.
    pub logprobs: Vec<Option<f64>>,
    /// The likeliest ids after each id and their log-probabilities, likeliest first; one entry more than there are
    /// predictions: the last is for the token after the text.
    pub top: Vec<Vec<(u32, f64)>>,
    /// Sum of the negative log-probabilities, nats.
    pub nll: f64,
    /// Ids that were predicted: all but the first.
    pub tokens: usize,
    /// `exp(nll / tokens)`; `None` where nothing was predicted.
    pub perplexity: Option<f64>,
}

/// Scores `ids`, with the `top` likeliest ids at each place. A text has no prompt: a prefix LM reads it causally, as it reads
/// what it answers. Never keeps tokens x vocabulary.
///
/// # Errors
/// If there are no ids, more than the model has positions, or one is outside its vocabulary.
pub fn score(model: &dyn Decoder, device: &Device, ids: &[u32], top: usize) -> Result<Score> {
    check(model, ids, 1)?;
    let t = ids.len();
    no_grad(|| {
        let mut cx = ForwardContext::causal(1, t)?;
        cx.ranges = Arc::new(windowed(KeyRanges::causal(1, t, t)?, model)?);
        let x = model.hidden(&Tensor::from_slice(ids, (1, t), device)?, &mut cx)?.squeeze(0)?;
        // The last position predicts a token that is not there; any target does, its log-probability is dropped.
        let targets: Vec<u32> = ids[1..].iter().chain(&ids[..1]).copied().collect();
        let head = model.head().table(None)?;
        let rows = logprobs_top(&x, head.table(), &targets, top)?;
        let mut logprobs = vec![None];
        logprobs.extend(rows[..t - 1].iter().map(|row| Some(f64::from(row.target))));
        let nll = -logprobs.iter().flatten().sum::<f64>();
        let tokens = t - 1;
        Ok::<_, Error>(Score {
            ids: ids.to_vec(),
            logprobs,
            top: rows.into_iter().map(|row| row.top.into_iter().map(|(id, p)| (id, f64::from(p))).collect()).collect(),
            nll,
            tokens,
            perplexity: (tokens > 0).then(|| (nll / tokens as f64).exp()),
        })
    })
}
