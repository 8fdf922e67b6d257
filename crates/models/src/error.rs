//! The error of this crate.

use std::path::PathBuf;

/// What can go wrong while a model is configured, loaded or saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A layer could not be built, filled or run.
    #[error(transparent)]
    Layer(#[from] tallow_nn::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A model file could not be read or written.
    #[error(transparent)]
    Format(#[from] tallow_formats::Error),
    /// A configuration that no model can be built from.
    #[error("{at}`{key}`: {reason}")]
    Config {
        /// File and a separator, or empty where there is no file.
        at: String,
        /// The Hugging Face key.
        key: String,
        /// What is wrong with its value, and a working one.
        reason: String,
    },
    /// An architecture that is not implemented.
    #[error("architecture `{name}` is not supported; supported are: {supported}")]
    Architecture {
        /// As the file names it.
        name: String,
        /// Comma-separated list.
        supported: String,
    },
    /// A checkpoint holds tensors that the model does not have, so loading it would ignore them.
    #[error("{}: {} tensors that this model does not have, the first: `{first}`", path.display(), count)]
    UnusedTensors {
        /// The file or directory.
        path: PathBuf,
        /// How many.
        count: usize,
        /// One of them.
        first: String,
    },
    /// No such preset.
    #[error("no preset `{name}`: it is neither a file nor one of {known}")]
    Preset {
        /// As asked for.
        name: String,
        /// Comma-separated list.
        known: String,
    },
}

impl Error {
    pub(crate) fn config(key: &str, reason: impl Into<String>) -> Self {
        Error::Config { at: String::new(), key: key.into(), reason: reason.into() }
    }

    /// The same error, saying which file it is about.
    pub(crate) fn in_file(self, path: &std::path::Path) -> Self {
        match self {
            Error::Config { key, reason, .. } => Error::Config { at: format!("{}: ", path.display()), key, reason },
            other => other,
        }
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
