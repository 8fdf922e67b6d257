//! What can go wrong between logits and a token.

/// The result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, SamplerError>;

/// An option that cannot work, or logits that no token can be drawn from.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplerError {
    /// An option is outside what it can mean.
    #[error("{key} = {value}: {reason}; for example {key} = {working}")]
    InvalidOption {
        /// The name of the option, as written in a run file.
        key: &'static str,
        /// What it was set to.
        value: String,
        /// Why that cannot work.
        reason: String,
        /// A value that works.
        working: String,
    },
    /// There are no logits at all.
    #[error("there are no logits to sample from: the slice is empty; pass one logit for each id of the vocabulary")]
    EmptyLogits,
    /// The vocabulary does not fit the type of a token id.
    #[error("{len} logits, but a token id has 32 bits: pass the logits of one position, not of a whole batch")]
    TooManyLogits {
        /// The number of logits passed.
        len: usize,
    },
    /// A logit is NaN or +inf, so that the softmax has no value.
    #[error(
        "the logit of token {id} is {value}: the model's output is broken (an overflow in a low-precision dtype, or \
         weights that diverged); try f32, or an earlier checkpoint"
    )]
    BadLogit {
        /// The first token with such a logit.
        id: u32,
        /// The logit.
        value: f32,
    },
    /// Every logit is -inf.
    #[error("all {len} logits are -inf, so no token is possible: a mask or a logit_bias forbids the whole vocabulary")]
    NothingPossible {
        /// The number of candidates.
        len: usize,
    },
    /// A token id from the user or the caller is outside the vocabulary.
    #[error("{what} names token {id}, but the logits have {vocab_size} entries (ids 0 to {})", .vocab_size.saturating_sub(1))]
    UnknownToken {
        /// Where the id came from: `logit_bias`, `history`, ...
        what: &'static str,
        /// The id.
        id: u32,
        /// The number of logits.
        vocab_size: usize,
    },
}
