//! Text files to token shards.

mod chat;
mod examples;
mod output;
mod pipeline;
mod split;

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::encode::Encode;
use crate::hash::sha256_file;
use crate::read::{self, OnMalformed, ReadOptions, ReadReport, TextSplit};
use crate::shard::{SourceEntry, Span, SplitIndex, SplitWriter, VERSION};
use crate::{Error, Result};
pub(crate) use chat::prepare_chat_claimed;
pub use chat::{ChatOptions, ChatReport, LeftOut, NothingLearnt, Place, TooLong, prepare_chat};
pub(crate) use output::Claim;
use output::PartialDir;
use pipeline::Pipeline;
use split::SplitPlan;

/// How text is read, divided and written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrepareOptions {
    /// Name of the text field or column; `text`. See [`ReadOptions::field`].
    pub field: String,
    /// How a plain text file is cut into documents; whole files. See [`ReadOptions::text_split`].
    pub text_split: TextSplit,
    /// What to do with malformed records; report. See [`OnMalformed`].
    pub on_malformed: OnMalformed,
    /// See [`ReadOptions::max_malformed_fraction`]; 0.01.
    pub max_malformed_fraction: f64,
    /// See [`ReadOptions::max_document_bytes`]; 64 MiB.
    pub max_document_bytes: usize,
    /// See [`ReadOptions::normalize_newlines`]; `true`.
    pub normalize_newlines: bool,
    /// Share of the text that is held out as `valid`, in `0..=0.5`; 0 (no `valid` folder).
    ///
    /// Whole documents are held out, chosen by a hash of their text, so that the choice does not depend on their order
    /// and copies of a document stay together. Where there are too few documents for that, the largest one gives its
    /// tail; [`PrepareReport::split_rule`] says what was done.
    pub valid_fraction: f64,
    /// Tokens after which a shard is ended (behind the document that it ends in); 2^26.
    pub shard_tokens: u64,
    /// Ends every document with the encoder's end-of-document id; `true`.
    pub append_eos: bool,
    /// Begins every document with the encoder's begin-of-document id; `false`.
    pub prepend_bos: bool,
    /// Replaces the output folder if it holds prepared tokens (and nothing else); `false`.
    pub overwrite: bool,
}

impl Default for PrepareOptions {
    fn default() -> Self {
        let read = ReadOptions::default();
        Self {
            field: read.field,
            text_split: read.text_split,
            on_malformed: read.on_malformed,
            max_malformed_fraction: read.max_malformed_fraction,
            max_document_bytes: read.max_document_bytes,
            normalize_newlines: read.normalize_newlines,
            valid_fraction: 0.0,
            shard_tokens: 1 << 26,
            append_eos: true,
            prepend_bos: false,
            overwrite: false,
        }
    }
}

impl PrepareOptions {
    /// The part of the options that reading takes.
    pub fn read_options(&self) -> ReadOptions {
        ReadOptions {
            field: self.field.clone(),
            text_split: self.text_split.clone(),
            on_malformed: self.on_malformed,
            max_malformed_fraction: self.max_malformed_fraction,
            max_document_bytes: self.max_document_bytes,
            normalize_newlines: self.normalize_newlines,
            ..ReadOptions::default()
        }
    }

    fn check(&self, encoder: &dyn Encode) -> Result<()> {
        check_writing(self.valid_fraction, self.shard_tokens)?;
        let vocab = encoder.vocab_size();
        for (name, wanted, id) in
            [("append_eos", self.append_eos, encoder.eos_id()), ("prepend_bos", self.prepend_bos, encoder.bos_id())]
        {
            let reason = match id {
                _ if !wanted => continue,
                Some(id) if (id as usize) < vocab => continue,
                Some(id) => format!("the tokenizer names id {id} with a vocabulary of {vocab}"),
                None => format!("the tokenizer has no such token; train one with it, or set {name} = false"),
            };
            return Err(Error::option(name, true, reason));
        }
        Ok(())
    }
}

fn check_writing(valid_fraction: f64, shard_tokens: u64) -> Result<()> {
    if !(0.0..=0.5).contains(&valid_fraction) {
        return Err(Error::option("valid_fraction", valid_fraction, "must be in 0..=0.5, e.g. 0.01"));
    }
    if shard_tokens == 0 {
        return Err(Error::option("shard_tokens", 0, "must be at least 1, e.g. 67108864"));
    }
    Ok(())
}

/// How far a preparation is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Documents written.
    pub documents: u64,
    /// Bytes of text in them.
    pub bytes: u64,
    /// Tokens written.
    pub tokens: u64,
    /// Bytes read of the files on disk (compressed ones as they are).
    pub input_bytes_read: u64,
    /// Bytes of all of them.
    pub input_bytes: u64,
}

/// What a split was made of.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct SplitReport {
    /// Its folder.
    pub path: PathBuf,
    /// Documents.
    pub documents: u64,
    /// Tokens, with the ids around documents.
    pub tokens: u64,
    /// Bytes of text.
    pub text_bytes: u64,
    /// Shards.
    pub shards: usize,
}

impl SplitReport {
    fn new(out_dir: &Path, name: &str, index: &SplitIndex) -> Self {
        Self {
            path: out_dir.join(name),
            documents: index.num_documents,
            tokens: index.num_tokens,
            text_bytes: index.text_bytes,
            shards: index.shards.len(),
        }
    }
}

/// What was prepared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PrepareReport {
    /// Documents in both splits.
    pub documents: u64,
    /// The training split, `DIR/train`.
    pub train: SplitReport,
    /// The held-out split, `DIR/valid`. All zero, and no such folder, if nothing was to be held out.
    pub valid: SplitReport,
    /// How documents were divided.
    pub split_rule: String,
    /// What was read and what could not be.
    pub read: ReadReport,
    /// Seconds it took.
    pub seconds: f64,
}

/// Reads `inputs`, encodes every document and writes `out_dir/train` and, with a `valid_fraction`, `out_dir/valid`.
///
/// Memory is bounded however large the input is: text is encoded in batches of some MiB on all threads, and the
/// result does not depend on their number. Everything is written into a hidden folder beside `out_dir`, which takes its
/// name in one step when all of it is on the disk; a preparation that was killed leaves only that folder, and the next
/// one into the same `out_dir` removes it.
///
/// `progress` is called about once a batch.
///
/// # Errors
/// If an option is wrong, `out_dir` exists, nothing can be read, too much is malformed, or the disk refuses.
pub fn prepare(
    inputs: &[PathBuf],
    encoder: &dyn Encode,
    out_dir: &Path,
    options: &PrepareOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<PrepareReport> {
    options.check(encoder)?;
    let claim = Claim::try_take(out_dir)?;
    prepare_claimed(inputs, encoder, claim, options, progress)
}

pub(crate) fn prepare_claimed(
    inputs: &[PathBuf],
    encoder: &dyn Encode,
    claim: Claim,
    options: &PrepareOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<PrepareReport> {
    let started = std::time::Instant::now();
    options.check(encoder)?;
    let partial = PartialDir::create(claim, options.overwrite)?;
    let plan = SplitPlan::choose(inputs, options)?;
    let layout = Layout {
        vocab_size: encoder.vocab_size(),
        shard_tokens: options.shard_tokens,
        valid: options.valid_fraction > 0.0,
        examples: false,
    };
    let mut splits = Splits::create(partial.path(), layout)?;
    let pipeline = Pipeline { encoder, plan: &plan, options };
    let read = pipeline.run(inputs, &mut splits, progress)?;
    if read.documents == 0 {
        let files = read.files.len() as u64;
        let hint = match read.problems() {
            problems if problems.is_empty() => String::new(),
            problems => format!("; {problems}"),
        };
        return Err(Error::NoDocuments { inputs: read::join(inputs), files, hint });
    }
    let sources = sources(&read)?;
    let rule = plan.describe(options.valid_fraction);
    let base = index_base(encoder, options, &rule, sources);
    let (train, valid) = splits.finish(partial.path(), &base)?;
    let out_dir = partial.publish()?;
    let train = SplitReport::new(&out_dir, TRAIN, &train);
    let valid = valid.map(|v| SplitReport::new(&out_dir, VALID, &v)).unwrap_or_default();
    Ok(PrepareReport {
        documents: train.documents + valid.documents,
        train,
        valid,
        split_rule: rule,
        read,
        seconds: started.elapsed().as_secs_f64(),
    })
}

pub(crate) const TRAIN: &str = "train";
pub(crate) const VALID: &str = "valid";

/// The writers of both splits.
struct Splits {
    train: SplitWriter,
    valid: Option<SplitWriter>,
}

/// What they write.
#[derive(Clone, Copy)]
struct Layout {
    vocab_size: usize,
    shard_tokens: u64,
    valid: bool,
    /// With spans beside the tokens.
    examples: bool,
}

impl Splits {
    fn create(dir: &Path, layout: Layout) -> Result<Self> {
        let Layout { vocab_size, shard_tokens, valid, examples } = layout;
        let writer = |name| SplitWriter::create(&dir.join(name), vocab_size, shard_tokens, examples);
        let valid = if valid { Some(writer(VALID)?) } else { None };
        Ok(Self { train: writer(TRAIN)?, valid })
    }

    fn push(&mut self, valid: bool, tokens: &[u32], spans: &[Span], text_bytes: u64) -> Result<()> {
        match &mut self.valid {
            Some(writer) if valid => writer.push(tokens, spans, text_bytes),
            _ => self.train.push(tokens, spans, text_bytes),
        }
    }

    /// Ends the shards, then writes the indices.
    fn finish(self, dir: &Path, base: &SplitIndex) -> Result<(SplitIndex, Option<SplitIndex>)> {
        let finish = |name: &str, writer: SplitWriter| -> Result<SplitIndex> {
            let shards = writer.finish()?;
            let mut index = SplitIndex { split: name.to_owned(), ..base.clone() };
            for shard in &shards {
                index.num_tokens += shard.num_tokens;
                index.num_documents += shard.num_documents;
                index.text_bytes += shard.text_bytes;
            }
            index.shards = shards;
            index.write(&dir.join(name))?;
            Ok(index)
        };
        let train = finish(TRAIN, self.train)?;
        let valid = self.valid.map(|w| finish(VALID, w)).transpose()?;
        Ok((train, valid))
    }
}

fn index_base(encoder: &dyn Encode, options: &PrepareOptions, rule: &str, sources: Vec<SourceEntry>) -> SplitIndex {
    SplitIndex {
        format: SplitIndex::format_name(),
        version: VERSION,
        split: String::new(),
        num_tokens: 0,
        num_documents: 0,
        text_bytes: 0,
        token_bytes: crate::shard::token_width(encoder.vocab_size()),
        vocab_size: encoder.vocab_size(),
        eos_id: encoder.eos_id().filter(|_| options.append_eos),
        bos_id: encoder.bos_id().filter(|_| options.prepend_bos),
        append_eos: options.append_eos,
        prepend_bos: options.prepend_bos,
        tokenizer_fingerprint: encoder.fingerprint(),
        split_rule: rule.to_owned(),
        shards: vec![],
        sources,
        examples: None,
    }
}

/// The files that were read, with their hashes.
fn sources(read: &ReadReport) -> Result<Vec<SourceEntry>> {
    let entry = |file: &crate::FileReport| -> Result<SourceEntry> {
        Ok(SourceEntry {
            path: file.path.clone(),
            bytes: file.bytes,
            sha256: sha256_file(&file.path)?,
            documents: file.documents,
            malformed: file.malformed,
        })
    };
    read.files.par_iter().map(entry).collect()
}
