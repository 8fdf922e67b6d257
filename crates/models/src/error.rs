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
    /// An architecture that no family here has.
    #[error("{at}architecture `{name}` is not supported; the nearest is `{nearest}`; supported are: {supported}")]
    Architecture {
        /// File and a separator, or empty where there is no file.
        at: String,
        /// As the file names it.
        name: String,
        /// The supported one whose name is most like it.
        nearest: String,
        /// Comma-separated list.
        supported: String,
    },
    /// A checkpoint holds tensors that the model does not have, so loading it would ignore them.
    #[error(
        "{}: tensor `{first}`: this model has no such parameter{}; does the configuration belong to these weights?",
        path.display(),
        others(*count)
    )]
    UnusedTensors {
        /// The file that holds the first.
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

fn others(count: usize) -> String {
    match count {
        0 | 1 => String::new(),
        n => format!(", nor {} others that the files hold", n - 1),
    }
}

impl Error {
    pub(crate) fn config(key: &str, reason: impl Into<String>) -> Self {
        Error::Config { at: String::new(), key: key.into(), reason: reason.into() }
    }

    pub(crate) fn architecture(name: &str, supported: &[&str]) -> Self {
        let nearest = supported.iter().max_by(|a, b| strsim::jaro(a, name).total_cmp(&strsim::jaro(b, name)));
        Error::Architecture {
            at: String::new(),
            name: name.into(),
            nearest: nearest.copied().unwrap_or_default().into(),
            supported: supported.join(", "),
        }
    }

    /// The same error, saying which file it is about.
    pub(crate) fn in_file(self, path: &std::path::Path) -> Self {
        let at = format!("{}: ", path.display());
        match self {
            Error::Config { key, reason, .. } => Error::Config { at, key, reason },
            Error::Architecture { name, nearest, supported, .. } => {
                Error::Architecture { at, name, nearest, supported }
            }
            other => other,
        }
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
