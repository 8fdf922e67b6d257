//! Text to token shards, and shards to batches: read, shard, pack, load, resume.
//!
//! [`documents`] reads txt, jsonl and parquet files, compressed or not, and accounts for every record that it could not
//! read. [`prepare`] encodes them into shards, [`TokenDataset`] maps these, and [`Loader`] gives row `g` of a training
//! run as a pure function of `g`: the same for any number of processes, and after any interruption.
//!
//! For fine-tuning, [`examples`] reads conversations, prompts with completions and instructions; [`prepare_chat`] encodes
//! them by anything that implements [`EncodeChat`] and writes beside the tokens which of them are learnt, and how much
//! each counts; [`Loader`] then packs whole examples into rows. [`preview`] shows what is learnt.
//!
//! Not for tensors (a batch is plain lists of ids), not for tokenizing (anything that implements [`Encode`] will do), and
//! not for downloading.
//!
//! ```
//! use tallow_data::{Loader, LoaderOptions, PrepareOptions, TokenDataset, Utf8Bytes, prepare};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = tempfile::tempdir()?;
//! let text = dir.path().join("poems.jsonl");
//! std::fs::write(&text, "{\"text\": \"tall oaks\"}\n{\"text\": \"low moss\"}\n")?;
//!
//! let out = dir.path().join("tokens");
//! let report = prepare(&[text], &Utf8Bytes, &out, &PrepareOptions::default(), &mut |_| {})?;
//! assert_eq!((report.train.documents, report.train.tokens), (2, 9 + 1 + 8 + 1));
//!
//! let dataset = TokenDataset::open(&[out.join("train")])?;
//! let loader = Loader::new(dataset, LoaderOptions { context_length: 6, seed: 7, ..Default::default() })?;
//! assert_eq!(loader.rows_per_epoch(), 3);
//! let batch = loader.batch(0, 3)?;
//! // Every byte but the first of each document, and both document ends, is a target once.
//! assert_eq!(batch.num_targets, 8 + 1 + 7 + 1);
//! # Ok(())
//! # }
//! ```
//!
//! The same for conversations: only what the assistant says is a target.
//!
//! ```
//! use tallow_data::{ChatOptions, Loader, LoaderOptions, TokenDataset, Utf8Chat, prepare_chat};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = tempfile::tempdir()?;
//! let chats = dir.path().join("chats.jsonl");
//! std::fs::write(&chats, r#"{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}"#)?;
//!
//! let out = dir.path().join("tokens");
//! let options = ChatOptions { max_tokens: Some(33), ..ChatOptions::default() };
//! let report = prepare_chat(&[chats], &Utf8Chat, &out, &options, &mut |_| {})?;
//! assert_eq!((report.examples, report.num_targets), (1, 2));
//!
//! let dataset = TokenDataset::open(&[out.join("train")])?;
//! let loader = Loader::new(dataset, LoaderOptions { context_length: 32, ..Default::default() })?;
//! let batch = loader.batch(0, 1)?;
//! // The answer and the end of the turn.
//! assert_eq!((batch.num_targets, batch.weight_sum), (2, 2.0));
//! # Ok(())
//! # }
//! ```

#![deny(unsafe_code)]

mod batch;
mod cache;
mod chat;
mod dataset;
mod encode;
mod error;
mod hash;
mod inspect;
mod loader;
mod packing;
mod permutation;
mod prefetch;
mod prepare;
mod read;
mod shard;

pub use batch::{Batch, IGNORE_INDEX, Row};
pub use cache::{CacheOptions, CachedChat, ChatCacheOptions, cached_prepare, cached_prepare_chat};
pub use chat::{AlpacaAs, Content, EncodeChat, Example, KnownWords, Shape, TrainOn, Turn, Utf8Chat, preview};
pub use dataset::TokenDataset;
pub use encode::{Encode, Utf8Bytes};
pub use error::{Error, Result};
pub use inspect::{Damage, LengthBucket, SplitInspection, Verification, inspect, verify};
pub use loader::{Loader, LoaderOptions, LoaderState, Sequential};
pub use prefetch::Prefetch;
pub use prepare::{
    ChatOptions, ChatReport, LeftOut, NothingLearnt, Place, PrepareOptions, PrepareReport, Progress, SplitReport,
    TooLong, prepare, prepare_chat,
};
pub use read::{
    Document, Documents, ExampleOptions, Examples, FileReport, Malformed, OnMalformed, ReadOptions, ReadReport,
    SkippedFile, TextSplit, UnreadField, documents, examples,
};
pub use shard::{ExampleIndex, ShardEntry, SourceEntry, Span, SpansEntry, SplitIndex, Tokens};
