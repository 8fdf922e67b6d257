//! Progress of work that is not training: a bar on a terminal, a plain line now and then otherwise, always on stderr.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Plain lines come at most this often.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows how far a piece of work is.
pub struct Meter {
    bar: Option<ProgressBar>,
    last_line: Instant,
}

impl Meter {
    /// With nothing shown yet.
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:30} {percent:>3}%  {elapsed:>4}  {msg}");
            ProgressBar::new(1).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, last_line: Instant::now() }
    }

    /// `done` of `total` (0 where nobody knows), and what that means.
    pub fn set(&mut self, done: u64, total: u64, message: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(total.max(1));
                bar.set_position(if total == 0 { 0 } else { done });
                bar.set_message(message.to_owned());
            }
            None if self.last_line.elapsed() >= LINE_EVERY => {
                self.last_line = Instant::now();
                match total {
                    0 => eprintln!("{message}"),
                    _ => eprintln!("{:3}%  {message}", (done.min(total) as f64 / total as f64 * 100.0) as u64),
                }
            }
            None => {}
        }
    }

    /// A line that stays.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
