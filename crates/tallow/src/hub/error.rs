//! The error of [`hub`](super).

use std::path::PathBuf;

/// Why a hub id did not lead to a folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not `org/name`.
    #[error("`{id}` is no hub id: give org/name, of letters, digits, `-`, `_` and `.`")]
    Id {
        /// As asked for.
        id: String,
    },
    /// There is no place for the cache.
    #[error("no home directory for the cache of the Hugging Face hub: set HF_HOME or HF_HUB_CACHE")]
    NoCache,
    /// Something is not in the cache and may not be fetched.
    #[error(
        "`{repo}`: {file} is not in the cache {} and HF_HUB_OFFLINE is set: unset it to download, or give a local folder",
        cache.display()
    )]
    NotCached {
        /// The id.
        repo: String,
        /// What is missing.
        file: String,
        /// Where it was looked for.
        cache: PathBuf,
    },
    /// The hub has no such model, or does not show it.
    #[error(
        "`{repo}`: {endpoint} has no such model, or it needs a key: check the spelling; for a private or gated one set \
         HF_TOKEN; or give a local folder"
    )]
    NoRepo {
        /// The id.
        repo: String,
        /// The hub.
        endpoint: String,
    },
    /// The model lacks a file that is needed.
    #[error("`{repo}`: there is no {file} at the hub: give a model with it, or a local folder or .gguf file")]
    NoFile {
        /// The id.
        repo: String,
        /// What is missing.
        file: String,
    },
    /// A file could not be fetched.
    #[error(
        "`{repo}`: {file} is not in the cache and could not be fetched: {reason}; try again, or give a local folder"
    )]
    Fetch {
        /// The id.
        repo: String,
        /// What.
        file: String,
        /// What happened.
        reason: String,
    },
    /// A file of the cache is malformed.
    #[error("`{repo}`: {}: {reason}; remove it to fetch it again", path.display())]
    Malformed {
        /// The id.
        repo: String,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// `Result` with this module's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
