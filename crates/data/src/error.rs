//! What can go wrong between text and batches, each with its place and a way out.

use std::path::{Path, PathBuf};

/// Everything that this crate fails with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused a file or folder.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An input does not exist.
    #[error("{}: no such file or folder; check the path (relative paths start at the working directory)", path.display())]
    MissingInput {
        /// The input as it was given.
        path: PathBuf,
    },
    /// A file that was named itself is of a kind that cannot be read.
    #[error("{}: not a kind of file that can be read; known are {KNOWN_EXTENSIONS}", path.display())]
    UnknownExtension {
        /// The file.
        path: PathBuf,
    },
    /// A file that was named itself is plain text where records are wanted.
    #[error("{}: plain text holds no records to make examples of; give .jsonl, .ndjson or .parquet (also with .gz or .zst)", path.display())]
    NotRecords {
        /// The file.
        path: PathBuf,
    },
    /// There is no file to read in all inputs.
    #[error("no readable file in {inputs}; known are {KNOWN_EXTENSIONS}{skipped}")]
    NothingReadable {
        /// The inputs, joined.
        inputs: String,
        /// The first skipped files with reasons, or nothing.
        skipped: String,
    },
    /// Files were read, but there is no document with text in them.
    #[error("no text in {inputs}: {} no document that is not blank{hint}", hold(*files))]
    NoDocuments {
        /// The inputs, joined.
        inputs: String,
        /// Files read.
        files: u64,
        /// What was skipped, or nothing.
        hint: String,
    },
    /// Files were read, but no example is left of them.
    #[error("no example in {inputs}: {} none that can be learnt from{hint}", hold(*files))]
    NoExamples {
        /// The inputs, joined.
        inputs: String,
        /// Files read.
        files: u64,
        /// What was left out, or nothing.
        hint: String,
    },
    /// An example that cannot be learnt from as it is.
    #[error("{}, line {line}: {reason}", path.display())]
    Example {
        /// The file.
        path: PathBuf,
        /// 1-based line of text, or row of a table.
        line: u64,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// Examples that are longer than a row, where each must stay whole.
    #[error(
        "{examples} examples are longer than a row of {context} tokens (document {document} has {longest} tokens); set context_length to {needed} or more, or prepare them again with max_tokens = {limit}"
    )]
    LongExamples {
        /// How many.
        examples: u64,
        /// Tokens a row.
        context: usize,
        /// The document that is the longest.
        document: u64,
        /// Its tokens.
        longest: u64,
        /// The context that holds it.
        needed: u64,
        /// The most tokens that the row could hold.
        limit: usize,
    },
    /// A malformed record, where the policy is to stop at the first one.
    #[error("{}, line {line}: {reason}; repair it, or use on_malformed = \"report\" to skip and count such records", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// 1-based line of text, or row of a table.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// More records are malformed than the policy lets pass.
    #[error(
        "{malformed} of {records} records are malformed, more than {percent}% (max_malformed_fraction); the first: {first}. \
         Check the files and the `field` or `shape` option, or use on_malformed = \"skip\" to keep the rest"
    )]
    TooManyMalformed {
        /// Malformed records.
        malformed: u64,
        /// All records.
        records: u64,
        /// The limit in percent.
        percent: f64,
        /// Place and reason of the first.
        first: String,
    },
    /// A file whose end or inside is lost: how much, nobody knows, so this is not only one malformed record.
    #[error(
        "{}, after line {line}: {reason}; the file is damaged or cut short: fetch it again, \
         or use on_malformed = \"skip\" to keep what could be read", path.display()
    )]
    DamagedFile {
        /// The file.
        path: PathBuf,
        /// Last line or row that was read whole.
        line: u64,
        /// What the decoder said.
        reason: String,
    },
    /// An option has a value that cannot work.
    #[error("{name} = {value}: {reason}")]
    Option {
        /// The option.
        name: &'static str,
        /// Its value.
        value: String,
        /// Why not, and what would work.
        reason: String,
    },
    /// The folder to write to holds something already.
    #[error("{}: exists already; choose another folder, or overwrite it explicitly (overwrite = true)", path.display())]
    OutputExists {
        /// The folder.
        path: PathBuf,
    },
    /// Another process is preparing into the same folder.
    #[error("{}: another process is preparing into this folder; wait for it, or choose another", path.display())]
    OutputBusy {
        /// The folder.
        path: PathBuf,
    },
    /// The encoder failed.
    #[error("encoding: {source}")]
    Encode {
        /// What the encoder said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The encoder broke its own promise.
    #[error("the encoder returned {what}; this is a defect of the tokenizer, not of the data")]
    EncoderContract {
        /// What it returned.
        what: String,
    },
    /// A folder is not one of prepared tokens.
    #[error("{}: {reason}", path.display())]
    NotPrepared {
        /// The folder.
        path: PathBuf,
        /// What is missing, and what to give instead.
        reason: String,
    },
    /// A shard or its index is not what was written.
    #[error("{}, byte {offset}: {reason}; prepare the data again (`tallow data prepare`) or restore the file", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Offset in bytes of what is wrong.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// Two folders that cannot be read as one dataset.
    #[error("{} and {} differ in {what}: {values}; prepare both with the same tokenizer and options", first.display(), second.display())]
    Mixed {
        /// The first folder.
        first: PathBuf,
        /// The one that differs.
        second: PathBuf,
        /// In what.
        what: &'static str,
        /// Both values.
        values: String,
    },
    /// The dataset has no target to learn from.
    #[error(
        "the dataset has {tokens} tokens in {documents} documents, which makes no row: at least one document of 2 tokens is \
         needed (the first token of a document is never predicted); add text, or prepare with `append_eos`"
    )]
    NoRows {
        /// Tokens in the dataset.
        tokens: u64,
        /// Documents in it.
        documents: u64,
    },
    /// A document index past the end.
    #[error("document {index} does not exist: the dataset has {documents}")]
    NoSuchDocument {
        /// The index.
        index: u64,
        /// How many there are.
        documents: u64,
    },
    /// The state to resume from was written by another loader.
    #[error("cannot resume: {what} was {was} when the state was saved and is {now} now; {way_out}")]
    State {
        /// Which part differs.
        what: &'static str,
        /// Its saved value.
        was: String,
        /// Its value now.
        now: String,
        /// What to do.
        way_out: String,
    },
    /// A thread ended without a result.
    #[error("the {what} thread ended unexpectedly: {message}")]
    Thread {
        /// Its job.
        what: &'static str,
        /// Its panic message, if it had one.
        message: String,
    },
}

pub(crate) const KNOWN_EXTENSIONS: &str =
    ".txt, .md, .text, .jsonl, .ndjson, .parquet, each also with .gz or .zst behind it";

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_owned(), source }
    }

    pub(crate) fn option(name: &'static str, value: impl ToString, reason: impl Into<String>) -> Self {
        Self::Option { name, value: value.to_string(), reason: reason.into() }
    }

    pub(crate) fn corrupt(path: &Path, offset: u64, reason: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_owned(), offset, reason: reason.into() }
    }
}

/// So many files as the subject of what they hold.
fn hold(files: u64) -> String {
    match files {
        1 => "1 file holds".to_owned(),
        files => format!("{files} files hold"),
    }
}

/// What a thread that panicked said.
pub(crate) fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}
