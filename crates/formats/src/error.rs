//! The error of this crate.

use std::path::{Path, PathBuf};

/// What can be wrong with a model's files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused.
    #[error("{}: {source}{}", path.display(), hint(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file is not what its name says, or is damaged.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tensor of a file is malformed, missing, or cannot be read as asked.
    #[error("{}: tensor `{tensor}`: {reason}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// A key of a header or configuration is missing or of another type.
    #[error("{}: `{key}`: {reason}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// Something that is needed is not there.
    #[error("{}: {what} is missing: {reason}", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
        /// What.
        what: String,
        /// What was found instead, and the way out.
        reason: String,
    },
    /// No model of this name.
    #[error("no model `{name}`: {reason}")]
    NoModel {
        /// As asked for.
        name: String,
        /// Where it was looked for, and the way out.
        reason: String,
    },
    /// The values of a tensor that was to be written could not be had.
    #[error("tensor `{tensor}` cannot be written: {reason}")]
    Values {
        /// Its name.
        tensor: String,
        /// Why.
        reason: String,
    },
}

fn hint(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::StorageFull => " (free some space or choose another disk)",
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
            " (choose a place that can be written)"
        }
        _ => "",
    }
}

impl Error {
    /// Something that is needed is not there.
    pub fn missing(path: &Path, what: &str, reason: &str) -> Self {
        Error::Missing { path: path.into(), what: what.into(), reason: reason.into() }
    }

    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Error::Io { path: path.into(), source }
    }

    pub(crate) fn malformed(path: &Path, reason: impl Into<String>) -> Self {
        Error::Malformed { path: path.into(), reason: reason.into() }
    }

    pub(crate) fn tensor(path: &Path, tensor: &str, reason: impl Into<String>) -> Self {
        Error::Tensor { path: path.into(), tensor: tensor.into(), reason: reason.into() }
    }

    pub(crate) fn key(path: &Path, key: &str, reason: impl Into<String>) -> Self {
        Error::Key { path: path.into(), key: key.into(), reason: reason.into() }
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
