//! The pipeline and the draw.

use crate::candidates::check_logits;
use crate::exp::{exp, is_above_zero, sum_exp};
use crate::logprobs::log_softmax_checked;
use crate::rng::uniform;
use crate::{
    Candidate, Candidates, LogitBias, MinP, Penalties, Processor, Result, SamplerError, SamplerOptions, Temperature,
    TopK, TopP,
};

/// A token that was chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// The token id.
    pub id: u32,
    /// Its natural log probability under the model's own distribution, before any processor: what evaluations and
    /// OpenAI's `logprobs` report.
    pub logprob: f32,
    /// Its natural log probability under the distribution that it was drawn from, after all processors; 0 when greedy.
    /// What importance weights of reinforcement learning need.
    pub drawn_logprob: f32,
    /// How many candidates could have been drawn.
    pub num_candidates: usize,
}

/// Chooses one token after another. Holds buffers, but no state that matters: the token depends on the options, the
/// logits, the history and the position alone.
#[derive(Debug)]
pub struct Sampler {
    options: SamplerOptions,
    /// Penalties, bias and the caller's own processors: they see and change logits.
    logit_processors: Vec<Box<dyn Processor>>,
    /// The caller's processors may write anything, so what they leave is checked.
    has_foreign_processor: bool,
    /// Temperature and filters; empty when greedy.
    warpers: Vec<Box<dyn Processor>>,
    candidates: Candidates,
    block_sums: Vec<f64>,
}

impl Sampler {
    /// Checks the options and builds the pipeline; processors that are off are left out.
    pub fn new(options: SamplerOptions) -> Result<Self> {
        options.validate()?;
        let mut logit_processors: Vec<Box<dyn Processor>> = Vec::new();
        if let Some(penalties) = Penalties::from_options(&options) {
            logit_processors.push(Box::new(penalties));
        }
        if !options.logit_bias.is_empty() {
            logit_processors.push(Box::new(LogitBias { bias: options.logit_bias.clone() }));
        }
        let mut warpers: Vec<Box<dyn Processor>> = Vec::new();
        if options.temperature > 0.0 {
            warpers.push(Box::new(Temperature { t: options.temperature }));
            if options.top_k > 0 {
                warpers.push(Box::new(TopK { k: options.top_k }));
            }
            if options.top_p < 1.0 {
                warpers.push(Box::new(TopP { p: options.top_p }));
            }
            if options.min_p > 0.0 {
                warpers.push(Box::new(MinP { min_p: options.min_p }));
            }
        }
        let (candidates, block_sums) = (Candidates::default(), Vec::new());
        Ok(Self { options, logit_processors, has_foreign_processor: false, warpers, candidates, block_sums })
    }

    /// Adds a processor, after the bias and those added before, ahead of the temperature: a grammar, a ban list, ...
    pub fn with_processor(mut self, processor: Box<dyn Processor>) -> Self {
        self.logit_processors.push(processor);
        self.has_foreign_processor = true;
        self
    }

    /// The options that it was made with.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// Chooses the token that follows `history`, all tokens of the sequence so far, prompt included. Its length is the
    /// position that keys the draw.
    ///
    /// `logits` has one entry for each id of the vocabulary; -inf is a masked token. Errors: no logits, NaN or +inf,
    /// nothing above -inf (before or after the processors), a `logit_bias` or a penalised token outside the vocabulary.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<Sampled> {
        let position = u64::try_from(history.len()).unwrap_or(u64::MAX);
        self.sample_at(logits, history, position)
    }

    /// As [`sample`](Self::sample), with the position given: for callers that keep only the end of the history.
    pub fn sample_at(&mut self, logits: &[f32], history: &[u32], position: u64) -> Result<Sampled> {
        let max = self.process(logits, history)?;
        if self.options.temperature == 0.0 {
            let id = self.candidates.try_best()?.id;
            return Ok(Sampled {
                id,
                logprob: log_softmax_checked(logits, max, id)?,
                drawn_logprob: 0.0,
                num_candidates: 1,
            });
        }
        let top = self.candidates.try_best()?.score;
        let target = uniform(self.options.seed, position, 0);
        let drawn = draw(self.candidates.as_slice(), top, target, &mut self.block_sums);
        Ok(Sampled {
            id: drawn.id,
            logprob: log_softmax_checked(logits, max, drawn.id)?,
            drawn_logprob: drawn.logprob,
            num_candidates: self.candidates.as_slice().iter().filter(|c| is_above_zero(c.score - top)).count(),
        })
    }

    /// The distribution that [`sample`](Self::sample) draws from: `(id, probability)` of every token that may be drawn,
    /// in ascending order of id. Greedy is one token with probability 1. Speculative decoding compares two of these.
    pub fn distribution(&mut self, logits: &[f32], history: &[u32]) -> Result<Vec<(u32, f64)>> {
        self.process(logits, history)?;
        if self.options.temperature == 0.0 {
            return Ok(vec![(self.candidates.try_best()?.id, 1.0)]);
        }
        let top = self.candidates.try_best()?.score;
        let total = sum_exp(self.candidates.as_slice(), top, |c| c.score);
        let weighed = self.candidates.as_slice().iter().map(|c| (c.id, f64::from(exp(c.score - top)) / total));
        Ok(weighed.filter(|(_, probability)| *probability > 0.0).collect())
    }

    /// Runs the pipeline over the logits; the largest of them.
    fn process(&mut self, logits: &[f32], history: &[u32]) -> Result<f32> {
        let max = check_logits(logits)?;
        self.candidates.load_checked(logits);
        for processor in &self.logit_processors {
            processor.apply(&mut self.candidates, history)?;
        }
        if self.has_foreign_processor {
            let broken = |score: f32| score.is_nan() || score == f32::INFINITY;
            if let Some(c) = self.candidates.as_slice().iter().find(|c| broken(c.score)) {
                return Err(SamplerError::BadLogit { id: c.id, value: c.score });
            }
        }
        for warper in &self.warpers {
            warper.apply(&mut self.candidates, history)?;
        }
        Ok(max)
    }
}

/// How many candidates are summed before the draw looks closer.
const BLOCK: usize = 1024;

/// A candidate that was drawn, and the log of its probability.
struct Drawn {
    id: u32,
    logprob: f32,
}

/// The first candidate at which the running sum of probabilities exceeds `u`, in [0, 1): whole blocks are skipped by
/// their sums. Never one of probability 0, even where rounding leaves the target above the sum; `top` is the largest
/// score, and finite.
fn draw(candidates: &[Candidate], top: f32, u: f64, block_sums: &mut Vec<f64>) -> Drawn {
    block_sums.clear();
    block_sums.extend(candidates.chunks(BLOCK).map(|block| sum_exp(block, top, |c| c.score)));
    let total: f64 = block_sums.iter().sum();
    let target = u * total;
    // The block that the target falls in, and the sum ahead of it.
    let (mut start, mut before, mut running) = (0, 0.0, 0.0);
    for (index, &sum) in block_sums.iter().enumerate() {
        if sum > 0.0 {
            (start, before) = (index * BLOCK, running);
            running += sum;
            if target < running {
                break;
            }
        }
    }
    let (mut sum, mut last) = (before, (0, 0.0));
    for candidate in candidates[start..].iter().take(BLOCK) {
        let weight = f64::from(exp(candidate.score - top));
        if weight > 0.0 {
            sum += weight;
            last = (candidate.id, weight);
            if target < sum {
                break;
            }
        }
    }
    Drawn { id: last.0, logprob: (last.1 / total).ln() as f32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which of candidates with these weights is drawn at `u`.
    fn drawn(weights: &[f32], u: f64) -> u32 {
        let scores = weights.iter().map(|weight| weight.ln());
        let candidates: Vec<Candidate> = (0u32..).zip(scores).map(|(id, score)| Candidate { id, score }).collect();
        let top = candidates.iter().map(|c| c.score).fold(f32::NEG_INFINITY, f32::max);
        draw(&candidates, top, u, &mut Vec::new()).id
    }

    #[test]
    fn draw_skips_zero_weights_and_survives_rounding() {
        assert_eq!(drawn(&[0.0, 1.0, 2.0], 0.0), 1);
        assert_eq!(drawn(&[1.0, 2.0, 0.0], 0.34), 1);
        assert_eq!(drawn(&[1.0, 2.0, 0.0], 1.0), 1);
        assert_eq!(drawn(&[1.0, 2.0, 0.0], 2.0), 1);
    }

    #[test]
    fn draw_is_the_inverse_of_the_running_sum_across_blocks() {
        let count = 3 * BLOCK as u32 + 7;
        let mut weights = vec![1.0; count as usize];
        for id in [0, 1, BLOCK as u32 - 1, BLOCK as u32, 2 * BLOCK as u32 + 5, count - 1] {
            assert_eq!(drawn(&weights, (f64::from(id) + 0.5) / f64::from(count)), id);
        }
        // The last block is empty of probability: a target above the sum falls on the last that is not.
        weights[3 * BLOCK..].fill(0.0);
        assert_eq!(drawn(&weights, 1.5), 3 * BLOCK as u32 - 1);
    }

    #[test]
    fn greedy_is_the_penalised_maximum() {
        let mut plain = Sampler::new(SamplerOptions::greedy()).unwrap();
        assert_eq!(plain.sample(&[1.0, 2.0, 2.0], &[]).unwrap().id, 1);
        let penalised = SamplerOptions { presence_penalty: 0.5, ..SamplerOptions::greedy() };
        assert_eq!(Sampler::new(penalised).unwrap().sample(&[1.0, 2.0, 2.0], &[1]).unwrap().id, 2);
    }

    #[test]
    fn a_bias_that_forbids_everything_is_an_error() {
        for temperature in [0.0, 1.0] {
            let logit_bias = vec![(0, f32::NEG_INFINITY), (1, f32::NEG_INFINITY)];
            let options = SamplerOptions { temperature, logit_bias, ..SamplerOptions::default() };
            let error = Sampler::new(options).unwrap().sample(&[1.0, 2.0], &[]).unwrap_err();
            assert_eq!(error, SamplerError::NothingPossible { len: 2 });
        }
    }

    #[test]
    fn logprob_is_the_models_and_drawn_logprob_the_filters() {
        let options = SamplerOptions { top_k: 1, ..SamplerOptions::default() };
        let sampled = Sampler::new(options).unwrap().sample(&[0.0, 2f32.ln(), 0.0], &[]).unwrap();
        assert_eq!((sampled.id, sampled.drawn_logprob, sampled.num_candidates), (1, 0.0, 1));
        assert!((sampled.logprob - 0.5f32.ln()).abs() < 1e-6);
    }

    #[derive(Debug)]
    struct Broken;
    impl Processor for Broken {
        fn apply(&self, candidates: &mut Candidates, _history: &[u32]) -> Result<()> {
            if let Some(score) = candidates.score_mut(0) {
                *score = f32::NAN;
            }
            Ok(())
        }
    }

    #[derive(Debug)]
    struct OnlyEven;
    impl Processor for OnlyEven {
        fn apply(&self, candidates: &mut Candidates, _history: &[u32]) -> Result<()> {
            candidates.retain(|c| c.id & 1 == 0);
            Ok(())
        }
    }

    #[test]
    fn the_callers_processor_constrains_and_cannot_break_the_draw() {
        let mut even = Sampler::new(SamplerOptions::default()).unwrap().with_processor(Box::new(OnlyEven));
        let logits = [0.0, 9.0, 1.0, 9.0];
        assert!((0..50).all(|position| even.sample_at(&logits, &[], position).unwrap().id & 1 == 0));
        let mut broken = Sampler::new(SamplerOptions::default()).unwrap().with_processor(Box::new(Broken));
        assert!(matches!(broken.sample(&logits, &[]), Err(SamplerError::BadLogit { id: 0, .. })));
    }
}
