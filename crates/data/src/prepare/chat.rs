//! Conversations, completions and other examples to shards with spans.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::examples::ExamplePipeline;
use super::output::{Claim, PartialDir};
use super::split::SplitPlan;
use super::{Layout, Progress, SplitReport, Splits, TRAIN, VALID, check_writing, sources};
use crate::chat::{AlpacaAs, EncodeChat, KnownWords, Shape, TrainOn};
use crate::read::{self, ExampleOptions, OnMalformed, ReadReport};
use crate::shard::{ExampleIndex, SourceEntry, SplitIndex, VERSION, token_width};
use crate::{Error, Result};

/// What to do with an example of more than [`max_tokens`](ChatOptions::max_tokens).
///
/// Nothing cuts off the beginning: what is left would not begin as anything that the model is ever asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TooLong {
    /// Stop at the first one.
    Error,
    /// Leave it out, count it, report it: half an answer teaches to stop anywhere, or never.
    #[default]
    Drop,
    /// Cut off its end, count it, report it; leave it out if nothing is left to learn.
    TruncateEnd,
}

/// What to do with an example of which nothing would be learnt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NothingLearnt {
    /// Stop at the first one: most often weights or the template are not what was meant.
    #[default]
    Error,
    /// Leave it out, count it, report it.
    Skip,
}

/// How examples are read, masked and written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ChatOptions {
    /// See [`ExampleOptions::shape`]; recognised.
    pub shape: Option<Shape>,
    /// What Alpaca records become; messages.
    pub alpaca: AlpacaAs,
    /// See [`ExampleOptions::known`]; none.
    pub known: KnownWords,
    /// What is learnt; what the assistant says.
    pub train_on: TrainOn,
    /// Most tokens of an example: one more than the context that it is to be trained in, whose last token is only a
    /// target. `None` for any number.
    pub max_tokens: Option<usize>,
    /// What to do with longer ones; drop.
    pub too_long: TooLong,
    /// What to do with examples of which nothing would be learnt; stop.
    pub nothing_learnt: NothingLearnt,
    /// What to do with malformed records, and with conversations that the template refuses; stop.
    pub on_malformed: OnMalformed,
    /// See [`ReadOptions::max_malformed_fraction`](crate::ReadOptions::max_malformed_fraction); 0.01.
    pub max_malformed_fraction: f64,
    /// See [`ExampleOptions::max_document_bytes`]; 64 MiB.
    pub max_document_bytes: usize,
    /// Share of the text that is held out as `valid`, in `0..=0.5`; 0. Whole examples, chosen by a hash of their text,
    /// so that copies of one stay together; never fewer than one.
    pub valid_fraction: f64,
    /// See [`PrepareOptions::shard_tokens`](crate::PrepareOptions::shard_tokens); 2^26.
    pub shard_tokens: u64,
    /// See [`PrepareOptions::overwrite`](crate::PrepareOptions::overwrite); `false`.
    pub overwrite: bool,
}

impl Default for ChatOptions {
    fn default() -> Self {
        let read = ExampleOptions::default();
        Self {
            shape: read.shape,
            alpaca: read.alpaca,
            known: read.known,
            train_on: TrainOn::Assistant,
            max_tokens: None,
            too_long: TooLong::Drop,
            nothing_learnt: NothingLearnt::Error,
            on_malformed: read.on_malformed,
            max_malformed_fraction: read.max_malformed_fraction,
            max_document_bytes: read.max_document_bytes,
            valid_fraction: 0.0,
            shard_tokens: 1 << 26,
            overwrite: false,
        }
    }
}

impl ChatOptions {
    /// The part of the options that reading takes.
    pub fn example_options(&self) -> ExampleOptions {
        ExampleOptions {
            shape: self.shape,
            alpaca: self.alpaca,
            known: self.known.clone(),
            on_malformed: self.on_malformed,
            max_malformed_fraction: self.max_malformed_fraction,
            max_document_bytes: self.max_document_bytes,
            ..ExampleOptions::default()
        }
    }

    fn check(&self) -> Result<()> {
        check_writing(self.valid_fraction, self.shard_tokens)?;
        match self.max_tokens {
            Some(n) if n < 2 => {
                let reason = "must be at least 2: a token, and one that it predicts; e.g. 1025 for a context of 1024";
                Err(Error::option("max_tokens", n, reason))
            }
            _ => Ok(()),
        }
    }
}

/// Where an example stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// 1-based line, or row of a table.
    pub line: u64,
    /// What there is to say about it.
    pub reason: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, line {}: {}", self.path.display(), self.line, self.reason)
    }
}

/// Examples that were left out or cut, for one reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// How many.
    pub examples: u64,
    /// Tokens lost with them: all of theirs, or those behind the cut.
    pub tokens: u64,
    /// The first of them.
    pub first: Vec<Place>,
}

impl LeftOut {
    const KEEP: usize = 10;

    pub(super) fn note(&mut self, tokens: usize, path: &Path, line: u64, reason: String) {
        self.examples += 1;
        self.tokens += tokens as u64;
        if self.first.len() < Self::KEEP {
            self.first.push(Place { path: path.to_owned(), line, reason });
        }
    }
}

/// What was prepared of examples.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ChatReport {
    /// Examples in both splits.
    pub examples: u64,
    /// Those of them that are text without a prompt.
    pub texts: u64,
    /// Tokens in them that are learnt.
    pub num_targets: u64,
    /// Tokens of the longest.
    pub longest: u64,
    /// The training split, `DIR/train`.
    pub train: SplitReport,
    /// The held-out split, `DIR/valid`. All zero, and no such folder, if nothing was to be held out.
    pub valid: SplitReport,
    /// How examples were divided.
    pub split_rule: String,
    /// Left out because they were too long.
    pub dropped: LeftOut,
    /// Cut because they were too long.
    pub truncated: LeftOut,
    /// Left out because nothing of them would be learnt.
    pub nothing_learnt: LeftOut,
    /// Left out because the template refused them.
    pub refused: LeftOut,
    /// What was read and what could not be.
    pub read: ReadReport,
    /// Seconds it took.
    pub seconds: f64,
}

impl ChatReport {
    /// What was left out or cut, in a few lines for a person; empty if nothing was.
    pub fn problems(&self) -> String {
        let mut lines = vec![];
        let parts = [
            (&self.dropped, "longer than max_tokens and left out"),
            (&self.truncated, "longer than max_tokens and cut short"),
            (&self.nothing_learnt, "without anything to learn and left out"),
            (&self.refused, "refused by the template and left out"),
        ];
        for (part, what) in parts.into_iter().filter(|(part, _)| part.examples > 0) {
            let were = if part.examples == 1 { "example was" } else { "examples were" };
            lines.push(format!("{} {were} {what} ({} tokens lost):", part.examples, part.tokens));
            lines.extend(part.first.iter().map(|place| format!("  {place}")));
        }
        lines.extend(Some(self.read.problems()).filter(|p| !p.is_empty()));
        lines.join("\n")
    }
}

/// Reads the examples of `inputs`, encodes and masks each, and writes `out_dir/train` and, with a `valid_fraction`,
/// `out_dir/valid`: shards as [`prepare`](crate::prepare) writes them, with the spans of what is learnt beside them.
///
/// What is learnt is what [`TrainOn`] says, times the weights of turns. Where that is nothing, or everything although there
/// is a prompt, something is wrong with weights or template, and it is an error. Memory, the hidden folder and what a kill
/// leaves are as for [`prepare`](crate::prepare).
///
/// # Errors
/// If an option is wrong, `out_dir` exists, nothing can be read, an example is not as it must be (naming file and line), or
/// the disk refuses.
pub fn prepare_chat(
    inputs: &[PathBuf],
    encoder: &dyn EncodeChat,
    out_dir: &Path,
    options: &ChatOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<ChatReport> {
    options.check()?;
    let claim = Claim::try_take(out_dir)?;
    prepare_chat_claimed(inputs, encoder, claim, options, progress)
}

pub(crate) fn prepare_chat_claimed(
    inputs: &[PathBuf],
    encoder: &dyn EncodeChat,
    claim: Claim,
    options: &ChatOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<ChatReport> {
    let started = std::time::Instant::now();
    options.check()?;
    let partial = PartialDir::create(claim, options.overwrite)?;
    let plan = SplitPlan::choose_examples(inputs, options)?;
    let layout = Layout {
        vocab_size: encoder.vocab_size(),
        shard_tokens: options.shard_tokens,
        valid: options.valid_fraction > 0.0,
        examples: true,
    };
    let mut splits = Splits::create(partial.path(), layout)?;
    let pipeline = ExamplePipeline { encoder, plan: &plan, options };
    let mut report = pipeline.run(inputs, &mut splits, progress)?;
    if report.examples == 0 {
        let files = report.read.files.len() as u64;
        let hint = Some(report.problems()).filter(|p| !p.is_empty()).map(|p| format!("; {p}")).unwrap_or_default();
        return Err(Error::NoExamples { inputs: read::join(inputs), files, hint });
    }
    report.split_rule = plan.describe(options.valid_fraction);
    let base = index_base(encoder, options, &report, sources(&report.read)?);
    let (train, valid) = splits.finish(partial.path(), &base)?;
    let out_dir = partial.publish()?;
    report.train = SplitReport::new(&out_dir, TRAIN, &train);
    report.valid = valid.map(|v| SplitReport::new(&out_dir, VALID, &v)).unwrap_or_default();
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

fn index_base(
    encoder: &dyn EncodeChat,
    options: &ChatOptions,
    report: &ChatReport,
    sources: Vec<SourceEntry>,
) -> SplitIndex {
    SplitIndex {
        format: SplitIndex::format_name(),
        version: VERSION,
        split: String::new(),
        num_tokens: 0,
        num_documents: 0,
        text_bytes: 0,
        token_bytes: token_width(encoder.vocab_size()),
        vocab_size: encoder.vocab_size(),
        // Whatever begins or ends an example, its template put it there.
        eos_id: None,
        bos_id: None,
        append_eos: false,
        prepend_bos: false,
        tokenizer_fingerprint: encoder.tokenizer_fingerprint(),
        split_rule: report.split_rule.clone(),
        shards: vec![],
        sources,
        examples: Some(ExampleIndex {
            encoder_fingerprint: encoder.fingerprint(),
            train_on: options.train_on,
            max_tokens: options.max_tokens,
            too_long: options.too_long,
            dropped: report.dropped.examples,
            truncated: report.truncated.examples,
            lost_tokens: report.dropped.tokens + report.truncated.tokens,
            nothing_learnt: report.nothing_learnt.examples,
            refused: report.refused.examples,
            texts: report.texts,
            unread_fields: report.read.unread_fields.clone(),
        }),
    }
}
