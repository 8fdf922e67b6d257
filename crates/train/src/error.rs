//! The error of this crate.

use std::path::PathBuf;

/// What can go wrong in a training run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The run file says something that cannot be done. Exit code 2.
    #[error("{at}`{key}` = {value}: {reason}")]
    Config {
        /// `file:line: `, or what else the key came from.
        at: String,
        /// Dotted key.
        key: String,
        /// Its value.
        value: String,
        /// The reason, with a working value or the nearest key.
        reason: String,
    },
    /// The run file is not valid TOML, or has an unknown or mistyped key. Exit code 2.
    #[error("{}:{line}: {message}", path.display())]
    Parse {
        /// The run file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong, with the nearest key.
        message: String,
    },
    /// The output directory cannot be used: it holds another run, or another process writes to it. Exit code 2.
    #[error("{}: {reason}", path.display())]
    Output {
        /// The directory.
        path: PathBuf,
        /// Why it cannot be used, and the way out.
        reason: String,
    },
    /// A checkpoint cannot be read or does not belong to this run.
    #[error("checkpoint {}: {reason}", path.display())]
    Checkpoint {
        /// Its directory.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The gradient audit of the first step failed: some parameter would never learn.
    #[error("gradient audit: parameter `{parameter}` {reason}; nothing was trained")]
    Audit {
        /// Full name.
        parameter: String,
        /// What its gradient was.
        reason: String,
    },
    /// Training went wrong and the policy is to stop.
    #[error("step {step}: {reason}")]
    Diverged {
        /// The step.
        step: u64,
        /// What happened and what can be done.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The metrics could not be read or written.
    #[error(transparent)]
    Metrics(#[from] crate::metrics::MetricsError),
    /// The model could not be built, loaded or saved.
    #[error(transparent)]
    Model(#[from] tallow_models::Error),
    /// A layer failed.
    #[error(transparent)]
    Layer(#[from] tallow_nn::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A model file failed.
    #[error(transparent)]
    Format(#[from] tallow_formats::Error),
    /// The adapter could not be built, loaded or saved.
    #[error(transparent)]
    Adapter(#[from] tallow_adapters::Error),
    /// The data could not be prepared or read.
    #[error(transparent)]
    Data(#[from] tallow_data::Error),
    /// The tokenizer could not be loaded or used.
    #[error(transparent)]
    Tokenizer(#[from] tallow_tokenizer::Error),
}

impl Error {
    pub(crate) fn config(key: &str, value: impl ToString, reason: impl Into<String>) -> Self {
        Error::Config { at: String::new(), key: key.into(), value: value.to_string(), reason: reason.into() }
    }

    pub(crate) fn output(path: &std::path::Path, reason: impl Into<String>) -> Self {
        Error::Output { path: path.into(), reason: reason.into() }
    }

    pub(crate) fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { path: path.into(), source }
    }

    /// True if the user asked for something that cannot be, rather than something having gone wrong.
    pub fn is_usage(&self) -> bool {
        matches!(self, Error::Config { .. } | Error::Parse { .. } | Error::Output { .. })
            || matches!(self, Error::Data(tallow_data::Error::State { .. }))
            || matches!(self, Error::Layer(tallow_nn::Error::Config { .. }))
            || matches!(
                self,
                Error::Model(
                    tallow_models::Error::Config { .. }
                        | tallow_models::Error::Preset { .. }
                        | tallow_models::Error::Architecture { .. }
                        | tallow_models::Error::Layer(tallow_nn::Error::Config { .. })
                )
            )
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
