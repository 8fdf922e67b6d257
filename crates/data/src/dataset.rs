//! Prepared folders as one dataset of documents.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::hash::sha256_parts;
use crate::shard::{ExampleIndex, MappedShard, MappedSpans, Span, SplitIndex, Tokens};
use crate::{Error, Result};

/// Token shards of one or more folders, memory-mapped, as one list of documents.
///
/// Documents are text to learn as a whole, or examples of which only [`spans`](Self::spans) are learnt.
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
    /// One for each shard, where documents are examples; else empty.
    spans: Vec<MappedSpans>,
    examples: Option<ExampleIndex>,
    /// Documents before each shard, and all of them at the end.
    first_document: Vec<u64>,
    num_tokens: u64,
    num_targets: u64,
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
        let (mut shards, mut spans, mut hashes, mut text_bytes) = (vec![], vec![], vec![], 0u64);
        let first = SplitIndex::read(first_dir)?;
        for dir in dirs {
            let index = SplitIndex::read(dir)?;
            compatible(first_dir, &first, dir, &index)?;
            for entry in &index.shards {
                shards.push(open_shard(dir, &index, entry)?);
                hashes.push(entry.sha256.clone());
                if let (Some(entry), Some(shard)) = (&entry.spans, shards.last()) {
                    spans.push(open_spans(dir, entry, shard)?);
                    hashes.push(entry.sha256.clone());
                }
            }
            text_bytes = text_bytes.saturating_add(index.text_bytes);
        }
        let mut first_document = vec![0u64];
        for shard in &shards {
            let before = first_document.last().copied().unwrap_or(0);
            first_document.push(before + shard.header().num_documents);
        }
        let fingerprint = sha256_parts(hashes.iter().map(|h| h.as_bytes()));
        let num_tokens: u64 = shards.iter().map(|s| s.header().num_tokens).sum();
        let num_targets = match &first.examples {
            Some(_) => spans.iter().map(MappedSpans::num_targets).sum(),
            None => num_tokens - first_document.last().copied().unwrap_or(0),
        };
        let inner = Inner {
            num_tokens,
            num_targets,
            shards,
            spans,
            examples: first.examples,
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

    /// Tokens that a model is asked to predict: all but the first of each document; of examples, those in spans.
    pub fn num_targets(&self) -> u64 {
        self.inner.num_targets
    }

    /// How the examples were made, if documents are examples, which must stay whole and of which only spans are learnt.
    /// Of several folders, the first one's.
    pub fn examples(&self) -> Option<&ExampleIndex> {
        self.inner.examples.as_ref()
    }

    /// Bytes of UTF-8 text that the tokens stand for; of examples, only the text of the turns that are learnt.
    pub fn text_bytes(&self) -> u64 {
        self.inner.text_bytes
    }

    /// Bytes of text per predicted token, `text_bytes / num_targets`.
    ///
    /// With a mean loss `l` in nats a target over every target once, bits per byte are `l / ln 2 / bytes_per_token`. The
    /// first token of a document is never a target while its bytes count (unless documents were prepared with
    /// `prepend_bos`), so over very short documents the figure is slightly too good. Of examples it is a rough figure:
    /// tool calls and ends of turns are targets without bytes.
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

    /// Identifies the tokens, their order and what is learnt of them: a hash over the shards' hashes.
    pub fn fingerprint(&self) -> &str {
        &self.inner.fingerprint
    }

    /// Tokens of document `index`, with its EOS (and BOS) if prepared with them.
    ///
    /// # Errors
    /// If there is no such document, or its shard holds a token outside the vocabulary.
    pub fn document(&self, index: u64) -> Result<Tokens<'_>> {
        let (shard, local) = self.locate(index)?;
        self.inner.shards[shard].document(local)
    }

    /// What is learnt of document `index`, and how much each token counts: spans in order, without overlap. Of a document
    /// that is no example, all of it with weight 1. A document's first token is never a target, whatever its weight.
    ///
    /// # Errors
    /// If there is no such document.
    pub fn spans(&self, index: u64) -> Result<Vec<Span>> {
        let (shard, local) = self.locate(index)?;
        Ok(match self.inner.spans.get(shard) {
            Some(spans) => spans.document(local).collect(),
            None => vec![Span { tokens: 0..self.inner.shards[shard].document_len(local) as u32, weight: 1.0 }],
        })
    }

    /// Number of tokens of document `index`.
    ///
    /// # Errors
    /// If there is no such document.
    pub fn document_len(&self, index: u64) -> Result<u64> {
        self.locate(index).map(|(shard, local)| self.inner.shards[shard].document_len(local))
    }

    /// Bytes of text of document `index`.
    ///
    /// # Errors
    /// If there is no such document.
    pub fn document_bytes(&self, index: u64) -> Result<u64> {
        self.locate(index).map(|(shard, local)| self.inner.shards[shard].document_bytes(local))
    }

    /// The shard of a document, and its index there.
    fn locate(&self, index: u64) -> Result<(usize, u64)> {
        if index >= self.num_documents() {
            return Err(Error::NoSuchDocument { index, documents: self.num_documents() });
        }
        let shard = self.inner.first_document.partition_point(|&first| first <= index) - 1;
        Ok((shard, index - self.inner.first_document[shard]))
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

fn open_spans(dir: &Path, entry: &crate::SpansEntry, shard: &MappedShard) -> Result<MappedSpans> {
    let path = dir.join(&entry.file);
    let spans = MappedSpans::open(&path, shard)?;
    let found = (spans.num_spans(), spans.num_targets());
    if found != (entry.num_spans, entry.num_targets) {
        let (spans, targets) = (entry.num_spans, entry.num_targets);
        let reason = format!("{} spans of {} targets; its index says {spans} of {targets}", found.0, found.1);
        return Err(Error::corrupt(&path, 16, reason));
    }
    Ok(spans)
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
    let made_by = |i: &SplitIndex| i.examples.as_ref().map(|e| e.encoder_fingerprint.clone());
    match (made_by(a), made_by(b)) {
        (None, None) => {}
        (Some(a), Some(b)) if a == b => {}
        (Some(a), Some(b)) => return mixed("template", a, b),
        (a, _) => {
            let kind = |examples| if examples { "examples" } else { "plain text" };
            return mixed("kind", kind(a.is_some()).to_owned(), kind(a.is_none()).to_owned());
        }
    }
    Ok(())
}
