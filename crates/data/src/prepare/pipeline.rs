//! Reading on one thread, encoding on all, writing in order.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use rayon::prelude::*;

use super::split::SplitPlan;
use super::{PrepareOptions, Progress, Splits};
use crate::encode::{Encode, encode_checked};
use crate::error::panic_message;
use crate::read::{self, Documents, ReadReport};
use crate::{Error, Result};

/// Text in one batch: enough for all threads, and what bounds memory (with the longest document).
const BATCH_BYTES: usize = 8 << 20;
const BATCH_DOCUMENTS: usize = 8192;
/// Batches read ahead.
const AHEAD: usize = 1;
/// Text that one call of the encoder gets.
const CALL_BYTES: usize = 64 << 10;

pub(super) struct Pipeline<'a> {
    pub(super) encoder: &'a dyn Encode,
    pub(super) plan: &'a SplitPlan,
    pub(super) options: &'a PrepareOptions,
}

/// Documents that are encoded together.
#[derive(Default)]
struct TextBatch {
    texts: Vec<(String, bool)>,
    bytes: usize,
    input_bytes_read: u64,
    input_bytes: u64,
}

impl Pipeline<'_> {
    /// Documents of `inputs` to `splits`.
    pub(super) fn run(
        &self,
        inputs: &[PathBuf],
        splits: &mut Splits,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<ReadReport> {
        let documents = read::documents(inputs, self.options.read_options())?;
        std::thread::scope(|scope| {
            let (sender, receiver) = sync_channel(AHEAD);
            let reader = scope.spawn(move || self.read(documents, &sender));
            let written = self.write(receiver, splits, progress);
            let read = reader
                .join()
                .unwrap_or_else(|panic| Err(Error::Thread { what: "reading", message: panic_message(&*panic) }));
            // The writer's error first: the reader then only saw nobody listen.
            written?;
            read
        })
    }

    fn read(&self, mut documents: Documents, sender: &SyncSender<TextBatch>) -> Result<ReadReport> {
        let mut batch = TextBatch::default();
        let send = |batch: &mut TextBatch, documents: &Documents| {
            batch.input_bytes_read = documents.input_bytes_read();
            batch.input_bytes = documents.input_bytes();
            sender.send(std::mem::take(batch)).is_ok()
        };
        while let Some(document) = documents.next() {
            for (text, valid) in self.plan.divide(document?.text).into_iter().flatten() {
                batch.bytes += text.len();
                batch.texts.push((text, valid));
            }
            let full = batch.bytes >= BATCH_BYTES || batch.texts.len() >= BATCH_DOCUMENTS;
            if full && !send(&mut batch, &documents) {
                break;
            }
        }
        if !batch.texts.is_empty() {
            send(&mut batch, &documents);
        }
        Ok(documents.into_report())
    }

    fn write(
        &self,
        batches: Receiver<TextBatch>,
        splits: &mut Splits,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<()> {
        let bos = self.encoder.bos_id().filter(|_| self.options.prepend_bos);
        let eos = self.encoder.eos_id().filter(|_| self.options.append_eos);
        let mut done = Progress::default();
        let mut tokens = vec![];
        for batch in batches {
            let encoded = self.encode(&batch)?;
            for ((text, valid), ids) in batch.texts.iter().zip(encoded.iter().flatten()) {
                tokens.clear();
                tokens.extend(bos);
                tokens.extend_from_slice(ids);
                tokens.extend(eos);
                if tokens.is_empty() {
                    continue;
                }
                splits.push(*valid, &tokens, &[], text.len() as u64)?;
                done.documents += 1;
                done.bytes += text.len() as u64;
                done.tokens += tokens.len() as u64;
            }
            done.input_bytes_read = batch.input_bytes_read;
            done.input_bytes = batch.input_bytes;
            progress(done);
        }
        Ok(())
    }

    /// Ids of a batch's documents, in order, in runs of one call each.
    fn encode(&self, batch: &TextBatch) -> Result<Vec<Vec<Vec<u32>>>> {
        let mut calls: Vec<Vec<&str>> = vec![];
        let mut bytes = CALL_BYTES;
        for (text, _) in &batch.texts {
            if bytes >= CALL_BYTES {
                calls.push(vec![]);
                bytes = 0;
            }
            if let Some(call) = calls.last_mut() {
                call.push(text);
            }
            bytes += text.len();
        }
        calls.par_iter().map(|docs| encode_checked(self.encoder, docs)).collect()
    }
}
