//! Log probabilities of the model's own distribution: natural logarithms, exponentials in f32, sums in f64.

use crate::candidates::check_logits;
use crate::exp::sum_exp;
use crate::{Candidates, Result, SamplerError};

/// `ln sum_i exp(logits[i])`, computed as `max + ln sum_i exp(logits[i] - max)`.
///
/// Errors: no logits, a logit that is NaN or +inf, or none above -inf.
pub fn log_sum_exp(logits: &[f32]) -> Result<f64> {
    let (max, log_sum) = normaliser(logits)?;
    Ok(max + log_sum)
}

/// `logits[id] - log_sum_exp(logits)`: the log probability of one token, -inf for a masked one.
///
/// Errors: those of [`log_sum_exp`], or an `id` outside the vocabulary.
pub fn log_softmax_at(logits: &[f32], id: u32) -> Result<f32> {
    let max = check_logits(logits)?;
    log_softmax_checked(logits, max, id)
}

/// As [`log_softmax_at`], of logits that passed the check, with the largest of them.
pub(crate) fn log_softmax_checked(logits: &[f32], max: f32, id: u32) -> Result<f32> {
    let logit = usize::try_from(id).ok().and_then(|index| logits.get(index));
    let logit = logit.ok_or(SamplerError::UnknownToken { what: "log_softmax_at", id, vocab_size: logits.len() })?;
    let log_sum = sum_exp(logits, max, |logit| logit).ln();
    Ok((f64::from(*logit) - f64::from(max) - log_sum) as f32)
}

/// The `k` most likely tokens with their log probabilities, most likely first, the lowest id first in a tie. Fewer where
/// the vocabulary is smaller.
///
/// Errors: those of [`log_sum_exp`].
///
/// ```
/// let top = tallow_sampler::top_logprobs(&[0.0, 2f32.ln(), 0.0], 2)?;
/// assert_eq!(top[0].0, 1);
/// assert!((top[0].1 - 0.5f32.ln()).abs() < 1e-6 && top[1].0 == 0);
/// # Ok::<(), tallow_sampler::SamplerError>(())
/// ```
pub fn top_logprobs(logits: &[f32], k: usize) -> Result<Vec<(u32, f32)>> {
    let (max, log_sum) = normaliser(logits)?;
    let mut candidates = Candidates::default();
    candidates.load(logits)?;
    let mut top = Vec::with_capacity(k.min(logits.len()));
    if k > 0 {
        candidates.visit_ranked(|candidate| {
            top.push((candidate.id, (f64::from(candidate.score) - max - log_sum) as f32));
            top.len() < k
        });
    }
    Ok(top)
}

/// `(max, ln sum_i exp(logits[i] - max))`. Kept apart: subtracted one after the other, huge logits lose nothing.
fn normaliser(logits: &[f32]) -> Result<(f64, f64)> {
    let max = check_logits(logits)?;
    Ok((f64::from(max), sum_exp(logits, max, |logit| logit).ln()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_a_direct_computation_in_f64() {
        let logits: Vec<f32> = (0..5_000).map(|i| ((i * 37 % 1009) as f32) * 0.03 - 12.0).collect();
        let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        for id in [0u32, 17, 4_999] {
            let expected = f64::from(logits[id as usize]) - total.ln();
            let got = f64::from(log_softmax_at(&logits, id).unwrap());
            assert!((got - expected).abs() < 1e-5, "{got} {expected}");
        }
    }

    #[test]
    fn large_logits_do_not_overflow_and_masks_are_minus_infinity() {
        let logits = [3e38, 3e38, f32::NEG_INFINITY];
        assert!((log_softmax_at(&logits, 0).unwrap() - 0.5f32.ln()).abs() < 1e-6);
        assert_eq!(log_softmax_at(&logits, 2).unwrap(), f32::NEG_INFINITY);
    }

    #[test]
    fn top_logprobs_orders_and_caps() {
        let top = top_logprobs(&[1.0, 3.0, 3.0, 2.0], 3).unwrap();
        assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(top_logprobs(&[1.0, 2.0], usize::MAX).unwrap().len(), 2);
        assert!(top_logprobs(&[1.0, 2.0], 0).unwrap().is_empty());
        let sum: f64 = top_logprobs(&[1.0, 2.0, 0.5], 3).unwrap().iter().map(|t| f64::from(t.1).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
    }

    #[test]
    fn bad_input_is_an_error() {
        assert!(log_softmax_at(&[1.0], 1).is_err());
        assert!(log_softmax_at(&[], 0).is_err());
        assert!(top_logprobs(&[f32::NAN], 1).is_err());
    }
}
