//! Prepared folders as one dataset of documents.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::hash::sha256_parts;
use crate::shard::{MappedShard, SplitIndex, Tokens};
use crate::{Error, Result};

/// Token shards of one or more folders, memory-mapped, as one list of documents.
///
/// Cheap to clone. Headers, lengths and document borders are checked when it is opened; that every token is inside the
/// vocabulary is checked once a shard, when its first document is read; hashes by [`verify`](crate::verify). The files
/// must not be changed by other programs while they are open.
#[derive(Clone, Debug)]
pub struct TokenDataset {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shards: Vec<MappedShard>,
    /// Documents before each shard, and all of them at the end.
    first_document: Vec<u64>,
    num_tokens: u64,
    text_bytes: u64,
    vocab_size: usize,
    eos_id: Option<u32>,
    bos_id: Option<u32>,
    tokenizer_fingerprint: String,
    fingerprint: String,
}

impl TokenDataset {
    /// Opens the split folders `dirs` (each with an `index.json`), in this order.
    ///
    /// # Errors
    /// If a folder is not a split, a shard is missing or not what its index says, or the folders were prepared with
    /// different tokenizers.
    pub fn open(dirs: &[PathBuf]) -> Result<Self> {
        let Some(first_dir) = dirs.first() else {
            return Err(Error::option("data", "[]", "at least one folder of prepared tokens is needed"));
        };
        let (mut shards, mut hashes, mut text_bytes) = (vec![], vec![], 0u64);
        let first = SplitIndex::read(first_dir)?;
        for dir in dirs {
            let index = SplitIndex::read(dir)?;
            compatible(first_dir, &first, dir, &index)?;
            for entry in &index.shards {
                shards.push(open_shard(dir, &index, entry)?);
                hashes.push(entry.sha256.clone());
            }
            text_bytes = text_bytes.saturating_add(index.text_bytes);
        }
        let mut first_document = vec![0u64];
        for shard in &shards {
            let before = first_document.last().copied().unwrap_or(0);
            first_document.push(before + shard.header().num_documents);
        }
        let fingerprint = sha256_parts(hashes.iter().map(|h| h.as_bytes()));
        let inner = Inner {
            num_tokens: shards.iter().map(|s| s.header().num_tokens).sum(),
            shards,
            first_document,
            text_bytes,
            vocab_size: first.vocab_size,
            eos_id: first.eos_id,
            bos_id: first.bos_id,
            tokenizer_fingerprint: first.tokenizer_fingerprint,
            fingerprint,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Tokens in all documents.
    pub fn num_tokens(&self) -> u64 {
        self.inner.num_tokens
    }

    /// Documents in all shards.
    pub fn num_documents(&self) -> u64 {
        self.inner.first_document.last().copied().unwrap_or(0)
    }

    /// Tokens that a model can be asked to predict: all but the first of each document.
    pub fn num_targets(&self) -> u64 {
        self.num_tokens() - self.num_documents()
    }

    /// Bytes of UTF-8 text that the tokens stand for.
    pub fn text_bytes(&self) -> u64 {
        self.inner.text_bytes
    }

    /// Bytes of text per predicted token, `text_bytes / num_targets`.
    ///
    /// With a mean loss `l` in nats a target over every target once, bits per byte are `l / ln 2 / bytes_per_token`. The
    /// first token of a document is never a target while its bytes count (unless documents were prepared with
    /// `prepend_bos`), so over very short documents the figure is slightly too good.
    pub fn bytes_per_token(&self) -> f64 {
        self.text_bytes() as f64 / self.num_targets().max(1) as f64
    }

    /// Size of the vocabulary; every token is below it.
    pub fn vocab_size(&self) -> usize {
        self.inner.vocab_size
    }

    /// The token that ends every document, if the data was prepared with one.
    pub fn eos_id(&self) -> Option<u32> {
        self.inner.eos_id
    }

    /// The token that begins every document, if the data was prepared with one.
    pub fn bos_id(&self) -> Option<u32> {
        self.inner.bos_id
    }

    /// Fingerprint of the tokenizer that made the tokens.
    pub fn tokenizer_fingerprint(&self) -> &str {
        &self.inner.tokenizer_fingerprint
    }

    /// Identifies the tokens and their order: a hash over the shards' hashes.
    pub fn fingerprint(&self) -> &str {
        &self.inner.fingerprint
    }

    /// Tokens of document `index`, with its EOS (and BOS) if prepared with them.
    ///
    /// # Errors
    /// If there is no such document, or its shard holds a token outside the vocabulary.
    pub fn document(&self, index: u64) -> Result<Tokens<'_>> {
        let (shard, local) = self.locate(index)?;
        shard.document(local)
    }

    /// Number of tokens of document `index`.
    ///
    /// # Errors
    /// If there is no such document.
    pub fn document_len(&self, index: u64) -> Result<u64> {
        self.locate(index).map(|(shard, local)| shard.document_len(local))
    }

    /// Bytes of text of document `index`.
    ///
    /// # Errors
    /// If there is no such document.
    pub fn document_bytes(&self, index: u64) -> Result<u64> {
        self.locate(index).map(|(shard, local)| shard.document_bytes(local))
    }

    fn locate(&self, index: u64) -> Result<(&MappedShard, u64)> {
        if index >= self.num_documents() {
            return Err(Error::NoSuchDocument { index, documents: self.num_documents() });
        }
        let shard = self.inner.first_document.partition_point(|&first| first <= index) - 1;
        Ok((&self.inner.shards[shard], index - self.inner.first_document[shard]))
    }
}

fn open_shard(dir: &Path, index: &SplitIndex, entry: &crate::ShardEntry) -> Result<MappedShard> {
    let path = dir.join(&entry.file);
    let shard = MappedShard::open(&path)?;
    let header = shard.header();
    let found = (header.num_tokens, header.num_documents, header.vocab_size as usize);
    if found != (entry.num_tokens, entry.num_documents, index.vocab_size) {
        let reason = format!(
            "{} tokens, {} documents, vocabulary {}; its index says {}, {}, {}",
            found.0, found.1, found.2, entry.num_tokens, entry.num_documents, index.vocab_size
        );
        return Err(Error::corrupt(&path, 16, reason));
    }
    Ok(shard)
}

fn compatible(first_dir: &Path, first: &SplitIndex, dir: &Path, other: &SplitIndex) -> Result<()> {
    let mixed = |what, a: String, b: String| {
        let values = format!("{a} and {b}");
        Err(Error::Mixed { first: first_dir.to_owned(), second: dir.to_owned(), what, values })
    };
    let (a, b) = (first, other);
    if a.tokenizer_fingerprint != b.tokenizer_fingerprint {
        return mixed("tokenizer", a.tokenizer_fingerprint.clone(), b.tokenizer_fingerprint.clone());
    }
    if a.vocab_size != b.vocab_size {
        return mixed("vocabulary size", a.vocab_size.to_string(), b.vocab_size.to_string());
    }
    if (a.eos_id, a.bos_id) != (b.eos_id, b.bos_id) {
        let ids = |i: &SplitIndex| format!("eos {:?} bos {:?}", i.eos_id, i.bos_id);
        return mixed("the tokens around a document", ids(a), ids(b));
    }
    Ok(())
}
