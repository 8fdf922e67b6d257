//! The error of this crate.

/// What can go wrong while a model generates or scores.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model failed.
    #[error(transparent)]
    Layer(#[from] tallow_nn::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// The sampler refused its options or the logits.
    #[error(transparent)]
    Sampler(#[from] tallow_sampler::SamplerError),
    /// More tokens than the model has positions for.
    #[error("{given} tokens were given but the model has {limit} positions; shorten the text")]
    Context {
        /// Tokens given.
        given: usize,
        /// The model's `max_position_embeddings`.
        limit: usize,
    },
    /// A prompt that is seen both ways, and does not fit into what a token sees.
    #[error(
        "{given} tokens of a prompt were given, but the model sees prompts both ways and no further than {window} tokens; \
             shorten the prompt"
    )]
    PrefixWindow {
        /// Tokens given.
        given: usize,
        /// The model's `sliding_window`.
        window: usize,
    },
    /// A token that the model does not have.
    #[error("token id {id} is not in the model's vocabulary of {vocab_size}; is this the model's own tokenizer?")]
    Vocabulary {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// Nothing to continue or to score.
    #[error("no tokens were given; at least {needed} needed")]
    Empty {
        /// The fewest that make sense.
        needed: usize,
    },
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
