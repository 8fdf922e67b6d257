//! Spans of examples: which tokens of each document of a shard are learnt, and how much each counts.
//!
//! `shard-NNNNN.spans` stands beside `shard-NNNNN.tok`. All numbers are little-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | `TALLOWSP` |
//! | 8..12 | version (1) as u32 |
//! | 12..16 | zero |
//! | 16..24, 24..32, 32..40 | number of documents `d`, of spans `s`, of tokens of the shard as u64 |
//! | 40..64 | zero |
//! | then | `d + 1` offsets as u64: document `i` has the spans `offset[i]..offset[i + 1]` |
//! | then | `s` spans of 12 bytes: first token and the one behind the last as u32, counted in the document; weight as f32 |
//!
//! Spans of a document are in order, not empty, and do not overlap; weights are finite and not negative. Tokens in no span
//! are not learnt.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::map::{MappedShard, map_file};
use super::{HEADER, SpansEntry, u32_at, u64_at};
use crate::hash::sha256_file;
use crate::{Error, Result};

const MAGIC: &[u8; 8] = b"TALLOWSP";
const VERSION: u32 = 1;
const SPAN: usize = 12;

/// A run of tokens of a document that count the same.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The tokens, counted from the document's first.
    pub tokens: Range<u32>,
    /// How much each counts in the loss.
    pub weight: f32,
}

impl Span {
    /// Tokens of it that are targets: all but a document's first, and none where the weight is 0.
    pub(crate) fn num_targets(&self) -> u64 {
        if self.weight > 0.0 { u64::from(self.tokens.end.saturating_sub(self.tokens.start.max(1))) } else { 0 }
    }
}

/// Collects the spans of a shard until it ends.
#[derive(Default)]
pub(super) struct SpansWriter {
    /// Spans up to and with each document.
    ends: Vec<u64>,
    spans: Vec<Span>,
}

impl SpansWriter {
    pub(super) fn push(&mut self, spans: &[Span]) {
        self.spans.extend_from_slice(spans);
        self.ends.push(self.spans.len() as u64);
    }

    /// Writes the file beside `shard`, a shard of `num_tokens`.
    pub(super) fn finish(self, shard: &Path, num_tokens: u64) -> Result<SpansEntry> {
        let path = shard.with_extension("spans");
        let bytes = self.write(&path, num_tokens).map_err(|e| Error::io(&path, e))?;
        Ok(SpansEntry {
            file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            bytes,
            sha256: sha256_file(&path)?,
            num_spans: self.spans.len() as u64,
            num_targets: self.spans.iter().map(Span::num_targets).sum(),
        })
    }

    fn write(&self, path: &Path, num_tokens: u64) -> std::io::Result<u64> {
        let mut file = BufWriter::with_capacity(1 << 18, File::create_new(path)?);
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[16..24].copy_from_slice(&(self.ends.len() as u64).to_le_bytes());
        header[24..32].copy_from_slice(&(self.spans.len() as u64).to_le_bytes());
        header[32..40].copy_from_slice(&num_tokens.to_le_bytes());
        file.write_all(&header)?;
        for offset in [0].iter().chain(&self.ends) {
            file.write_all(&offset.to_le_bytes())?;
        }
        for Span { tokens, weight } in &self.spans {
            file.write_all(&tokens.start.to_le_bytes())?;
            file.write_all(&tokens.end.to_le_bytes())?;
            file.write_all(&weight.to_le_bytes())?;
        }
        file.flush()?;
        file.get_ref().sync_all()?;
        Ok((HEADER + 8 * (self.ends.len() + 1) + SPAN * self.spans.len()) as u64)
    }
}

/// The mapped spans of one shard, all of them checked.
#[derive(Debug)]
pub(crate) struct MappedSpans {
    path: PathBuf,
    map: Mmap,
    num_documents: u64,
    num_spans: u64,
    num_targets: u64,
}

impl MappedSpans {
    /// Opens the spans of `shard`.
    pub(crate) fn open(path: &Path, shard: &MappedShard) -> Result<Self> {
        let map = map_file(path, "file of spans")?;
        let corrupt = |at: usize, reason: String| Err(Error::corrupt(path, at as u64, reason));
        if map.len() < HEADER {
            return corrupt(map.len(), format!("ends inside its header of {HEADER} bytes"));
        }
        if map[..8] != *MAGIC {
            return corrupt(0, "not a file of spans (it does not begin with TALLOWSP)".to_owned());
        }
        if u32_at(&map, 8) != VERSION {
            return corrupt(8, format!("version {}; this program reads version {VERSION}", u32_at(&map, 8)));
        }
        if let Some(at) = (12..16).chain(40..HEADER).find(|&at| map[at] != 0) {
            return corrupt(at, "a byte of the header that must be zero is not".to_owned());
        }
        let [num_documents, num_spans, num_tokens] = [16, 24, 32].map(|at| u64_at(&map, at));
        let header = shard.header();
        if (num_documents, num_tokens) != (header.num_documents, header.num_tokens) {
            let (d, t) = (header.num_documents, header.num_tokens);
            let reason = format!("of {num_documents} documents and {num_tokens} tokens; its shard has {d} and {t}");
            return corrupt(16, reason);
        }
        // The number of documents is the shard's, which fits into a file.
        let offsets = HEADER as u64 + 8 * (num_documents + 1);
        let expected = num_spans.checked_mul(SPAN as u64).and_then(|s| s.checked_add(offsets));
        if expected != Some(map.len() as u64) {
            let expected = expected.map_or("an impossible number of".to_owned(), |n| n.to_string());
            return corrupt(24, format!("the header tells of {expected} bytes, the file has {}", map.len()));
        }
        let mut spans = Self { path: path.to_owned(), map, num_documents, num_spans, num_targets: 0 };
        spans.check(shard)?;
        spans.num_targets = (0..num_spans).map(|i| spans.span(i).num_targets()).sum();
        Ok(spans)
    }

    /// Tokens that are learnt.
    pub(crate) fn num_targets(&self) -> u64 {
        self.num_targets
    }

    pub(crate) fn num_spans(&self) -> u64 {
        self.num_spans
    }

    /// The spans of document `i`.
    pub(crate) fn document(&self, i: u64) -> impl Iterator<Item = Span> + '_ {
        (self.offset(i)..self.offset(i + 1)).map(|s| self.span(s))
    }

    fn offset(&self, i: u64) -> u64 {
        u64_at(&self.map, HEADER + 8 * i as usize)
    }

    fn span_at(&self, i: u64) -> usize {
        HEADER + 8 * (self.num_documents as usize + 1) + SPAN * i as usize
    }

    fn span(&self, i: u64) -> Span {
        let at = self.span_at(i);
        let tokens = u32_at(&self.map, at)..u32_at(&self.map, at + 4);
        Span { tokens, weight: f32::from_bits(u32_at(&self.map, at + 8)) }
    }

    fn check(&self, shard: &MappedShard) -> Result<()> {
        let corrupt = |at: usize, reason: String| Err(Error::corrupt(&self.path, at as u64, reason));
        let mut before = 0;
        for i in 0..=self.num_documents {
            let offset = self.offset(i);
            let follows = if i == 0 { offset == 0 } else { offset >= before };
            if !follows || offset > self.num_spans {
                let reason = format!("border {i} of the spans is at {offset}, the one before at {before}");
                return corrupt(HEADER + 8 * i as usize, reason);
            }
            before = offset;
        }
        if before != self.num_spans {
            let reason = format!("the spans end at {before} of {}", self.num_spans);
            return corrupt(HEADER + 8 * self.num_documents as usize, reason);
        }
        for document in 0..self.num_documents {
            let len = shard.document_len(document);
            let mut end = 0;
            for i in self.offset(document)..self.offset(document + 1) {
                let Span { tokens, weight } = self.span(i);
                if tokens.start < end || tokens.end <= tokens.start || u64::from(tokens.end) > len {
                    let reason = format!("a span {tokens:?} behind {end} in a document of {len} tokens");
                    return corrupt(self.span_at(i), reason);
                }
                if !weight.is_finite() || weight < 0.0 {
                    return corrupt(self.span_at(i) + 8, format!("a weight of {weight}"));
                }
                end = tokens.end;
            }
        }
        Ok(())
    }
}
