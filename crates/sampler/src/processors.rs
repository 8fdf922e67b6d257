//! Processors that change scores: penalties, bias, temperature.

use std::collections::BTreeMap;
use std::fmt::Debug;

use crate::{Candidates, Result, SamplerError, SamplerOptions};

/// One step between the model's logits and the draw.
///
/// A processor is a pure function of the candidates and the tokens so far: it keeps no state, so a sequence can be
/// rolled back or resumed at any token. Grammars and other constraints implement it too; see
/// [`Sampler::with_processor`](crate::Sampler::with_processor).
pub trait Processor: Debug + Send + Sync {
    /// Changes scores or removes candidates. `history` is every token of the sequence so far, prompt included.
    fn apply(&self, candidates: &mut Candidates, history: &[u32]) -> Result<()>;
}

/// Makes tokens that were seen lately less likely (or more, with negative values).
///
/// For a token seen `count > 0` times among the last `last_n`: first the repetition penalty `r`, `l / r` for a positive
/// logit and `l * r` otherwise, then `l - count * frequency - presence`. The order and the formulas are llama.cpp's.
#[derive(Debug, Clone, PartialEq)]
pub struct Penalties {
    /// Divisor of positive logits and factor of the others.
    pub repetition: f32,
    /// Subtracted once.
    pub presence: f32,
    /// Subtracted for each time the token was seen.
    pub frequency: f32,
    /// How many of the last tokens to look at; `None` for all.
    pub last_n: Option<usize>,
}

impl Penalties {
    /// The penalties that `options` ask for, or `None` where all of them are off.
    pub fn from_options(options: &SamplerOptions) -> Option<Self> {
        options.has_penalties().then(|| Self {
            repetition: options.repetition_penalty,
            presence: options.presence_penalty,
            frequency: options.frequency_penalty,
            last_n: usize::try_from(options.repeat_last_n).ok(),
        })
    }
}

impl Processor for Penalties {
    fn apply(&self, candidates: &mut Candidates, history: &[u32]) -> Result<()> {
        let window = self.last_n.map_or(history, |n| &history[history.len().saturating_sub(n)..]);
        let mut counts = BTreeMap::new();
        for &id in window {
            *counts.entry(id).or_insert(0u32) += 1;
        }
        let vocab_size = candidates.vocab_size();
        for (id, count) in counts {
            check_id("history", id, vocab_size)?;
            if let Some(score) = candidates.score_mut(id) {
                // A masked token stays masked, and a penalty alone, however large the logit, masks none.
                if *score == f32::NEG_INFINITY {
                    continue;
                }
                let scaled = if *score > 0.0 { *score / self.repetition } else { *score * self.repetition };
                let scaled = scaled.clamp(f32::MIN, f32::MAX);
                *score = (scaled - count as f32 * self.frequency - self.presence).clamp(f32::MIN, f32::MAX);
            }
        }
        Ok(())
    }
}

/// Adds a constant to the logits of chosen tokens; `-inf` forbids a token.
#[derive(Debug, Clone, PartialEq)]
pub struct LogitBias {
    /// `(token id, bias)`, each id once.
    pub bias: Vec<(u32, f32)>,
}

impl Processor for LogitBias {
    fn apply(&self, candidates: &mut Candidates, _history: &[u32]) -> Result<()> {
        let vocab_size = candidates.vocab_size();
        for &(id, bias) in &self.bias {
            check_id("logit_bias", id, vocab_size)?;
            if let Some(score) = candidates.score_mut(id) {
                *score = (*score + bias).min(f32::MAX);
            }
        }
        Ok(())
    }
}

/// Divides the logits by the temperature `t > 0`, after moving the largest to 0: the same softmax as `l / t`, with no
/// overflow however small `t` is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Temperature {
    /// The temperature, above 0.
    pub t: f32,
}

impl Processor for Temperature {
    fn apply(&self, candidates: &mut Candidates, _history: &[u32]) -> Result<()> {
        let max = candidates.try_best()?.score;
        candidates.map_scores(|candidate| (candidate.score - max) / self.t);
        Ok(())
    }
}

fn check_id(what: &'static str, id: u32, vocab_size: usize) -> Result<()> {
    if usize::try_from(id).is_ok_and(|id| id < vocab_size) {
        Ok(())
    } else {
        Err(SamplerError::UnknownToken { what, id, vocab_size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(processor: &dyn Processor, logits: &[f32], history: &[u32]) -> Result<Vec<f32>> {
        let mut candidates = Candidates::default();
        candidates.load(logits)?;
        processor.apply(&mut candidates, history)?;
        Ok(candidates.as_slice().iter().map(|c| c.score).collect())
    }

    #[test]
    fn penalties_follow_the_formula_and_the_window() {
        let penalties = Penalties { repetition: 2.0, presence: 0.5, frequency: 0.25, last_n: Some(3) };
        // Token 0 is outside the window; 1 was seen twice, 2 once.
        let got = scores(&penalties, &[4.0, 4.0, -4.0, 1.0], &[0, 1, 1, 2]).unwrap();
        assert_eq!(got, [4.0, 2.0 - 0.5 - 0.5, -8.0 - 0.25 - 0.5, 1.0]);
        let all = Penalties { last_n: None, ..penalties };
        assert_eq!(scores(&all, &[4.0, 0.0, 0.0], &[0]).unwrap()[0], 2.0 - 0.25 - 0.5);
    }

    #[test]
    fn a_penalty_that_overflows_stays_finite() {
        let penalties = Penalties { repetition: 1e-38, presence: -f32::MAX, frequency: 0.0, last_n: None };
        assert_eq!(scores(&penalties, &[100.0, 0.0], &[0]).unwrap()[0], f32::MAX);
        let masked = scores(&penalties, &[f32::NEG_INFINITY, 0.0], &[0]).unwrap();
        assert_eq!(masked[0], f32::NEG_INFINITY);
    }

    #[test]
    fn bias_adds_forbids_and_refuses_unknown_ids() {
        let bias = LogitBias { bias: vec![(0, 1.5), (2, f32::NEG_INFINITY)] };
        assert_eq!(scores(&bias, &[1.0, 1.0, 1.0], &[]).unwrap(), [2.5, 1.0, f32::NEG_INFINITY]);
        let error = scores(&bias, &[1.0, 1.0], &[]).unwrap_err();
        assert_eq!(error.to_string(), "logit_bias names token 2, but the logits have 2 entries (ids 0 to 1)");
    }

    #[test]
    fn history_outside_the_vocabulary_is_refused() {
        let penalties = Penalties { repetition: 1.1, presence: 0.0, frequency: 0.0, last_n: None };
        let error = scores(&penalties, &[1.0], &[7]).unwrap_err();
        assert!(matches!(error, SamplerError::UnknownToken { what: "history", id: 7, vocab_size: 1 }));
    }

    #[test]
    fn temperature_shifts_and_never_overflows() {
        let got = scores(&Temperature { t: 0.5 }, &[1.0, 3.0, f32::NEG_INFINITY], &[]).unwrap();
        assert_eq!(got, [-4.0, 0.0, f32::NEG_INFINITY]);
        let tiny = scores(&Temperature { t: 1e-40 }, &[f32::MAX, f32::MIN], &[]).unwrap();
        assert_eq!(tiny, [0.0, f32::NEG_INFINITY]);
    }
}
