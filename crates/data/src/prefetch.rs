//! Batches made ahead of time.

use std::fmt;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use crate::error::panic_message;
use crate::{Batch, Error, Loader, Result};

/// Batches that wait to be taken, besides the one being made.
const DEPTH: usize = 2;

/// An endless iterator over batches that another thread makes, at most a few ahead.
///
/// Batches come in order, an error in the place of the batch that it befell; behind an error there is nothing. Dropping
/// it ends the thread and waits for it.
pub struct Prefetch {
    receiver: Option<Receiver<Result<Batch>>>,
    thread: Option<JoinHandle<()>>,
}

impl Prefetch {
    pub(crate) fn spawn(loader: Loader, first: u64, rows: usize, stride: u64) -> Self {
        let (sender, receiver) = sync_channel(DEPTH);
        let make = move || {
            let mut next = first;
            loop {
                let batch = loader.batch(next, rows);
                let failed = batch.is_err();
                if sender.send(batch).is_err() || failed {
                    return;
                }
                next += stride;
            }
        };
        Self { receiver: Some(receiver), thread: Some(std::thread::spawn(make)) }
    }

    /// How the thread ended, if not by an error that has been delivered.
    fn ended(&mut self) -> Option<Result<Batch>> {
        let panic = self.thread.take()?.join().err()?;
        Some(Err(Error::Thread { what: "loader", message: panic_message(&*panic) }))
    }
}

impl Iterator for Prefetch {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.receiver.as_ref()?.recv() {
            Ok(batch) => Some(batch),
            Err(_) => {
                self.receiver = None;
                self.ended()
            }
        }
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        // Without a receiver the thread's next send fails, and it leaves.
        self.receiver = None;
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl fmt::Debug for Prefetch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prefetch").finish_non_exhaustive()
    }
}
