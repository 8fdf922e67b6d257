//! Examples on their way: read on one thread, encoded and masked on all, written in order.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use rayon::prelude::*;

use super::chat::{ChatOptions, ChatReport, NothingLearnt, TooLong};
use super::split::SplitPlan;
use super::{Progress, Splits};
use crate::chat::{Content, EncodeChat, Example, Masked, learnt};
use crate::error::panic_message;
use crate::read::{self, Examples, Item, OnMalformed, ReadReport};
use crate::{Error, Result};

/// Text in one batch: enough for all threads, and what bounds memory (with the longest example).
const BATCH_BYTES: usize = 4 << 20;
const BATCH_EXAMPLES: usize = 4096;
/// Batches read ahead.
const AHEAD: usize = 1;

pub(super) struct ExamplePipeline<'a> {
    pub(super) encoder: &'a dyn EncodeChat,
    pub(super) plan: &'a SplitPlan,
    pub(super) options: &'a ChatOptions,
}

/// Examples that are encoded together.
#[derive(Default)]
struct ExampleBatch {
    examples: Vec<Example>,
    bytes: usize,
    input_bytes_read: u64,
    input_bytes: u64,
}

/// What becomes of an example. Tokens are those that it had.
enum Fate {
    Kept(Masked),
    Truncated { kept: Masked, tokens: usize },
    Dropped { tokens: usize },
    NothingLearnt { tokens: usize },
    Refused { reason: String },
}

impl ExamplePipeline<'_> {
    /// Examples of `inputs` to `splits`.
    pub(super) fn run(
        &self,
        inputs: &[PathBuf],
        splits: &mut Splits,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<ChatReport> {
        let examples = read::examples(inputs, self.options.example_options())?;
        std::thread::scope(|scope| {
            let (sender, receiver) = sync_channel(AHEAD);
            let reader = scope.spawn(move || Self::read(examples, &sender));
            let written = self.write(receiver, splits, progress);
            let read = reader
                .join()
                .unwrap_or_else(|panic| Err(Error::Thread { what: "reading", message: panic_message(&*panic) }));
            // The writer's error first: the reader then only saw nobody listen.
            let report = written?;
            let report = ChatReport { read: read?, ..report };
            self.check_refused(&report)?;
            Ok(report)
        })
    }

    fn read(mut examples: Examples, sender: &SyncSender<ExampleBatch>) -> Result<ReadReport> {
        let mut batch = ExampleBatch::default();
        let send = |batch: &mut ExampleBatch, examples: &Examples| {
            batch.input_bytes_read = examples.input_bytes_read();
            batch.input_bytes = examples.input_bytes();
            sender.send(std::mem::take(batch)).is_ok()
        };
        while let Some(example) = examples.next() {
            let example = match example {
                Ok(example) => example,
                Err(e) => {
                    // What stands before it may be wrong too, and is to be heard of first.
                    send(&mut batch, &examples);
                    return Err(e);
                }
            };
            batch.bytes += example.content.text_bytes();
            batch.examples.push(example);
            let full = batch.bytes >= BATCH_BYTES || batch.examples.len() >= BATCH_EXAMPLES;
            if full && !send(&mut batch, &examples) {
                break;
            }
        }
        if !batch.examples.is_empty() {
            send(&mut batch, &examples);
        }
        Ok(examples.into_report())
    }

    fn write(
        &self,
        batches: Receiver<ExampleBatch>,
        splits: &mut Splits,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<ChatReport> {
        let (mut done, mut report) = (Progress::default(), ChatReport::default());
        for batch in batches {
            let fates: Vec<_> = batch.examples.par_iter().map(|example| self.fate(example)).collect();
            for (example, fate) in batch.examples.iter().zip(fates) {
                let Some(masked) = self.account(example, fate?, &mut report) else { continue };
                let valid = self.plan.holds_out(example.content.hash());
                splits.push(valid, &masked.ids, &masked.spans, masked.text_bytes)?;
                report.examples += 1;
                report.texts += u64::from(matches!(example.content, Content::Text(_)));
                report.num_targets += masked.num_targets();
                report.longest = report.longest.max(masked.ids.len() as u64);
                done.documents += 1;
                done.bytes += example.content.text_bytes() as u64;
                done.tokens += masked.ids.len() as u64;
            }
            done.input_bytes_read = batch.input_bytes_read;
            done.input_bytes = batch.input_bytes;
            progress(done);
        }
        Ok(report)
    }

    /// What is written of an example; the report says what is not.
    fn account(&self, example: &Example, fate: Fate, report: &mut ChatReport) -> Option<Masked> {
        let (path, line) = (&*example.path, example.line);
        match fate {
            Fate::Kept(masked) => return Some(masked),
            Fate::Truncated { kept, tokens } => {
                let lost = tokens - kept.ids.len();
                report.truncated.note(lost, path, line, format!("{tokens} tokens"));
                return Some(kept);
            }
            Fate::Dropped { tokens } => report.dropped.note(tokens, path, line, format!("{tokens} tokens")),
            Fate::NothingLearnt { tokens } => {
                report.nothing_learnt.note(tokens, path, line, format!("{tokens} tokens, none of them to learn"));
            }
            Fate::Refused { reason } => report.refused.note(0, path, line, reason),
        }
        None
    }

    fn fate(&self, example: &Example) -> Result<Fate> {
        let options = self.options;
        let wrong =
            |reason: String| Err(Error::Example { path: example.path.to_path_buf(), line: example.line, reason });
        let mut masked = match learnt(&example.content, self.encoder, options.train_on) {
            Ok(masked) => masked,
            Err(e @ Error::EncoderContract { .. }) => return Err(e),
            Err(e) if options.on_malformed == OnMalformed::Error => {
                let way_out = "mend the example, or use on_malformed = \"skip\" to leave such ones out";
                return wrong(format!("{e}; {way_out}"));
            }
            Err(e) => return Ok(Fate::Refused { reason: e.to_string() }),
        };
        let tokens = masked.ids.len();
        if masked.num_targets() == 0 {
            let way_out = "give a turn of the assistant a weight above 0, or leave such examples out with \
                           nothing_learnt = \"skip\"";
            return match options.nothing_learnt {
                NothingLearnt::Error => wrong(format!("none of its {tokens} tokens would be learnt; {way_out}")),
                NothingLearnt::Skip => Ok(Fate::NothingLearnt { tokens }),
            };
        }
        if masked.learns_its_prompt(options.train_on) {
            let way_out = "the template does not tell the assistant's turns from the others: use another template, or \
                           train_on = \"all\" if the prompt is to be learnt";
            return wrong(format!("all of its {tokens} tokens would be learnt, the prompt too; {way_out}"));
        }
        match options.max_tokens {
            Some(limit) if tokens > limit => match options.too_long {
                TooLong::Error => {
                    let way_out =
                        "shorten it, train with a longer context, or use too_long = \"drop\" or \"truncate_end\"";
                    wrong(format!("{tokens} tokens, more than max_tokens = {limit}; {way_out}"))
                }
                TooLong::Drop => Ok(Fate::Dropped { tokens }),
                TooLong::TruncateEnd => {
                    masked.truncate(limit);
                    let left = masked.num_targets() > 0;
                    Ok(if left { Fate::Truncated { kept: masked, tokens } } else { Fate::Dropped { tokens } })
                }
            },
            _ => Ok(Fate::Kept(masked)),
        }
    }

    /// Refused conversations are as malformed records are: a few may pass.
    fn check_refused(&self, report: &ChatReport) -> Result<()> {
        let (refused, limit) = (report.refused.examples, self.options.max_malformed_fraction);
        let records = report.read.documents + report.read.num_malformed;
        let malformed = refused + report.read.num_malformed;
        match report.refused.first.first() {
            Some(first)
                if self.options.on_malformed == OnMalformed::Report && malformed as f64 > limit * records as f64 =>
            {
                let first = first.to_string();
                Err(Error::TooManyMalformed { malformed, records, percent: limit * 100.0, first })
            }
            _ => Ok(()),
        }
    }
}
