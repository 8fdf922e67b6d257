//! Token shards: the files that text is prepared into.
//!
//! A split is a folder of `shard-00000.tok`, `shard-00001.tok`... and an `index.json`. All numbers are little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | `TALLOWTK` |
//! | 8..12, 12..16 | version (1), bytes a token (2 or 4) as u32 |
//! | 16..24, 24..32 | number of tokens `n`, number of documents `d` as u64 |
//! | 32..36 | vocabulary size as u32 |
//! | 36..64 | zero |
//! | then | `n` tokens, zeros up to a multiple of 8 |
//! | then | `d + 1` offsets as u64: document `i` is tokens `offset[i]..offset[i + 1]` |
//! | then | `d` lengths as u64: bytes of text of document `i` |
//!
//! A document never crosses a shard's border.
//!
//! Where documents are examples of which only a part is learnt, each shard has a `shard-NNNNN.spans` beside it (see the
//! module `spans`).

mod index;
mod map;
mod spans;
mod writer;

pub(crate) use index::INDEX_FILE;
pub use index::{ExampleIndex, ShardEntry, SourceEntry, SpansEntry, SplitIndex};
pub(crate) use map::MappedShard;
pub use map::Tokens;
pub(crate) use spans::MappedSpans;
pub use spans::Span;
pub(crate) use writer::SplitWriter;

use std::path::Path;

use crate::{Error, Result};

pub(crate) const MAGIC: &[u8; 8] = b"TALLOWTK";
pub(crate) const VERSION: u32 = 1;
pub(crate) const HEADER: usize = 64;

/// Head of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) width: usize,
    pub(crate) num_tokens: u64,
    pub(crate) num_documents: u64,
    pub(crate) vocab_size: u32,
}

/// Bytes a token takes: 2 where every id fits.
pub(crate) fn token_width(vocab_size: usize) -> usize {
    if vocab_size <= 1 << 16 { 2 } else { 4 }
}

impl Header {
    pub(crate) fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0u8; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.width as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.num_tokens.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.num_documents.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.vocab_size.to_le_bytes());
        bytes
    }

    /// The header of a file, if it is one and the file is as long as it says.
    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        if bytes.len() < HEADER {
            return Err(Error::corrupt(path, bytes.len() as u64, format!("ends inside its header of {HEADER} bytes")));
        }
        if bytes[..8] != *MAGIC {
            return Err(Error::corrupt(path, 0, "not a token shard (it does not begin with TALLOWTK)"));
        }
        let version = u32_at(bytes, 8);
        if version != VERSION {
            return Err(Error::corrupt(path, 8, format!("version {version}; this program reads version {VERSION}")));
        }
        let header = Self {
            width: u32_at(bytes, 12) as usize,
            num_tokens: u64_at(bytes, 16),
            num_documents: u64_at(bytes, 24),
            vocab_size: u32_at(bytes, 32),
        };
        if header.width != token_width(header.vocab_size as usize) {
            let reason = format!("{} bytes a token with a vocabulary of {}", header.width, header.vocab_size);
            return Err(Error::corrupt(path, 12, reason));
        }
        let expected = header.file_bytes();
        if expected != Some(bytes.len() as u64) {
            let expected = expected.map_or("an impossible number of".to_owned(), |n| n.to_string());
            let reason = format!("the header tells of {expected} bytes, the file has {}", bytes.len());
            return Err(Error::corrupt(path, 16, reason));
        }
        Ok(header)
    }

    /// Where the offsets begin; `None` if the header's numbers are absurd.
    pub(crate) fn offsets_at(&self) -> Option<u64> {
        let tokens = self.num_tokens.checked_mul(self.width as u64)?;
        tokens.checked_add(HEADER as u64)?.checked_next_multiple_of(8)
    }

    fn file_bytes(&self) -> Option<u64> {
        let entries = self.num_documents.checked_mul(2)?.checked_add(1)?;
        self.offsets_at()?.checked_add(entries.checked_mul(8)?)
    }
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0u8; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(four)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0u8; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(eight)
}
