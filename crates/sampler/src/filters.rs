//! Processors that remove candidates: top-k, top-p, min-p. None of them ever removes the most likely token.

use crate::exp::{exp, sum_exp};
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
/// is below `p`, so at least one stays. By weighted selection, in linear time: nothing is sorted.
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
        let total = sum_exp(candidates.as_slice(), max, |c| c.score);
        let (p, len) = (f64::from(self.p), candidates.as_slice().len() as f64);
        // All tokens this unlikely together stay within the 1 - p that goes: no need to rank them.
        let hopeless = (1.0 - p) * total / len;
        candidates.retain(|candidate| f64::from(exp(candidate.score - max)) >= hopeless);
        candidates.keep_mass(p * total, |candidate| f64::from(exp(candidate.score - max)));
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
    fn top_p_breaks_ties_by_the_lowest_id() {
        assert_eq!(kept(&TopP { p: 0.5 }, &vec![0.0; 10_000]), (0..5_000).collect::<Vec<u32>>());
    }

    #[test]
    fn top_p_agrees_with_a_full_sort() {
        for size in [1u32, 2, 63, 64, 65, 700] {
            let logits: Vec<f32> = (0..size).map(|i| ((i * 7919 % 541) as f32) * 0.013 - 3.0).collect();
            let mut ranked: Vec<(u32, f64)> = (0..size).zip(logits.iter().map(|&l| f64::from(l).exp())).collect();
            ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let total: f64 = ranked.iter().map(|r| r.1).sum();
            for p in [0.01f32, 0.33, 0.87, 0.999] {
                let mut before = 0.0;
                let mut expected = Vec::new();
                for (id, weight) in &ranked {
                    if before >= f64::from(p) * total {
                        break;
                    }
                    expected.push(*id);
                    before += weight;
                }
                expected.sort_unstable();
                assert_eq!(kept(&TopP { p }, &logits), expected, "{size} tokens, p = {p}");
            }
        }
    }

    #[test]
    fn min_p_compares_with_the_largest() {
        let logits = logs(&[0.5, 0.26, 0.24]);
        assert_eq!(kept(&MinP { min_p: 0.5 }, &logits), [0, 1]);
        assert_eq!(kept(&MinP { min_p: 0.0 }, &logits), [0, 1, 2]);
        assert_eq!(kept(&MinP { min_p: 1.0 }, &[2.0, 1.0, 2.0]), [0, 2]);
    }
}
