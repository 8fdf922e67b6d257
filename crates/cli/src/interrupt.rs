//! Ctrl-C and SIGTERM: the first asks for a good end, the second ends at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

/// A flag that the first Ctrl-C or SIGTERM raises.
#[derive(Clone)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Starts listening. `what` is said on the first signal, e.g. "saving a checkpoint".
    pub fn listen(what: &'static str) -> anyhow::Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        let raised = flag.clone();
        ctrlc::set_handler(move || {
            if raised.swap(true, Ordering::SeqCst) {
                std::process::exit(i32::from(crate::exit::INTERRUPTED));
            }
            crate::terminal::line(&format!("\nstopping: {what} (again to leave at once)"));
        })
        .context("cannot listen for Ctrl-C")?;
        Ok(Self(flag))
    }

    /// True after the first signal.
    pub fn raised(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}
