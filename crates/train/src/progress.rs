//! How a run tells where it stands: counts, durations, the time left, one plain line a step.

use std::collections::VecDeque;

use crate::anomaly::median;
use crate::metrics::{EvalRecord, StepRecord};

/// How many of the last step times the estimate looks at.
const ETA_WINDOW: usize = 50;

/// Seconds that a run still takes, from the median of its recent step times.
///
/// The first step is left out (it allocates and warms up), and so is time between steps that is not passed in: add what
/// validation and saving take to the step that they follow if they are to count.
#[derive(Clone, Debug, Default)]
pub struct EtaEstimator {
    recent: VecDeque<f64>,
    seen_first: bool,
}

impl EtaEstimator {
    /// An estimator that has seen no step.
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes that a step took `seconds`. A time that is negative or not finite is left out.
    pub fn step(&mut self, seconds: f64) {
        if !std::mem::replace(&mut self.seen_first, true) || !seconds.is_finite() || seconds < 0.0 {
            return;
        }
        if self.recent.len() == ETA_WINDOW {
            self.recent.pop_front();
        }
        self.recent.push_back(seconds);
    }

    /// Median seconds of a recent step. `None` before the second step.
    pub fn seconds_per_step(&self) -> Option<f64> {
        median(self.recent.iter().copied())
    }

    /// Seconds that `remaining` steps will take. `None` before the second step.
    pub fn eta(&self, remaining: u64) -> Option<f64> {
        Some(self.seconds_per_step()? * remaining as f64)
    }
}

/// A duration in two units: `850ms`, `12.3s`, `4m05s`, `2h07m`, `3d04h`.
pub fn format_duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".into();
    }
    if seconds < 0.9995 {
        return format!("{:.0}ms", seconds * 1e3);
    }
    if seconds < 59.95 {
        return format!("{seconds:.1}s");
    }
    let whole = seconds.round() as u64;
    match whole {
        0..3_600 => format!("{}m{:02}s", whole / 60, whole % 60),
        3_600..86_400 => format!("{}h{:02}m", whole / 3_600, whole % 3_600 / 60),
        _ => format!("{}d{:02}h", whole / 86_400, whole % 86_400 / 3_600),
    }
}

/// A count in three significant digits: `999`, `1.2k`, `34.5k`, `1.23M`, `7.1B`, `2T`.
pub fn format_count(count: u64) -> String {
    scaled(count, 1000.0, &["", "k", "M", "B", "T", "P", "E"])
}

/// A count of things: `1 step`, `2 steps`, `1,200 steps`.
pub fn several(count: u64, what: &str) -> String {
    format!("{} {what}{}", grouped(count), if count == 1 { "" } else { "s" })
}

/// A count in all its digits: `4,884,480`.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|g| std::str::from_utf8(g).ok()).collect();
    groups.join(",")
}

/// A number of bytes: `512 B`, `1.5 KiB`, `23.4 GiB`.
pub fn format_bytes(bytes: u64) -> String {
    scaled(bytes, 1024.0, &[" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB"])
}

/// `count` in the largest of `units` in which it is at least 1, with three digits and no trailing zeros.
fn scaled(count: u64, base: f64, units: &[&str]) -> String {
    let (mut value, mut unit) = (count as f64, 0);
    // The bound is where three digits would round up to the next unit.
    while unit + 1 < units.len() && value >= base - if unit == 0 { 0.0 } else { 0.5 } {
        value /= base;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 => 0,
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    let text = format!("{value:.digits$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{}", units[unit])
}

/// Seconds from which waiting for data is worth a word: a loader that keeps ahead answers in microseconds.
const WAIT: f64 = 0.01;

/// One plain line of a step: where it is, loss, gradient norm, rate, speed, memory and the time left (`eta`, seconds).
///
/// ```text
/// step   120/1000  12.0%  loss 4.2171  grad 0.83  lr 2.94e-4  5.31k tok/s  mfu 41.2%  mem 1.2 GiB  eta 2m31s
/// ```
pub fn step_line(record: &StepRecord, total_steps: u64, eta: Option<f64>) -> String {
    let width = total_steps.max(1).to_string().len();
    let percent = 100.0 * record.step as f64 / total_steps.max(1) as f64;
    let mut line = format!(
        "step {:>width$}/{total_steps} {percent:>5.1}%  loss {:.4}  grad {:.2}  lr {:.2e}  {} tok/s",
        record.step,
        record.loss,
        record.grad_norm,
        record.lr,
        format_count(record.tokens_per_s.max(0.0) as u64),
    );
    if let Some(mfu) = record.mfu {
        line += &format!("  mfu {:.1}%", 100.0 * mfu);
    }
    if record.memory > 0 {
        line += &format!("  mem {}", format_bytes(record.memory));
    }
    if record.data_wait_s >= WAIT {
        line += &format!("  waited {:.2}s for data", record.data_wait_s);
    }
    if record.skipped {
        line += "  SKIPPED";
    }
    if let Some(eta) = eta {
        line += &format!("  eta {}", format_duration(eta));
    }
    line
}

/// One plain line of a validation.
///
/// ```text
/// valid  120/1000         loss 4.1032  bits/byte 1.7341  perplexity 60.53  (102k tokens)
/// ```
pub fn eval_line(record: &EvalRecord, total_steps: u64) -> String {
    let width = total_steps.max(1).to_string().len();
    format!(
        "valid {:>width$}/{total_steps}       loss {:.4}  bits/byte {:.4}  perplexity {:.2}  ({} tokens)",
        record.step,
        record.valid_loss,
        record.bits_per_byte,
        record.perplexity,
        format_count(record.tokens),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_things_are_exact_and_in_number() {
        assert_eq!([several(1, "step"), several(0, "row")], ["1 step", "0 rows"]);
        assert_eq!([several(1_200, "step"), grouped(139_400_000)], ["1,200 steps", "139,400,000"]);
    }

    #[test]
    fn durations() {
        let table = [
            (0.0, "0ms"),
            (0.85, "850ms"),
            (0.9996, "1.0s"),
            (12.34, "12.3s"),
            (59.96, "1m00s"),
            (245.0, "4m05s"),
            (3_599.6, "1h00m"),
            (7_630.0, "2h07m"),
            (273_600.0, "3d04h"),
            (f64::NAN, "?"),
            (-1.0, "?"),
        ];
        for (seconds, text) in table {
            assert_eq!(format_duration(seconds), text, "{seconds}");
        }
    }

    #[test]
    fn counts_and_bytes() {
        let counts = [
            (0, "0"),
            (999, "999"),
            (1_000, "1k"),
            (1_234, "1.23k"),
            (34_560, "34.6k"),
            (999_499, "999k"),
            (999_500, "1M"),
            (135_000_000, "135M"),
            (7_100_000_000, "7.1B"),
            (u64::MAX, "18.4E"),
        ];
        for (count, text) in counts {
            assert_eq!(format_count(count), text, "{count}");
        }
        for (bytes, text) in [(512, "512 B"), (1_023, "1023 B"), (1_536, "1.5 KiB"), (25_125_558_682, "23.4 GiB")] {
            assert_eq!(format_bytes(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn eta_leaves_out_the_first_step_and_outliers() {
        let mut eta = EtaEstimator::new();
        assert_eq!(eta.eta(10), None);
        eta.step(60.0);
        assert_eq!(eta.eta(10), None);
        for seconds in [1.0, 1.0, 30.0, 1.0, f64::NAN, 1.0] {
            eta.step(seconds);
        }
        assert_eq!(eta.eta(10), Some(10.0));
        (0..ETA_WINDOW).for_each(|_| eta.step(2.0));
        assert_eq!(eta.seconds_per_step(), Some(2.0), "old steps are forgotten");
    }

    fn record() -> StepRecord {
        StepRecord {
            step: 120,
            tokens: 245_760,
            loss: 4.217_06,
            lr: 2.94e-4,
            grad_norm: 0.8312,
            tokens_per_s: 5_312.0,
            data_wait_s: 0.0,
            mfu: Some(0.4123),
            memory: 1_288_490_189,
            elapsed_s: 46.0,
            skipped: false,
        }
    }

    #[test]
    fn lines() {
        let line = step_line(&record(), 1000, Some(151.0));
        assert_eq!(
            line,
            "step  120/1000  12.0%  loss 4.2171  grad 0.83  lr 2.94e-4  5.31k tok/s  mfu 41.2%  mem 1.2 GiB  eta 2m31s"
        );
        let bare = StepRecord { mfu: None, memory: 0, skipped: true, loss: f64::NAN, ..record() };
        let line = step_line(&bare, 1000, None);
        assert!(line.contains("loss NaN") && line.ends_with("tok/s  SKIPPED"), "{line}");
        let line = step_line(&StepRecord { data_wait_s: 0.25, ..record() }, 1000, None);
        assert!(line.ends_with("  waited 0.25s for data"), "{line}");
        let eval =
            EvalRecord { step: 120, valid_loss: 4.1032, bits_per_byte: 1.7341, perplexity: 60.53, tokens: 102_400 };
        let line = eval_line(&eval, 1000);
        assert_eq!(line, "valid  120/1000       loss 4.1032  bits/byte 1.7341  perplexity 60.53  (102k tokens)");
    }
}
