//! The error of this crate.

use std::path::PathBuf;

/// What can go wrong while layers are built, filled or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A model file could not be read.
    #[error(transparent)]
    Format(#[from] tallow_formats::Error),
    /// A tensor of a file does not fit the model.
    #[error("{}: tensor `{tensor}`: {reason}", path.display())]
    Weights {
        /// The file or directory.
        path: PathBuf,
        /// The name the model asked for.
        tensor: String,
        /// What is wrong, and the way out where there is one.
        reason: String,
    },
    /// A configuration value that no model can be built from.
    #[error("`{key}` = {value}: {reason}")]
    Config {
        /// The Hugging Face configuration key.
        key: &'static str,
        /// The offending value as the user wrote it.
        value: String,
        /// The reason, with a working value.
        reason: String,
    },
    /// A model definition asked twice for the same parameter, or for one that its plan did not have.
    #[error("parameter `{name}`: {reason}")]
    Param {
        /// Full name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// More positions than the model or its cache can hold.
    #[error("{requested} positions were asked for but {limit} is the most ({what})")]
    Context {
        /// Positions needed.
        requested: usize,
        /// Positions available.
        limit: usize,
        /// Whose limit it is.
        what: &'static str,
    },
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
