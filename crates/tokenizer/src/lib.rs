//! Tokenizers: train, load, encode, decode, save.
//!
//! One type, [`Tokenizer`], reads Hugging Face `tokenizer.json`, SentencePiece `.model`, tiktoken ranks and the
//! vocabulary inside a GGUF, and turns text into ids and back. [`train()`] makes a new one: byte-level BPE with
//! llama.cpp's pre-tokenizers, WordPiece or Unigram. [`DecodeStream`] decodes token by token and never cuts a
//! character.
//!
//! Not for: tensors, models, or the text of chat templates (it carries a template, it does not render it).
//!
//! ```
//! use tallow_tokenizer::{TrainOptions, train};
//!
//! let documents = ["the cat sat on the mat", "the dog sat on the log"];
//! let options = TrainOptions { vocab_size: 270, ..TrainOptions::default() };
//! let tokenizer = train(documents, &options, |_event| {})?;
//! let ids = tokenizer.encode("the cat sat — so what?", false)?;
//! assert_eq!(tokenizer.decode(&ids, false)?, "the cat sat — so what?");
//! # Ok::<(), tallow_tokenizer::Error>(())
//! ```

#![forbid(unsafe_code)]

mod added;
mod base64;
mod byte_alphabet;
mod cache;
mod charsmap;
mod chat;
mod decode;
mod engine;
mod error;
mod gguf;
mod hf;
mod merge;
mod pieces;
mod pre;
mod save;
mod scan;
mod sentencepiece;
mod spec;
mod special;
mod split;
mod tiktoken;
mod tokenizer;
mod train;
mod unicode;
mod unigram;

pub use chat::{EncodedChat, Message};
pub use decode::DecodeStream;
pub use error::{Error, Result};
pub use gguf::GgufVocab;
pub use pre::PreTokenizer;
pub use tokenizer::{EncodeOptions, Tokenizer};
pub use train::{TokenizerKind, TrainEvent, TrainOptions, train, train_files};
