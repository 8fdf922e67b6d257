//! The tokens that may still be drawn, with their scores.

use std::cmp::Ordering;

use crate::{Result, SamplerError};

/// One token that may still be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// The token id.
    pub id: u32,
    /// Its unnormalised log probability: the model's logit, then what the processors made of it. Never NaN or +inf.
    pub score: f32,
}

impl Candidate {
    /// Most likely first, then the lowest id: the one order in which candidates are ranked, so that a tie always
    /// falls the same way.
    pub fn rank(&self, other: &Candidate) -> Ordering {
        // Scores are never NaN, and `partial_cmp` holds -0.0 and 0.0 equal where `total_cmp` would not.
        other.score.partial_cmp(&self.score).unwrap_or(Ordering::Equal).then(self.id.cmp(&other.id))
    }
}

/// The tokens that may still be drawn, always in ascending order of id.
///
/// A processor changes scores or removes candidates; it never reorders them, so the draw, which walks them in order,
/// gives the same token whether a filter that removes nothing is on or off.
#[derive(Debug, Clone, Default)]
pub struct Candidates {
    items: Vec<Candidate>,
    vocab_size: usize,
    scratch: Vec<Candidate>,
}

impl Candidates {
    /// Starts again from the logits of one position: one candidate for each id of the vocabulary.
    ///
    /// Errors: no logits, a logit that is NaN or +inf, or none above -inf.
    pub fn load(&mut self, logits: &[f32]) -> Result<()> {
        check_logits(logits)?;
        self.load_checked(logits);
        Ok(())
    }

    /// As [`load`](Self::load), of logits that passed the check.
    pub(crate) fn load_checked(&mut self, logits: &[f32]) {
        self.vocab_size = logits.len();
        self.items.clear();
        self.items.extend((0u32..).zip(logits).map(|(id, &score)| Candidate { id, score }));
    }

    /// The number of ids in the vocabulary, removed candidates included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The candidates in ascending order of id.
    pub fn as_slice(&self) -> &[Candidate] {
        &self.items
    }

    /// The score of one token, or `None` if it was removed or is outside the vocabulary.
    pub fn score_mut(&mut self, id: u32) -> Option<&mut f32> {
        // As long as nothing was removed, the index is the id.
        let index = if self.items.len() == self.vocab_size {
            usize::try_from(id).ok()?
        } else {
            self.items.binary_search_by_key(&id, |candidate| candidate.id).ok()?
        };
        self.items.get_mut(index).map(|candidate| &mut candidate.score)
    }

    /// Replaces each score by `f(candidate)`. `f` must not return NaN; +inf is held to the largest finite value.
    pub fn map_scores(&mut self, mut f: impl FnMut(Candidate) -> f32) {
        for candidate in &mut self.items {
            candidate.score = f(*candidate).min(f32::MAX);
        }
    }

    /// Keeps the candidates that `keep` accepts.
    pub fn retain(&mut self, keep: impl FnMut(&Candidate) -> bool) {
        self.items.retain(keep);
    }

    /// The largest score, -inf where nothing is left.
    pub fn max_score(&self) -> f32 {
        largest(&self.items, |candidate| candidate.score)
    }

    /// The most likely candidate, the lowest id of those that tie; `None` if none is left above -inf.
    pub fn best(&self) -> Option<Candidate> {
        let max = self.max_score();
        let found = self.items.iter().find(|candidate| candidate.score == max);
        found.copied().filter(|_| max > f32::NEG_INFINITY)
    }

    /// As [`best`](Self::best), with an error where nothing is left.
    pub fn try_best(&self) -> Result<Candidate> {
        self.best().ok_or(SamplerError::NothingPossible { len: self.items.len() })
    }

    /// Keeps the `count` most likely candidates, the lowest ids of those that tie. Linear in the number of candidates.
    pub fn keep_top(&mut self, count: usize) {
        if count == 0 || count >= self.items.len() {
            return;
        }
        // At least `count` blocks have a score of at least the count-th largest of their maxima: nothing below it stays.
        let len = self.items.len() / count.saturating_mul(4);
        if len > 1 {
            let mut maxima: Vec<f32> = self.items.chunks(len).map(|block| largest(block, |c| c.score)).collect();
            let (_, bound, _) = maxima.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
            let bound = *bound;
            self.items.retain(|candidate| candidate.score >= bound);
        }
        self.scratch.clear();
        self.scratch.extend_from_slice(&self.items);
        if count >= self.scratch.len() {
            return;
        }
        let (_, last, _) = self.scratch.select_nth_unstable_by(count - 1, Candidate::rank);
        let last = *last;
        self.items.retain(|candidate| candidate.rank(&last) != Ordering::Greater);
    }

    /// Keeps the shortest run of most likely candidates whose weights sum to at least `enough`; all of them where even
    /// the whole sum is less. `weight` must not grow as the score falls. Linear in the number of candidates: the half
    /// that holds the end of the run is selected, weighed and halved again.
    pub fn keep_mass(&mut self, enough: f64, weight: impl Fn(&Candidate) -> f64) {
        self.scratch.clear();
        self.scratch.extend_from_slice(&self.items);
        let mut rest = self.scratch.as_mut_slice();
        let mut missing = enough;
        while rest.len() > 1 {
            let middle = rest.len() / 2;
            rest.select_nth_unstable_by(middle - 1, Candidate::rank);
            let (head, tail) = rest.split_at_mut(middle);
            let mass: f64 = head.iter().map(&weight).sum();
            if mass >= missing {
                rest = head;
            } else {
                missing -= mass;
                rest = tail;
            }
        }
        if let [last] = *rest {
            self.items.retain(|candidate| candidate.rank(&last) != Ordering::Greater);
        }
    }

    /// Calls `visit` with the candidates from the most likely down, until it answers `false` or none is left. Sorts only
    /// about as many as were visited: blocks of growing size are selected, then sorted.
    pub fn visit_ranked(&mut self, mut visit: impl FnMut(Candidate) -> bool) {
        const FIRST_BLOCK: usize = 64;
        self.scratch.clear();
        self.scratch.extend_from_slice(&self.items);
        let mut rest = self.scratch.as_mut_slice();
        let mut block = FIRST_BLOCK;
        while !rest.is_empty() {
            let len = block.min(rest.len());
            if len < rest.len() {
                rest.select_nth_unstable_by(len - 1, Candidate::rank);
            }
            let (head, tail) = rest.split_at_mut(len);
            head.sort_unstable_by(Candidate::rank);
            for candidate in head.iter() {
                if !visit(*candidate) {
                    return;
                }
            }
            rest = tail;
            block = block.saturating_mul(4);
        }
    }
}

/// The largest score, -inf of none. No score is NaN.
fn largest<T: Copy>(items: &[T], score: impl Fn(T) -> f32) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 16];
    let mut chunks = items.chunks_exact(lanes.len());
    for chunk in &mut chunks {
        for (lane, &item) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, score(item));
        }
    }
    let rest = chunks.remainder().iter().map(|&item| score(item));
    rest.chain(lanes).fold(f32::NEG_INFINITY, larger)
}

/// The largest logit. Refuses logits from which no token can be drawn: none, too many for a 32-bit id, NaN, +inf, or all -inf.
pub(crate) fn check_logits(logits: &[f32]) -> Result<f32> {
    if logits.is_empty() {
        return Err(SamplerError::EmptyLogits);
    }
    if u32::try_from(logits.len()).is_err() {
        return Err(SamplerError::TooManyLogits { len: logits.len() });
    }
    // Every logit is looked at, without a way out of the loop, so that the compiler can take several at once.
    let all_fit = logits.iter().fold(true, |fit, &logit| fit & (logit < f32::INFINITY));
    if !all_fit {
        let broken = (0u32..).zip(logits).find(|(_, logit)| logit.is_nan() || **logit == f32::INFINITY);
        return Err(broken.map_or(SamplerError::EmptyLogits, |(id, &value)| SamplerError::BadLogit { id, value }));
    }
    let max = largest(logits, |logit| logit);
    if max == f32::NEG_INFINITY {
        return Err(SamplerError::NothingPossible { len: logits.len() });
    }
    Ok(max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loaded(logits: &[f32]) -> Candidates {
        let mut candidates = Candidates::default();
        candidates.load(logits).unwrap();
        candidates
    }

    #[test]
    fn best_is_the_lowest_id_of_a_tie_and_zero_has_no_sign() {
        assert_eq!(loaded(&[-0.0, 0.0, -1.0]).best().unwrap().id, 0);
        assert_eq!(loaded(&[1.0, 2.0, 2.0]).best().unwrap().id, 1);
    }

    #[test]
    fn keep_top_is_exact_under_ties() {
        let mut candidates = loaded(&[1.0, 5.0, 5.0, 5.0, 0.0]);
        candidates.keep_top(2);
        let ids: Vec<u32> = candidates.as_slice().iter().map(|c| c.id).collect();
        assert_eq!(ids, [1, 2]);
    }

    #[test]
    fn score_mut_finds_ids_before_and_after_a_removal() {
        let mut candidates = loaded(&[1.0, 2.0, 3.0]);
        assert_eq!(candidates.score_mut(2).copied(), Some(3.0));
        candidates.retain(|c| c.id != 1);
        assert_eq!(candidates.score_mut(2).copied(), Some(3.0));
        assert_eq!(candidates.score_mut(1), None);
        assert_eq!(candidates.score_mut(9), None);
    }

    #[test]
    fn visit_ranked_sorts_across_blocks() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 617) % 101) as f32).collect();
        let mut expected = loaded(&logits).as_slice().to_vec();
        expected.sort_by(Candidate::rank);
        let mut seen = Vec::new();
        loaded(&logits).visit_ranked(|candidate| {
            seen.push(candidate);
            true
        });
        assert_eq!(seen, expected);
    }

    #[test]
    fn logits_that_cannot_be_sampled_are_refused() {
        assert_eq!(check_logits(&[]), Err(SamplerError::EmptyLogits));
        assert!(matches!(check_logits(&[0.0, f32::NAN]), Err(SamplerError::BadLogit { id: 1, .. })));
        assert!(matches!(check_logits(&[f32::INFINITY]), Err(SamplerError::BadLogit { id: 0, .. })));
        assert_eq!(check_logits(&[f32::NEG_INFINITY; 3]), Err(SamplerError::NothingPossible { len: 3 }));
        assert_eq!(check_logits(&[f32::NEG_INFINITY, -3.0]), Ok(-3.0));
    }
}
