//! Learning a vocabulary from text.

mod bpe;
mod count;
mod files;
mod pairs;
mod unigram;
mod wordpiece;

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::pre::PreTokenizer;
use crate::spec::{MAX_VOCAB, Spec};
use crate::special::Roles;
use crate::tokenizer::Tokenizer;

pub use files::train_files;

/// The kind of tokenizer to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TokenizerKind {
    /// Byte-level byte-pair encoding: loses nothing, needs no unknown token. What decoders use.
    #[default]
    Bpe,
    /// BERT's: lower-cased words split into pieces, `##` before continuations.
    WordPiece,
    /// SentencePiece's Unigram language model, with byte fallback.
    Unigram,
}

impl std::str::FromStr for TokenizerKind {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "bpe" => Ok(Self::Bpe),
            "wordpiece" => Ok(Self::WordPiece),
            "unigram" => Ok(Self::Unigram),
            _ => Err(Error::BadOption {
                option: "kind",
                value: name.to_string(),
                reason: "the kinds are bpe, wordpiece and unigram".to_string(),
            }),
        }
    }
}

/// How to train.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOptions {
    /// What to train; byte-level BPE by default.
    pub kind: TokenizerKind,
    /// Tokens wanted in all, special tokens and alphabet included. 32,000 by default.
    pub vocab_size: usize,
    /// How BPE cuts text before merging. WordPiece and Unigram have their own way and ignore the default; any other
    /// choice is refused for them.
    pub pre: PreTokenizer,
    /// Special tokens in id order, from id 0. None takes the usual ones of the kind: `<|endoftext|>`;
    /// `[PAD] [UNK] [CLS] [SEP] [MASK]`; `<unk> <s> </s> <pad>`.
    pub special_tokens: Option<Vec<String>>,
    /// Pairs seen less often are not merged. 2 by default.
    pub min_frequency: u64,
    /// At most this many single characters besides the byte alphabet (WordPiece, Unigram); rarer ones are left out.
    pub limit_alphabet: Option<usize>,
    /// No token longer than this many bytes. None by default.
    pub max_token_length: Option<usize>,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            kind: TokenizerKind::Bpe,
            vocab_size: 32_000,
            pre: PreTokenizer::default(),
            special_tokens: None,
            min_frequency: 2,
            limit_alphabet: None,
            max_token_length: None,
        }
    }
}

/// What the trainer tells as it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrainEvent {
    /// Text read and cut into pieces so far.
    Reading {
        /// Documents so far.
        documents: u64,
        /// Bytes of text so far.
        bytes: u64,
    },
    /// Tokens in the vocabulary so far.
    Merging {
        /// Tokens so far.
        done: usize,
        /// Tokens wanted.
        total: usize,
    },
    /// Something the user should read, such as a vocabulary that came out smaller than asked.
    Warning(String),
}

/// Trains a tokenizer on documents.
///
/// The result depends on the documents and options alone, not on their order, the threads or the machine. If the
/// corpus is too small for `vocab_size`, the tokenizer is smaller and a [`TrainEvent::Warning`] says so.
///
/// Fails if an option cannot work (a BPE vocabulary below 256 + special tokens, say) or there is no text at all.
pub fn train<I, S>(documents: I, options: &TrainOptions, mut progress: impl FnMut(TrainEvent)) -> Result<Tokenizer>
where
    I: IntoIterator<Item = S>,
    S: AsRef<str> + Send + Sync,
{
    let specials = check(options)?;
    let counter = count::PieceCounter::new(options)?;
    let pieces = counter.count(documents.into_iter().map(Ok), &mut progress)?;
    finish(&pieces, options, &specials, &mut progress)
}

pub(crate) fn finish(
    pieces: &count::Pieces,
    options: &TrainOptions,
    specials: &[String],
    progress: &mut dyn FnMut(TrainEvent),
) -> Result<Tokenizer> {
    if pieces.is_empty() {
        return Err(Error::EmptyCorpus);
    }
    let json = match options.kind {
        TokenizerKind::Bpe => bpe::train(pieces, options, specials, progress)?,
        TokenizerKind::WordPiece => wordpiece::train(pieces, options, specials, progress)?,
        TokenizerKind::Unigram => unigram::train(pieces, options, specials, progress)?,
    };
    let tokenizer = Tokenizer::build(Spec::new(json, "the trained tokenizer".as_ref())?, Roles::default(), None)?;
    let reached = tokenizer.vocab_size();
    if reached < options.vocab_size {
        progress(TrainEvent::Warning(format!(
            "the corpus supports a vocabulary of only {reached} tokens, not {}: nothing further recurs often enough \
             (min_frequency {}); train on more text, or set the vocabulary size to {reached}",
            options.vocab_size, options.min_frequency
        )));
    }
    Ok(tokenizer)
}

/// Checks the options and settles the special tokens.
pub(crate) fn check(options: &TrainOptions) -> Result<Vec<String>> {
    let bad = |option, value: String, reason: String| Err(Error::BadOption { option, value, reason });
    let usual: &[&str] = match options.kind {
        TokenizerKind::Bpe => &["<|endoftext|>"],
        TokenizerKind::WordPiece => &["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        TokenizerKind::Unigram => &["<unk>", "<s>", "</s>", "<pad>"],
    };
    let specials = options.special_tokens.clone().unwrap_or_else(|| usual.iter().map(|s| s.to_string()).collect());
    let mut sorted = specials.clone();
    sorted.sort_unstable();
    if sorted.iter().any(String::is_empty) || sorted.windows(2).any(|w| w[0] == w[1]) {
        let reason = "special tokens must be distinct and not empty".to_string();
        return bad("special_tokens", format!("{specials:?}"), reason);
    }
    let needed: Option<&str> = match options.kind {
        TokenizerKind::Bpe => None,
        TokenizerKind::WordPiece => Some("[UNK]"),
        TokenizerKind::Unigram => Some("<unk>"),
    };
    if let Some(needed) = needed.filter(|n| !specials.iter().any(|s| s == n)) {
        return bad("special_tokens", format!("{specials:?}"), format!("this kind needs {needed} among them"));
    }
    let alphabet = if options.kind == TokenizerKind::WordPiece { 1 } else { 256 };
    let least = alphabet + specials.len();
    if options.vocab_size < least || options.vocab_size > MAX_VOCAB {
        let reason = format!(
            "it must hold {} special tokens and an alphabet of at least {alphabet}: give {least} to {MAX_VOCAB}",
            specials.len()
        );
        return bad("vocab_size", options.vocab_size.to_string(), reason);
    }
    if options.kind != TokenizerKind::Bpe && options.pre != PreTokenizer::default() {
        let reason = "only bpe takes a pre-tokenizer name; leave it out".to_string();
        return bad("pre", options.pre.to_string(), reason);
    }
    if options.limit_alphabet.is_some() && options.kind == TokenizerKind::Bpe {
        let reason = "a byte-level BPE always has the 256 bytes; leave it out".to_string();
        return bad("limit_alphabet", format!("{:?}", options.limit_alphabet), reason);
    }
    Ok(specials)
}

/// The `added_tokens` of special tokens numbered from 0.
fn special_json(specials: &[String]) -> Vec<Value> {
    let entry = |(id, content): (usize, &String)| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    specials.iter().enumerate().map(entry).collect()
}

/// A post-processor that puts special tokens around the text: `before`, the text, `after`.
pub(crate) fn template_json(before: &[(&str, usize)], after: &[(&str, usize)]) -> Value {
    let special = |(name, _): &(&str, usize)| json!({ "SpecialToken": { "id": name, "type_id": 0 } });
    let sequence = |id: &str, type_id: u32| json!({ "Sequence": { "id": id, "type_id": type_id } });
    let mut single: Vec<Value> = before.iter().map(special).collect();
    single.push(sequence("A", 0));
    single.extend(after.iter().map(special));
    let mut both = single.clone();
    both.push(sequence("B", 1));
    both.extend(after.iter().map(|(name, _)| json!({ "SpecialToken": { "id": name, "type_id": 1 } })));
    let tokens: serde_json::Map<String, Value> = before
        .iter()
        .chain(after)
        .map(|(name, id)| (name.to_string(), json!({ "id": name, "ids": [id], "tokens": [name] })))
        .collect();
    json!({ "type": "TemplateProcessing", "single": single, "pair": both, "special_tokens": tokens })
}
