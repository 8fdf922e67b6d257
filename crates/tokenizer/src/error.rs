//! Everything that can go wrong in this crate, with the way out in the message.

use std::path::PathBuf;

/// The result type of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a tokenizer could not be read, trained, used or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file operation.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder concerned.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file does not hold what its format promises.
    #[error("{path}: {reason}")]
    Malformed {
        /// The file, or a name for the source when there is no file.
        path: PathBuf,
        /// What is wrong, naming the key, token or line.
        reason: String,
    },
    /// A token that cannot be added.
    #[error("token {token:?} {reason}")]
    AddedToken {
        /// The token.
        token: String,
        /// Why not.
        reason: String,
    },
    /// A path holds nothing that this crate can read as a tokenizer.
    #[error(
        "{path}: not a tokenizer; expected tokenizer.json (or a folder holding one), a SentencePiece .model, or a \
         .tiktoken rank file"
    )]
    UnknownFormat {
        /// The path given.
        path: PathBuf,
    },
    /// A pre-tokenizer name that is not known.
    #[error("unknown pre-tokenizer {name:?}; known names: {known}")]
    UnknownPreTokenizer {
        /// The name asked for.
        name: String,
        /// All names, comma separated.
        known: String,
    },
    /// A tiktoken encoding name that is not known.
    #[error("unknown tiktoken encoding {name:?}; known names: {known}")]
    UnknownEncoding {
        /// The name asked for.
        name: String,
        /// All names, comma separated.
        known: String,
    },
    /// A setting of the trainer that cannot work.
    #[error("training option {option} = {value}: {reason}")]
    BadOption {
        /// The option's name.
        option: &'static str,
        /// The value given.
        value: String,
        /// Why it cannot work, and a value that does.
        reason: String,
    },
    /// The corpus holds no text to learn from.
    #[error("the training corpus holds no text; give at least one document with a visible character")]
    EmptyCorpus,
    /// A training file is not UTF-8.
    #[error("{path}: line {line} is not valid UTF-8; convert the file to UTF-8 first")]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: u64,
    },
    /// An id that no token of this tokenizer has.
    #[error("token id {id} is outside the vocabulary (ids run below {vocab_size})")]
    UnknownId {
        /// The id given.
        id: u32,
        /// One past the largest id.
        vocab_size: usize,
    },
    /// A special token was asked for that this tokenizer does not have.
    #[error("this tokenizer has no {role} token; encode without it, or name one in tokenizer_config.json")]
    NoSpecialToken {
        /// `bos` or `eos`.
        role: &'static str,
    },
    /// The tokenizer carries no chat template.
    #[error("this tokenizer has no chat template; give one: a Jinja text, or a built-in name ({known})")]
    NoChatTemplate {
        /// The built-in names, comma separated.
        known: String,
    },
    /// A chat template name that neither the tokenizer nor this crate knows.
    #[error("unknown chat template {name:?}; known names: {known}; or give the Jinja text itself")]
    UnknownChatTemplate {
        /// The name asked for.
        name: String,
        /// All names, comma separated.
        known: String,
    },
    /// A built-in chat template writes a token that this tokenizer does not have.
    #[error(
        "chat template {template:?} needs {token}, which this tokenizer does not have; add the token, or take another \
         template ({known})"
    )]
    TemplateToken {
        /// The template's name.
        template: String,
        /// The token, or `eos_token` for the role.
        token: String,
        /// The built-in names, comma separated.
        known: String,
    },
    /// A chat template is not Jinja.
    #[error("chat template {template:?}, line {line}: {reason}")]
    TemplateSyntax {
        /// The template's name.
        template: String,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong there.
        reason: String,
    },
    /// A chat template called `raise_exception`: it does not take such a conversation.
    #[error("chat template {template:?} refuses this conversation: {message}")]
    TemplateRefused {
        /// The template's name.
        template: String,
        /// The template's own words.
        message: String,
    },
    /// A chat template failed on a conversation, in a way that it did not foresee.
    #[error("chat template {template:?} failed in line {line}: {reason}")]
    TemplateFailed {
        /// The template's name.
        template: String,
        /// The line, counted from 1.
        line: usize,
        /// Why.
        reason: String,
    },
    /// A conversation without any message.
    #[error("the conversation is empty; give at least one message")]
    EmptyConversation,
    /// An option of a conversation that cannot work.
    #[error("chat option {option}: {reason}")]
    ChatOption {
        /// The option's name.
        option: &'static str,
        /// Why it cannot work.
        reason: String,
    },
    /// A turn was asked for that says nothing: there is nothing to learn from it.
    #[error("message {index} ({role}) is empty: there is nothing to learn from it; take it out, or do not ask for it")]
    EmptyTurn {
        /// The message, counted from 0.
        index: usize,
        /// Its role.
        role: String,
    },
    /// A turn was asked for whose part of the text cannot be told from the rest.
    #[error(
        "chat template {template:?}: cannot tell what message {index} ({role}) is in the text: {reason}; put \
         {{% generation %}} and {{% endgeneration %}} around it in the template, or take another template"
    )]
    NoSpan {
        /// The message, counted from 0.
        index: usize,
        /// Its role.
        role: String,
        /// The template's name.
        template: String,
        /// Why.
        reason: String,
    },
    /// The pipeline of the tokenizer failed on a text.
    #[error("encoding failed: {0}")]
    Encode(String),
    /// The decoder of the tokenizer failed on ids.
    #[error("decoding failed: {0}")]
    Decode(String),
}

impl Error {
    pub(crate) fn malformed(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::Malformed { path: path.into(), reason: reason.into() }
    }

    pub(crate) fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }
}
