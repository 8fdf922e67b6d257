//! Processors that remove candidates: top-k, top-p, min-p. None of them ever removes the most likely token.

use std::cmp::Ordering;

use crate::{Candidates, Processor, Result};

/// Keeps the `k` most likely candidates, exactly `k` of them: the lowest ids win a tie. By selection, in linear time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TopK {
    /// How many to keep; 0 keeps all.
    pub k: usize,
}

impl Processor for TopK {
    fn apply(&self, candidates: &mut Candidates, _history: &[u32]) -> Result<()> {
        candidates.keep_top(self.k);
        Ok(())
    }
}

/// Keeps the shortest run of most likely candidates whose probability sums to at least `p` (nucleus sampling).
///
/// Probabilities are the softmax over the candidates that are left. A candidate stays while the sum of those above it
/// is below `p`, so at least one stays. Only about as many candidates are sorted as stay.
/// Source: Holtzman et al. 2020, <https://arxiv.org/abs/1904.09751>.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TopP {
    /// The probability to reach, in (0, 1]; 1 keeps all.
    pub p: f32,
}

impl Processor for TopP {
    fn apply(&self, candidates: &mut Candidates, _history: &[u32]) -> Result<()> {
        if self.p >= 1.0 {
            return Ok(());
        }
        let max = candidates.try_best()?.score;
        let total: f64 = candidates.as_slice().iter().map(|c| f64::from((c.score - max).exp())).sum();
        let enough = f64::from(self.p) * total;
        let (mut sum, mut last) = (0.0, None);
        candidates.visit_ranked(|candidate| {
            last = Some(candidate);
            sum += f64::from((candidate.score - max).exp());
            sum < enough
        });
        if let Some(last) = last {
            candidates.retain(|candidate| candidate.rank(&last) != Ordering::Greater);
        }
        Ok(())
    }
}

/// Keeps candidates whose probability is at least `min_p` times that of the most likely one.
///
/// The softmax cancels out of the comparison: `score >= max + ln(min_p)`.
/// Source: Nguyen et al. 2024, <https://arxiv.org/abs/2407.01082>.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MinP {
    /// The least ratio to the largest probability, in [0, 1]; 0 keeps all, 1 the most likely and its ties.
    pub min_p: f32,
}

impl Processor for MinP {
    fn apply(&self, candidates: &mut Candidates, _history: &[u32]) -> Result<()> {
        if self.min_p <= 0.0 {
            return Ok(());
        }
        let least = candidates.try_best()?.score + self.min_p.ln();
        candidates.retain(|candidate| candidate.score >= least);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(processor: &dyn Processor, logits: &[f32]) -> Vec<u32> {
        let mut candidates = Candidates::default();
        candidates.load(logits).unwrap();
        processor.apply(&mut candidates, &[]).unwrap();
        candidates.as_slice().iter().map(|c| c.id).collect()
    }

    fn logs(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn top_k_keeps_exactly_k() {
        assert_eq!(kept(&TopK { k: 2 }, &[0.0, 3.0, 1.0, 2.0]), [1, 3]);
        assert_eq!(kept(&TopK { k: 0 }, &[0.0, 3.0]), [0, 1]);
        assert_eq!(kept(&TopK { k: 9 }, &[0.0, 3.0]), [0, 1]);
        assert_eq!(kept(&TopK { k: 2 }, &[1.0; 5]), [0, 1]);
    }

    #[test]
    fn top_p_includes_the_token_that_crosses_the_line() {
        let logits = logs(&[0.15, 0.5, 0.05, 0.3]);
        assert_eq!(kept(&TopP { p: 0.4 }, &logits), [1]);
        assert_eq!(kept(&TopP { p: 0.6 }, &logits), [1, 3]);
        assert_eq!(kept(&TopP { p: 0.9 }, &logits), [0, 1, 3]);
        assert_eq!(kept(&TopP { p: 1.0 }, &logits), [0, 1, 2, 3]);
        assert_eq!(kept(&TopP { p: 1e-30 }, &logits), [1]);
    }

    #[test]
    fn top_p_renormalises_over_what_top_k_left() {
        let mut candidates = Candidates::default();
        candidates.load(&logs(&[0.4, 0.3, 0.2, 0.1])).unwrap();
        TopK { k: 2 }.apply(&mut candidates, &[]).unwrap();
        // 0.4 of 0.7 is 0.571: enough for 0.55, though 0.4 alone is not.
        TopP { p: 0.55 }.apply(&mut candidates, &[]).unwrap();
        assert_eq!(candidates.as_slice().len(), 1);
    }

    #[test]
    fn top_p_over_a_flat_vocabulary_crosses_many_blocks() {
        assert_eq!(kept(&TopP { p: 0.5 }, &vec![0.0; 10_000]).len(), 5_000);
    }

    #[test]
    fn min_p_compares_with_the_largest() {
        let logits = logs(&[0.5, 0.26, 0.24]);
        assert_eq!(kept(&MinP { min_p: 0.5 }, &logits), [0, 1]);
        assert_eq!(kept(&MinP { min_p: 0.0 }, &logits), [0, 1, 2]);
        assert_eq!(kept(&MinP { min_p: 1.0 }, &[2.0, 1.0, 2.0]), [0, 2]);
    }
}
