//! The loss curve: `curve.svg` for people and pages, and a small one in letters for the end of a run in a terminal.
//!
//! The drawing needs nothing but an SVG viewer, is the same to the byte for the same numbers, and has its own card
//! behind it that follows the reader's light or dark setting.

mod history;
mod letters;
mod svg;

use std::io;
use std::path::Path;

use crate::metrics::write_atomic;

pub use history::CurveHistory;
pub use letters::{ascii_curve, sparkline};
pub use svg::curve_svg;

/// What to draw. Points are `(step, value)`, steps rising; a value that is not finite is left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    /// Line at the top.
    pub title: String,
    /// Mean training loss of each step, nats a token.
    pub train: Vec<(u64, f64)>,
    /// Validation loss, nats a token: drawn on the axis of the training loss.
    pub valid: Vec<(u64, f64)>,
    /// What a nat a token is in bits a byte: adds an axis of bits a byte on the right. `None` for no such axis.
    pub bits_per_byte_per_nat: Option<f64>,
}

impl Curve {
    /// Writes [`curve_svg`] of it to `path`, whole or not at all.
    ///
    /// # Errors
    /// If the file system refuses; `path` is as it was.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        write_atomic(path, curve_svg(self).as_bytes())
    }
}

/// Writes losses and validation losses (`(step, nats a token)`) as an SVG, whole or not at all; see [`Curve::write`].
///
/// # Errors
/// If the file system refuses; `path` is as it was.
pub fn write_curve_svg(path: &Path, train: &[(u64, f64)], valid: &[(u64, f64)], title: &str) -> io::Result<()> {
    let (train, valid) = (train.to_vec(), valid.to_vec());
    Curve { title: title.into(), train, valid, bits_per_byte_per_nat: None }.write(path)
}

fn finite(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    points.iter().copied().filter(|p| p.1.is_finite()).collect()
}

/// A centred moving mean over 3% of the points. At the start it reaches no further ahead than behind, so that the first
/// fall stays steep; at the end it looks behind only.
fn smooth(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let mut sums = vec![0.0];
    for (_, value) in points {
        sums.push(sums[sums.len() - 1] + value);
    }
    let radius = (points.len() * 3 / 200).min(500);
    let mean = |i: usize| {
        let behind = radius.min(i);
        let ahead = behind.min(points.len() - 1 - i);
        (sums[i + ahead + 1] - sums[i - behind]) / (ahead + behind + 1) as f64
    };
    points.iter().enumerate().map(|(i, p)| (p.0, mean(i))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A loss that falls from about 9 to about 3.3, with a fixed ripple.
    pub(super) fn falling(count: u64) -> Vec<(u64, f64)> {
        let ripple = |s: u64| ((s.wrapping_mul(2_654_435_761) >> 7) % 1000) as f64 / 1000.0 - 0.5;
        let loss = |s: u64| 3.3 + 5.7 * (-(s as f64) * 12.0 / count as f64).exp() + 0.3 * ripple(s);
        (1..=count).map(|s| (s, loss(s))).collect()
    }

    pub(super) fn curve(count: u64) -> Curve {
        let valid = falling(count).into_iter().filter(|p| p.0 % (count / 10) == 0).map(|(s, v)| (s, v + 0.1)).collect();
        Curve {
            title: "quickstart: 5.1M parameters".into(),
            train: falling(count),
            valid,
            bits_per_byte_per_nat: Some(0.44),
        }
    }

    #[test]
    fn smoothing_keeps_ends_and_lowers_noise() {
        let points = falling(1000);
        let smoothed = smooth(&points);
        assert_eq!(smoothed[0], points[0], "the first loss is what it was");
        let rough = |p: &[(u64, f64)]| p[500..].windows(2).map(|w| (w[1].1 - w[0].1).abs()).sum::<f64>();
        assert!(rough(&smoothed) < 0.1 * rough(&points));
        assert_eq!(smooth(&[(1, 2.0), (2, 3.0)]), [(1, 2.0), (2, 3.0)]);
    }

    #[test]
    fn a_curve_is_written_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("curve.svg");
        curve(100).write(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), curve_svg(&curve(100)));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_curve_svg(&dir.path().join("no/curve.svg"), &falling(10), &[], "t").is_err());
    }
}
