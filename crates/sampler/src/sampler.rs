//! The pipeline and the draw.

use crate::exp::exp;
use crate::rng::uniform;
use crate::{
    Candidates, LogitBias, MinP, Penalties, Processor, Result, SamplerError, SamplerOptions, Temperature, TopK, TopP,
    log_softmax_at,
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
    weights: Vec<f64>,
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
        let (candidates, weights) = (Candidates::default(), Vec::new());
        Ok(Self { options, logit_processors, has_foreign_processor: false, warpers, candidates, weights })
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
        self.process(logits, history)?;
        if self.options.temperature == 0.0 {
            let id = self.candidates.try_best()?.id;
            return Ok(Sampled { id, logprob: log_softmax_at(logits, id)?, drawn_logprob: 0.0, num_candidates: 1 });
        }
        let total = self.weigh()?;
        let (index, weight) = draw(&self.weights, uniform(self.options.seed, position, 0) * total);
        let id = self.candidates.as_slice()[index].id;
        Ok(Sampled {
            id,
            logprob: log_softmax_at(logits, id)?,
            drawn_logprob: (weight / total).ln() as f32,
            num_candidates: self.weights.iter().filter(|&&weight| weight > 0.0).count(),
        })
    }

    /// The distribution that [`sample`](Self::sample) draws from: `(id, probability)` of every token that may be drawn,
    /// in ascending order of id. Greedy is one token with probability 1. Speculative decoding compares two of these.
    pub fn distribution(&mut self, logits: &[f32], history: &[u32]) -> Result<Vec<(u32, f64)>> {
        self.process(logits, history)?;
        if self.options.temperature == 0.0 {
            return Ok(vec![(self.candidates.try_best()?.id, 1.0)]);
        }
        let total = self.weigh()?;
        let pairs = self.candidates.as_slice().iter().zip(&self.weights);
        Ok(pairs.filter(|(_, weight)| **weight > 0.0).map(|(c, weight)| (c.id, weight / total)).collect())
    }

    /// Runs the pipeline over the logits.
    fn process(&mut self, logits: &[f32], history: &[u32]) -> Result<()> {
        self.candidates.load(logits)?;
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
        Ok(())
    }

    /// Fills `weights` with the unnormalised probabilities of the candidates and returns their sum, at least 1.
    fn weigh(&mut self) -> Result<f64> {
        let max = self.candidates.try_best()?.score;
        self.weights.clear();
        self.weights.extend(self.candidates.as_slice().iter().map(|c| f64::from(exp(c.score - max))));
        Ok(self.weights.iter().sum())
    }
}

/// The first index at which the running sum exceeds `target`, with its weight. Never one of weight 0, even where rounding
/// leaves the target just above the sum.
fn draw(weights: &[f64], target: f64) -> (usize, f64) {
    let (mut sum, mut last) = (0.0, (0, 0.0));
    for (index, &weight) in weights.iter().enumerate() {
        if weight > 0.0 {
            sum += weight;
            last = (index, weight);
            if target < sum {
                break;
            }
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draw_skips_zero_weights_and_survives_rounding() {
        assert_eq!(draw(&[0.0, 1.0, 2.0], 0.0), (1, 1.0));
        assert_eq!(draw(&[1.0, 2.0, 0.0], 1.0), (1, 2.0));
        assert_eq!(draw(&[1.0, 2.0, 0.0], 3.0), (1, 2.0));
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
