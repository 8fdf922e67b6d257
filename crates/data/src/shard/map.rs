//! Shards as mapped files.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::Mmap;

use super::{HEADER, Header, u64_at};
use crate::{Error, Result};

/// A run of tokens of a shard, 2 or 4 bytes each, not copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokens<'a> {
    bytes: &'a [u8],
    width: usize,
}

impl<'a> Tokens<'a> {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.width
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Token `i`, if there is one.
    pub fn get(&self, i: usize) -> Option<u32> {
        self.slice(i..i.checked_add(1)?)?.iter().next()
    }

    /// A part of them, if all of it exists.
    pub fn slice(&self, range: Range<usize>) -> Option<Tokens<'a>> {
        let bytes = self.bytes.get(range.start.checked_mul(self.width)?..range.end.checked_mul(self.width)?)?;
        Some(Self { bytes, width: self.width })
    }

    /// The tokens in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + use<'a> {
        let width = self.width;
        self.bytes.chunks_exact(width).map(move |c| match width {
            2 => u32::from(u16::from_le_bytes([c[0], c[1]])),
            _ => u32::from_le_bytes([c[0], c[1], c[2], c[3]]),
        })
    }

    /// Copies them behind `out`.
    pub fn extend_into(&self, out: &mut Vec<u32>) {
        // One loop a width, so that each is vectorised.
        match self.width {
            2 => out.extend(self.bytes.chunks_exact(2).map(|c| u32::from(u16::from_le_bytes([c[0], c[1]])))),
            _ => out.extend(self.bytes.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]]))),
        }
    }

    /// A copy of them.
    pub fn to_vec(&self) -> Vec<u32> {
        let mut out = Vec::with_capacity(self.len());
        self.extend_into(&mut out);
        out
    }
}

/// One mapped shard whose structure has been checked; its tokens are checked when they are first touched.
#[derive(Debug)]
pub(crate) struct MappedShard {
    path: PathBuf,
    map: Mmap,
    header: Header,
    offsets_at: usize,
    tokens_checked: AtomicBool,
}

/// Maps a file of a prepared folder; `what` it is.
pub(super) fn map_file(path: &Path, what: &str) -> Result<Mmap> {
    let file = File::open(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::corrupt(path, 0, format!("the {what} is missing")),
        _ => Error::io(path, e),
    })?;
    // SAFETY: the mapping is read-only and owned by whoever asked for it, who hands it to nobody else. Prepared folders
    // are written once, under another name, and renamed when complete: nothing of ours changes a file that is mapped. A
    // foreign program that changes or truncates it meanwhile breaks the documented contract of `TokenDataset` (as for
    // every mapped file).
    unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))
}

impl MappedShard {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let map = map_file(path, "shard")?;
        let header = Header::parse(path, &map)?;
        let offsets_at = header.offsets_at().map_or(0, |at| at as usize);
        let shard = Self { path: path.to_owned(), map, header, offsets_at, tokens_checked: AtomicBool::new(false) };
        shard.check_offsets()?;
        Ok(shard)
    }

    pub(crate) fn header(&self) -> Header {
        self.header
    }

    fn check_offsets(&self) -> Result<()> {
        let at = |i: u64| self.offsets_at as u64 + 8 * i;
        let mut before = 0;
        for i in 0..=self.header.num_documents {
            let offset = self.offset(i);
            let follows = if i == 0 { offset == 0 } else { offset > before };
            if !follows || offset > self.header.num_tokens {
                let reason = format!("border {i} of the documents is at token {offset}, the one before at {before}");
                return Err(Error::corrupt(&self.path, at(i), reason));
            }
            before = offset;
        }
        if before != self.header.num_tokens {
            let reason = format!("the documents end at token {before} of {}", self.header.num_tokens);
            return Err(Error::corrupt(&self.path, at(self.header.num_documents), reason));
        }
        Ok(())
    }

    fn offset(&self, i: u64) -> u64 {
        u64_at(&self.map, self.offsets_at + 8 * i as usize)
    }

    /// Tokens of document `i`, without looking at them.
    pub(crate) fn document_len(&self, i: u64) -> u64 {
        self.offset(i + 1) - self.offset(i)
    }

    /// Bytes of text of document `i`.
    pub(crate) fn document_bytes(&self, i: u64) -> u64 {
        u64_at(&self.map, self.offsets_at + 8 * (self.header.num_documents + 1 + i) as usize)
    }

    /// Document `i`, after every token of the shard has once been found to be in the vocabulary.
    pub(crate) fn document(&self, i: u64) -> Result<Tokens<'_>> {
        if !self.tokens_checked.load(Ordering::Relaxed) {
            self.check_tokens()?;
            self.tokens_checked.store(true, Ordering::Relaxed);
        }
        let (from, to) = (self.offset(i) as usize, self.offset(i + 1) as usize);
        let width = self.header.width;
        Ok(Tokens { bytes: &self.map[HEADER + from * width..HEADER + to * width], width })
    }

    /// Every token is below the vocabulary size.
    pub(crate) fn check_tokens(&self) -> Result<()> {
        let width = self.header.width;
        let bytes = &self.map[HEADER..HEADER + self.header.num_tokens as usize * width];
        let vocab = self.header.vocab_size;
        // Maxima of blocks: one comparison a block, so that the usual case runs at the speed of memory.
        const BLOCK: usize = 1 << 14;
        for (number, block) in bytes.chunks(BLOCK * width).enumerate() {
            let block = Tokens { bytes: block, width };
            if block.iter().fold(0, u32::max) < vocab {
                continue;
            }
            let (at, id) = block.iter().enumerate().find(|&(_, id)| id >= vocab).unwrap_or_default();
            let offset = HEADER + (number * BLOCK + at) * width;
            let reason = format!("token {id} is outside the vocabulary of {vocab}");
            return Err(Error::corrupt(&self.path, offset as u64, reason));
        }
        Ok(())
    }
}
