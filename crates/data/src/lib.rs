//! Text to token shards, and shards to batches: read, shard, pack, load, resume.
//!
//! [`documents`] reads txt, jsonl and parquet files, compressed or not, and accounts for every record that it could not
//! read. [`prepare`] encodes them into shards, [`TokenDataset`] maps these, and [`Loader`] gives row `g` of a training
//! run as a pure function of `g`: the same for any number of processes, and after any interruption.
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

#![deny(unsafe_code)]

mod batch;
mod cache;
mod dataset;
mod encode;
mod error;
mod hash;
mod inspect;
mod loader;
mod permutation;
mod prefetch;
mod prepare;
mod read;
mod shard;

pub use batch::{Batch, IGNORE_INDEX, Row};
pub use cache::{CacheOptions, cached_prepare};
pub use dataset::TokenDataset;
pub use encode::{Encode, Utf8Bytes};
pub use error::{Error, Result};
pub use inspect::{Damage, LengthBucket, SplitInspection, Verification, inspect, verify};
pub use loader::{Loader, LoaderOptions, LoaderState, Sequential};
pub use prefetch::Prefetch;
pub use prepare::{PrepareOptions, PrepareReport, Progress, SplitReport, prepare};
pub use read::{
    Document, Documents, FileReport, Malformed, OnMalformed, ReadOptions, ReadReport, SkippedFile, TextSplit, documents,
};
pub use shard::{ShardEntry, SourceEntry, SplitIndex, Tokens};
