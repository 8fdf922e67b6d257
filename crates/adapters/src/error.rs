//! The error of this crate.

use std::path::{Path, PathBuf};

/// What can go wrong with an adapter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A layer could not be built or filled.
    #[error(transparent)]
    Layer(#[from] tallow_nn::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A file could not be read or written.
    #[error(transparent)]
    Format(#[from] tallow_formats::Error),
    /// A setting that cannot work, with one that does.
    #[error("`{key}` = {value}: {reason}")]
    Config {
        /// The setting.
        key: &'static str,
        /// As it was given.
        value: String,
        /// What is wrong, and the way out.
        reason: String,
    },
    /// Files that are no adapter, or none of this model.
    #[error("{}: {reason}", path.display())]
    Files {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the way out.
        reason: String,
    },
}

impl Error {
    pub(crate) fn config(key: &'static str, value: impl ToString, reason: impl Into<String>) -> Self {
        Error::Config { key, value: value.to_string(), reason: reason.into() }
    }

    pub(crate) fn files(path: &Path, reason: impl Into<String>) -> Self {
        Error::Files { path: path.to_path_buf(), reason: reason.into() }
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
