//! Documents to rows: sample `g` of a run is a pure function of the dataset, the options and `g`.
//!
//! # Order
//! An epoch has [`rows_per_epoch`](Loader::rows_per_epoch) rows `R`; sample `g` is row `g % R` of epoch `g / R`, shuffled.
//! Nothing else decides it, so any number of ranks, any micro-batch size and any point of resumption see the same rows. A
//! batch that reaches past the end of an epoch goes on in the next one; a dataset of fewer rows than a batch is repeated.
//!
//! # Packed rows
//! The documents of an epoch, in an order permuted anew for each epoch, are one stream of `N` tokens, cut into
//! `R = ceil((N - 1) / T)` rows of `T` inputs. The row's targets are the tokens behind its inputs, so neighbouring rows
//! overlap by one token and every token but the first of its document is a target exactly once an epoch. The last token
//! of a document (its EOS) predicts nothing: the next document has nothing to do with it. A document that crosses a row's
//! end goes on in the next row, which sees none of what came before: there its positions start at 0. Only the last row
//! of the stream is padded. Rows themselves are permuted too, so that a long document's rows do not share a batch.
//!
//! # Padded rows
//! Without packing a document of `L` tokens makes `ceil((L - 1) / T)` rows (only the first with `truncate`), each padded.
//!
//! # Examples
//! Where the documents are examples ([`TokenDataset::examples`]) each stays whole, in one row, once an epoch: several a row
//! packed by length (see `packing`), or one a row without packing. All tokens of an example but the last are inputs;
//! targets are those in its spans. Rows are padded, and permuted anew for each epoch.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::packing::ExampleRows;
use crate::permutation::{Permutation, mix};
use crate::prefetch::Prefetch;
use crate::shard::Tokens;
use crate::{Batch, Error, Result, Row, TokenDataset};

/// How documents become rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoaderOptions {
    /// Tokens a row, `T`; 1024.
    pub context_length: usize,
    /// Several documents a row, kept apart by a mask (`true`), or one document a row, padded.
    pub packing: bool,
    /// Only the first `T + 1` tokens of each document, when not packing; `false`.
    pub truncate: bool,
    /// Permute documents and rows, anew for each epoch; `true`.
    pub shuffle: bool,
    /// Decides the permutations.
    pub seed: u64,
}

impl Default for LoaderOptions {
    fn default() -> Self {
        Self { context_length: 1024, packing: true, truncate: false, shuffle: true, seed: 0 }
    }
}

/// What a run must find again to go on with the same rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoaderState {
    /// The seed.
    pub seed: u64,
    /// Global index of the next sample.
    pub next_index: u64,
    /// [`TokenDataset::fingerprint`].
    pub dataset: String,
    /// Tokens a row.
    pub context_length: usize,
    /// Packed or padded.
    pub packing: bool,
    /// Whether long documents are truncated.
    pub truncate: bool,
    /// Shuffled or in order.
    pub shuffle: bool,
}

/// Rows of a dataset by global sample index. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Loader {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dataset: TokenDataset,
    options: LoaderOptions,
    rows: u64,
    /// Padded rows: rows up to and with each document. Else: empty.
    row_ends: Vec<u64>,
    /// Rows of examples.
    examples: Option<ExampleRows>,
    /// Places that hold a token, in all rows.
    filled: u64,
    /// Packed rows: the epoch that was asked for last.
    epoch: Mutex<Option<Arc<Epoch>>>,
}

/// Order of documents of one epoch: 8 bytes a document.
#[derive(Debug)]
struct Epoch {
    number: u64,
    documents: Option<Permutation>,
    /// Tokens up to and with each document, in the epoch's order.
    ends: Vec<u64>,
}

impl Epoch {
    fn document(&self, k: usize) -> u64 {
        self.documents.map_or(k as u64, |p| p.at(k as u64))
    }
}

const DOCUMENTS: u64 = 1;
const ROWS: u64 = 2;

impl Loader {
    /// Rows of `dataset`.
    ///
    /// # Errors
    /// If the context length is 0, the dataset holds nothing to predict, or an example does not fit into a row.
    pub fn new(dataset: TokenDataset, options: LoaderOptions) -> Result<Self> {
        let t = options.context_length;
        if t == 0 || t > 1 << 30 {
            return Err(Error::option("context_length", t, "must be in 1..=1073741824"));
        }
        if options.truncate && options.packing {
            return Err(Error::option("truncate", true, "packed rows cut nothing off; set packing = false"));
        }
        let (tokens, documents) = (dataset.num_tokens(), dataset.num_documents());
        if tokens <= documents {
            return Err(Error::NoRows { tokens, documents });
        }
        let examples = match dataset.examples() {
            None => None,
            Some(_) if options.truncate => {
                let way_out = "prepare them with max_tokens and too_long = \"truncate_end\"";
                return Err(Error::option("truncate", true, format!("examples stay whole; {way_out}")));
            }
            Some(_) if !options.packing => Some(ExampleRows::padded(&dataset, t)?),
            Some(_) if options.shuffle => Some(ExampleRows::best_fit(&dataset, t)?),
            Some(_) => Some(ExampleRows::in_order(&dataset, t)?),
        };
        let mut row_ends = vec![];
        let (rows, filled) = match &examples {
            Some(examples) => (examples.len(), examples.filled()),
            None if options.packing => {
                let rows = (tokens - 1).div_ceil(t as u64);
                (rows, tokens.min(rows * t as u64))
            }
            None => {
                let filled;
                (row_ends, filled) = padded_rows(&dataset, t as u64, options.truncate)?;
                (row_ends.last().copied().unwrap_or(0), filled)
            }
        };
        let epoch = Mutex::new(None);
        Ok(Self { inner: Arc::new(Inner { dataset, options, rows, row_ends, examples, filled, epoch }) })
    }

    /// The dataset.
    pub fn dataset(&self) -> &TokenDataset {
        &self.inner.dataset
    }

    /// The options.
    pub fn options(&self) -> &LoaderOptions {
        &self.inner.options
    }

    /// Rows of an epoch, `R`; at least 1.
    pub fn rows_per_epoch(&self) -> u64 {
        self.inner.rows
    }

    /// Share of the places in an epoch's rows that hold a token, the rest being padding; at most 1.
    pub fn packing_efficiency(&self) -> f64 {
        self.inner.filled as f64 / (self.inner.rows as f64 * self.inner.options.context_length as f64)
    }

    /// Bytes of text per predicted token, see [`TokenDataset::bytes_per_token`].
    pub fn bytes_per_token(&self) -> f64 {
        self.inner.dataset.bytes_per_token()
    }

    /// Puts sample `global_index` into `row`, whose lists are reused.
    ///
    /// # Errors
    /// If a shard turns out to be damaged.
    pub fn sample(&self, global_index: u64, row: &mut Row) -> Result<()> {
        let inner = &*self.inner;
        let (epoch, k) = (global_index / inner.rows, global_index % inner.rows);
        let r = match inner.options.shuffle {
            true => Permutation::new(inner.rows, key(inner.options.seed, epoch, ROWS)).at(k),
            false => k,
        };
        row.clear();
        match &inner.examples {
            Some(examples) => inner.fill_examples(examples, epoch, r, row)?,
            None if inner.options.packing => inner.fill_packed(&*inner.epoch(epoch)?, r, row)?,
            None => inner.fill_padded(r, row)?,
        }
        row.pad(inner.options.context_length);
        Ok(())
    }

    /// Samples `first..first + rows` as one batch. A rank takes its part of a batch by its own `first`.
    ///
    /// # Errors
    /// If a shard turns out to be damaged.
    pub fn batch(&self, first: u64, rows: usize) -> Result<Batch> {
        let mut batch = Batch::with_capacity(rows, self.inner.options.context_length);
        let mut row = Row::default();
        for index in first..first + rows as u64 {
            self.sample(index, &mut row)?;
            batch.push(&row);
        }
        Ok(batch)
    }

    /// Batches of `rows` samples from sample `first` on, made ahead on another thread, without end.
    pub fn prefetch(&self, first: u64, rows: usize) -> Prefetch {
        self.prefetch_strided(first, rows, rows as u64)
    }

    /// Batches of `rows` samples at `first`, `first + stride`, `first + 2 stride`...: one rank's part of batches of
    /// `stride` samples.
    pub fn prefetch_strided(&self, first: u64, rows: usize, stride: u64) -> Prefetch {
        Prefetch::spawn(self.clone(), first, rows, stride)
    }

    /// What to save so that a run can go on at sample `next_index`.
    pub fn state(&self, next_index: u64) -> LoaderState {
        let o = &self.inner.options;
        LoaderState {
            seed: o.seed,
            next_index,
            dataset: self.inner.dataset.fingerprint().to_owned(),
            context_length: o.context_length,
            packing: o.packing,
            truncate: o.truncate,
            shuffle: o.shuffle,
        }
    }

    /// Whether this loader gives the rows that `state` was saved with.
    ///
    /// # Errors
    /// If it does not, naming what differs.
    pub fn check_state(&self, state: &LoaderState) -> Result<()> {
        let now = self.state(state.next_index);
        let differ = |what, was: String, now: String, way_out: &str| {
            Err(Error::State { what, was, now, way_out: way_out.to_owned() })
        };
        if state.dataset != now.dataset {
            let way_out = "train on the same prepared data, or start a new run from the checkpoint's weights";
            return differ("the training data (its fingerprint)", state.dataset.clone(), now.dataset, way_out);
        }
        let options = [
            ("seed", state.seed.to_string(), now.seed.to_string()),
            ("context_length", state.context_length.to_string(), now.context_length.to_string()),
            ("packing", state.packing.to_string(), now.packing.to_string()),
            ("truncate", state.truncate.to_string(), now.truncate.to_string()),
            ("shuffle", state.shuffle.to_string(), now.shuffle.to_string()),
        ];
        match options.into_iter().find(|(_, was, now)| was != now) {
            Some((what, was, now)) => differ(what, was, now, "set it back, or start a new run"),
            None => Ok(()),
        }
    }
}

/// What a permutation is decided by.
pub(crate) fn key(seed: u64, epoch: u64, purpose: u64) -> u64 {
    mix(mix(mix(seed) ^ epoch) ^ purpose)
}

/// Rows up to and with each document, one document a row, and the places that all of them fill.
fn padded_rows(dataset: &TokenDataset, t: u64, truncate: bool) -> Result<(Vec<u64>, u64)> {
    let (mut rows, mut filled) = (0, 0);
    let mut ends = Vec::with_capacity(dataset.num_documents() as usize);
    for i in 0..dataset.num_documents() {
        let len = dataset.document_len(i)?;
        let pieces = len.saturating_sub(1).div_ceil(t);
        let pieces = if truncate { pieces.min(1) } else { pieces };
        rows += pieces;
        filled += len.min(pieces * t);
        ends.push(rows);
    }
    Ok((ends, filled))
}

/// Inputs `from..from + len` of a document, and what they predict.
fn spans(tokens: Tokens<'_>, from: usize, len: usize) -> Option<(Tokens<'_>, Tokens<'_>)> {
    let last = (from + len + 1).min(tokens.len());
    Some((tokens.slice(from..from + len)?, tokens.slice(from + 1..last)?))
}

impl Inner {
    /// The order of documents of an epoch; only the one asked for last is kept.
    fn epoch(&self, number: u64) -> Result<Arc<Epoch>> {
        let mut kept = self.epoch.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(epoch) = &*kept
            && (epoch.number == number || !self.options.shuffle)
        {
            return Ok(epoch.clone());
        }
        *kept = None;
        let n = self.dataset.num_documents();
        let documents = match self.options.shuffle {
            true => Some(Permutation::new(n, key(self.options.seed, number, DOCUMENTS))),
            false => None,
        };
        let mut epoch = Epoch { number, documents, ends: Vec::with_capacity(n as usize) };
        let mut end = 0;
        for k in 0..n as usize {
            end += self.dataset.document_len(epoch.document(k))?;
            epoch.ends.push(end);
        }
        let epoch = Arc::new(epoch);
        *kept = Some(epoch.clone());
        Ok(epoch)
    }

    /// Row `r` of the stream of an epoch's documents.
    fn fill_packed(&self, epoch: &Epoch, r: u64, row: &mut Row) -> Result<()> {
        let t = self.options.context_length;
        let mut at = r * t as u64;
        let mut k = epoch.ends.partition_point(|&end| end <= at);
        while row.len() < t && k < epoch.ends.len() {
            let begin = if k == 0 { 0 } else { epoch.ends[k - 1] };
            let len = ((epoch.ends[k] - at) as usize).min(t - row.len());
            let tokens = self.dataset.document(epoch.document(k))?;
            if let Some((tokens, next)) = spans(tokens, (at - begin) as usize, len) {
                row.push_span(tokens, next);
            }
            at += len as u64;
            k += 1;
        }
        Ok(())
    }

    /// Row `r` of an epoch's examples.
    fn fill_examples(&self, rows: &ExampleRows, epoch: u64, r: u64, row: &mut Row) -> Result<()> {
        for document in rows.row(r, self.options.seed, epoch) {
            let (tokens, spans) = (self.dataset.document(document)?, self.dataset.spans(document)?);
            row.push_example(tokens, spans.into_iter());
        }
        Ok(())
    }

    /// Row `r` of the pieces of documents.
    fn fill_padded(&self, r: u64, row: &mut Row) -> Result<()> {
        let t = self.options.context_length;
        let document = self.row_ends.partition_point(|&end| end <= r);
        let first = if document == 0 { 0 } else { self.row_ends[document - 1] };
        let tokens = self.dataset.document(document as u64)?;
        let from = (r - first) as usize * t;
        if let Some((tokens, next)) = spans(tokens, from, t.min(tokens.len() - from)) {
            row.push_span(tokens, next);
        }
        Ok(())
    }
}

impl TokenDataset {
    /// Every target once, in order and unshuffled, in packed rows of `context` tokens, `rows` rows a batch (fewer in the
    /// last one): what an evaluation reads. Examples stay whole.
    ///
    /// # Errors
    /// If `rows` or `context` is 0, the dataset holds nothing to predict, or an example does not fit into a row.
    pub fn sequential(&self, context: usize, rows: usize) -> Result<Sequential> {
        if rows == 0 {
            return Err(Error::option("rows", rows, "must be at least 1"));
        }
        let options = LoaderOptions { context_length: context, shuffle: false, ..LoaderOptions::default() };
        Ok(Sequential { loader: Loader::new(self.clone(), options)?, rows: rows as u64, next: 0 })
    }
}

/// Iterator over a dataset's batches, see [`TokenDataset::sequential`].
#[derive(Debug)]
pub struct Sequential {
    loader: Loader,
    rows: u64,
    next: u64,
}

impl Iterator for Sequential {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        let left = self.loader.rows_per_epoch() - self.next;
        if left == 0 {
            return None;
        }
        let (first, rows) = (self.next, self.rows.min(left));
        self.next += rows;
        Some(self.loader.batch(first, rows as usize))
    }
}
