//! Softmax cross-entropy over rows of logits, f32, in place.

use half::bf16;
use rayon::prelude::*;

use crate::lanes::{Element, simd_fn};
use crate::simd::Level;

/// What a row of logits gave.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowLoss {
    /// Log of the sum of exponentials.
    pub lse: f32,
    /// Logit of the target.
    pub target: f32,
    /// Mean of the row's logits, where it was asked for.
    pub mean: f32,
}

simd_fn! {
    /// Log-sum-exp of a row. NaN anywhere makes it NaN.
    fn log_sum_exp_row(s, row: &[f32]) -> f32 {
        let mut largest = s.splat(f32::NEG_INFINITY);
        let mut rest = row;
        while rest.len() >= S::LANES {
            largest = s.max(largest, s.load(rest));
            rest = &rest[S::LANES..];
        }
        let top = rest.iter().fold(s.max_lane(largest), |m, &x| m.max(x));
        if top == f32::NEG_INFINITY {
            return if row.iter().any(|x| x.is_nan()) { f32::NAN } else { top };
        }
        let shift = s.splat(top);
        let mut sum = s.splat(0.0);
        let mut rest = row;
        while rest.len() >= S::LANES {
            sum = s.add(sum, s.exp(s.sub(s.load(rest), shift)));
            rest = &rest[S::LANES..];
        }
        let tail: f32 = rest.iter().map(|x| (x - top).exp()).sum();
        top + (s.sum(sum) + tail).ln()
    }
}

simd_fn! {
    /// `row = factor * exp(row - lse)`.
    fn softmax_row(s, row: &mut [f32], lse: f32, factor: f32) {
        let (shift, scale) = (s.splat(lse), s.splat(factor));
        let mut rest = row;
        while rest.len() >= S::LANES {
            let p = s.mul(scale, s.exp(s.sub(s.load(rest), shift)));
            s.store(p, rest);
            rest = &mut rest[S::LANES..];
        }
        for x in rest {
            *x = factor * (*x - lse).exp();
        }
    }
}

simd_fn! {
    /// Adds one number to each element.
    fn shift_row(s, row: &mut [f32], by: f32) {
        let shift = s.splat(by);
        let mut rest = row;
        while rest.len() >= S::LANES {
            s.store(s.add(s.load(rest), shift), rest);
            rest = &mut rest[S::LANES..];
        }
        rest.iter_mut().for_each(|x| *x += by);
    }
}

/// Log-sum-exp and target logit of each row of `logits [n, v]`, and its mean if `means`; rows whose target is `ignore` are
/// left at zero.
pub fn row_losses(
    level: Level,
    logits: &[f32],
    v: usize,
    (targets, ignore): (&[u32], u32),
    means: bool,
    out: &mut [RowLoss],
) {
    let rows = logits.par_chunks_exact(v).zip(targets).zip(out);
    rows.for_each(|((row, &target), out)| {
        *out = match target == ignore {
            true => RowLoss::default(),
            false => RowLoss {
                lse: log_sum_exp_row(level, row),
                target: row[target as usize],
                mean: if means { mean(row) } else { 0.0 },
            },
        };
    });
}

/// Mean of a row, parts in f32 and their total in f64.
fn mean(row: &[f32]) -> f32 {
    let total: f64 = row.chunks(256).map(|part| f64::from(part.iter().sum::<f32>())).sum();
    (total / row.len() as f64) as f32
}

/// Rows whose losses are known, and what their gradient is to be.
pub struct Rows<'a> {
    /// Instruction set.
    pub level: Level,
    /// Logits of a row.
    pub v: usize,
    /// Target of each row.
    pub targets: &'a [u32],
    /// Rows with this target have a zero gradient.
    pub ignore: u32,
    /// From [`row_losses`].
    pub losses: &'a [RowLoss],
    /// Weight of each row; none for 1.
    pub weights: Option<&'a [f32]>,
    /// What the loss is.
    pub factors: Factors,
}

/// `scale * sum of weight * ((1 - s) (lse - logit[target]) + s (lse - mean logit) + z lse^2)`.
#[derive(Clone, Copy, Debug)]
pub struct Factors {
    /// Factor of all of it.
    pub scale: f32,
    /// `z`.
    pub z_loss: f32,
    /// `s`: the part of each target that is spread over the vocabulary.
    pub smoothing: f32,
}

impl Rows<'_> {
    /// `logits = scale w ((1 + 2 z lse) softmax(logits) - (1 - s) onehot(target) - s / v)` for row `i`, zero if it is ignored.
    fn gradient(&self, i: usize, row: &mut [f32]) {
        let (target, loss) = (self.targets[i], &self.losses[i]);
        if target == self.ignore {
            return row.fill(0.0);
        }
        let Factors { scale, z_loss, smoothing } = self.factors;
        let scale = scale * self.weights.map_or(1.0, |weights| weights[i]);
        softmax_row(self.level, row, loss.lse, scale * (1.0 + 2.0 * z_loss * loss.lse));
        if smoothing > 0.0 {
            shift_row(self.level, row, -scale * smoothing / self.v as f32);
        }
        row[target as usize] -= scale * (1.0 - smoothing);
    }
}

/// The gradient of logits `[n, v]`, in rows that are `pitch` elements apart.
pub struct LogitGradient<'a, T> {
    /// All of them, to the end of the last row's pitch.
    pub values: &'a mut [T],
    /// Elements from one row to the next.
    pub pitch: usize,
}

/// A dtype in which the gradient of logits is handed on.
pub trait LogitGradients: Element {
    /// Turns `logits [n, v]` into the gradient of the loss of [`Factors`], rounded to this dtype, where they lie.
    fn logit_gradients<'a>(rows: &Rows, logits: &'a mut [f32]) -> LogitGradient<'a, Self>;
}

impl LogitGradients for f32 {
    fn logit_gradients<'a>(rows: &Rows, logits: &'a mut [f32]) -> LogitGradient<'a, f32> {
        logits.par_chunks_exact_mut(rows.v).enumerate().for_each(|(i, row)| rows.gradient(i, row));
        LogitGradient { values: logits, pitch: rows.v }
    }
}

impl LogitGradients for bf16 {
    fn logit_gradients<'a>(rows: &Rows, logits: &'a mut [f32]) -> LogitGradient<'a, bf16> {
        logits.par_chunks_exact_mut(rows.v).enumerate().for_each(|(i, row)| {
            rows.gradient(i, row);
            crate::reduce::round_in_place(rows.level, row);
        });
        LogitGradient { values: crate::memory::halves(logits), pitch: 2 * rows.v }
    }
}

/// Log-sum-exp of each row of `logits [n, v]`.
pub fn log_sum_exp_rows(level: Level, logits: &[f32], v: usize, out: &mut [f32]) {
    logits.par_chunks_exact(v).zip(out).for_each(|(row, out)| *out = log_sum_exp_row(level, row));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(row: &[f32]) -> f64 {
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(top) + row.iter().map(|&x| f64::from(x - top).exp()).sum::<f64>().ln()
    }

    #[test]
    fn losses_and_gradients_match_f64() {
        for level in [Level::Scalar, Level::Avx2, Level::Avx512] {
            for v in [1, 3, 16, 33, 257] {
                for factor in [1.0f32, 30.0, 1e4] {
                    let mut logits: Vec<f32> =
                        (0..3 * v).map(|i| ((i * 37 % 101) as f32 / 50.0 - 1.0) * factor).collect();
                    let targets = [0, u32::MAX, (v - 1) as u32];
                    let mut losses = [RowLoss::default(); 3];
                    row_losses(level, &logits, v, (&targets, u32::MAX), true, &mut losses);
                    let before = logits.clone();
                    let smoothing = if v % 2 == 0 { 0.0 } else { 0.1 };
                    let factors = Factors { scale: 0.5, z_loss: 0.25, smoothing };
                    let weights = [2.0, 7.0, 0.5];
                    let rows = Rows {
                        level,
                        v,
                        targets: &targets,
                        ignore: u32::MAX,
                        losses: &losses,
                        weights: Some(&weights),
                        factors,
                    };
                    let mut copy = logits.clone();
                    let LogitGradient { values, pitch } = bf16::logit_gradients(&rows, &mut copy);
                    let rounded: Vec<bf16> = values.chunks_exact(pitch).flat_map(|row| row[..v].to_vec()).collect();
                    let grads = f32::logit_gradients(&rows, &mut logits).values;
                    assert!(grads.iter().zip(&rounded).all(|(g, r)| bf16::from_f32(*g) == *r));
                    for (r, &target) in targets.iter().enumerate() {
                        let row = &before[r * v..][..v];
                        if target == u32::MAX {
                            assert!(grads[r * v..][..v].iter().all(|g| *g == 0.0));
                            continue;
                        }
                        let lse = reference(row);
                        assert!((f64::from(losses[r].lse) - lse).abs() <= 1e-6 * lse.abs().max(1.0));
                        let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / v as f64;
                        assert!((f64::from(losses[r].mean) - mean).abs() <= 1e-6 * f64::from(factor));
                        for (j, &x) in row.iter().enumerate() {
                            let hot = f64::from(u8::from(j == target as usize));
                            let spread = f64::from(smoothing) / v as f64;
                            let toward = (1.0 - f64::from(smoothing)) * hot + spread;
                            let scale = 0.5 * f64::from(weights[r]);
                            let expected = scale * ((1.0 + 0.5 * lse) * (f64::from(x) - lse).exp() - toward);
                            let error = (f64::from(grads[r * v + j]) - expected).abs();
                            assert!(error <= 2e-5 * (1.0 + lse.abs() * factor as f64 * 1e-2), "{level:?} {v} {error}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn nan_is_not_hidden() {
        let mut out = [RowLoss::default()];
        let mut row = vec![0.0; 40];
        row[35] = f32::NAN;
        row_losses(Level::Avx512, &row, 40, (&[1], u32::MAX), false, &mut out);
        assert!(out[0].lse.is_nan());
    }
}
