//! Validation: loss and bits per byte of held-out text.

use candle_core::Device;
use tallow_data::TokenDataset;
use tallow_models::Decoder;

use crate::Result;
use crate::backward::{LossSums, evaluate};
use crate::batch::MicroBatch;
use crate::metrics::EvalRecord;

/// Held-out tokens, and how many bytes of text one of them stands for.
pub struct Validation {
    dataset: TokenDataset,
    context_length: usize,
    max_tokens: u64,
}

/// What the held-out text scored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Mean negative log-likelihood, nats a token.
    pub loss: f64,
    /// Bits a byte of text: `loss / ln 2 * tokens / bytes`; the same whatever the tokenizer.
    pub bits_per_byte: f64,
    /// Targets scored.
    pub tokens: u64,
}

impl Validation {
    /// Over `dataset`, in rows of `context_length`; `max_tokens` of it, rounded up to a whole row (0 for all).
    pub fn new(dataset: TokenDataset, context_length: usize, max_tokens: u64) -> Self {
        Self { dataset, context_length, max_tokens }
    }

    /// Says which text is scored: losses of validations that differ in it are not to be compared.
    pub fn identity(&self) -> String {
        let Self { dataset, context_length, max_tokens } = self;
        format!("{} rows of {context_length}, at most {max_tokens} tokens", dataset.fingerprint())
    }

    /// Scores every target once, `rows` rows at once.
    ///
    /// # Errors
    /// If the data cannot be read or does not fit the model.
    pub fn score(&self, model: &dyn Decoder, rows: usize, device: &Device) -> Result<Score> {
        let mut sums = LossSums::default();
        // Counted in rows, so that what is scored does not depend on how many rows fit at once.
        let mut left = match self.max_tokens {
            0 => u64::MAX,
            tokens => tokens.div_ceil(self.context_length as u64),
        };
        for batch in self.dataset.sequential(self.context_length, rows)? {
            let batch = batch?;
            let taken = batch.batch.min(usize::try_from(left).unwrap_or(usize::MAX));
            let micro = MicroBatch::new(&batch, 0..taken, model.shape(), device)?;
            sums += evaluate(model, &micro.ids, micro.targets(), &mut micro.context())?;
            left -= taken as u64;
            if left == 0 {
                break;
            }
        }
        let loss = sums.mean();
        let bits_per_byte = loss / std::f64::consts::LN_2 / self.dataset.bytes_per_token();
        Ok(Score { loss, bits_per_byte, tokens: sums.targets as u64 })
    }
}

impl Score {
    /// As a line of the metrics.
    pub fn record(&self, step: u64) -> EvalRecord {
        EvalRecord {
            step,
            valid_loss: self.loss,
            bits_per_byte: self.bits_per_byte,
            perplexity: self.loss.exp(),
            tokens: self.tokens,
        }
    }
}
