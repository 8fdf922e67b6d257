//! Tokenizers: train, load, encode, decode, save.
//!
//! One type, [`Tokenizer`], reads Hugging Face `tokenizer.json`, SentencePiece `.model`, tiktoken ranks and the
//! vocabulary inside a GGUF, and turns text into ids and back. [`train()`] makes a new one: byte-level BPE with
//! llama.cpp's pre-tokenizers, WordPiece or Unigram. [`DecodeStream`] decodes token by token and never cuts a
//! character.
//!
//! [`ChatEncoder`] renders conversations by the tokenizer's chat template, as transformers does, into prompts and into
//! training data that says which ids each turn's speaker must produce.
//!
//! Not for: tensors or models.
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
//!
//! A conversation, with the built-in template for vocabularies that have no tokens for turns:
//!
//! ```
//! use tallow_tokenizer::{ChatOptions, Message, TrainOptions, train};
//!
//! let tokenizer = train(["who is there, the cat is"], &TrainOptions::default(), |_event| {})?;
//! let chat = tokenizer.chat_encoder_with("alpaca")?;
//! let messages = [Message::new("user", "Who is there?"), Message::new("assistant", "The cat.")];
//!
//! let prompt = ChatOptions { add_generation_prompt: true, ..ChatOptions::default() };
//! let text = chat.render(&messages[..1], &prompt)?;
//! assert!(text.ends_with("### Instruction:\nWho is there?\n\n### Response:\n"));
//!
//! let encoded = chat.encode_spans(&messages, &ChatOptions::default(), &|index| messages[index].role == "assistant")?;
//! let (turn, span) = encoded.spans[0].clone();
//! assert_eq!(tokenizer.decode(&encoded.ids[span], false)?, "The cat.<|endoftext|>");
//! assert_eq!(turn, 1);
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

pub use chat::{ChatEncoder, ChatOptions, EncodedChat, Message, SpecialInContent};
pub use decode::DecodeStream;
pub use error::{Error, Result};
pub use gguf::GgufVocab;
pub use pre::PreTokenizer;
pub use tokenizer::{EncodeOptions, Tokenizer};
pub use train::{TokenizerKind, TrainEvent, TrainOptions, train, train_files};
