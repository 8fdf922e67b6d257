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

/// Log-sum-exp and target logit of each row of `logits [n, v]`; rows whose target is `ignore` are left at zero.
pub fn row_losses(level: Level, logits: &[f32], v: usize, targets: &[u32], ignore: u32, out: &mut [RowLoss]) {
    let rows = logits.par_chunks_exact(v).zip(targets).zip(out);
    rows.for_each(|((row, &target), out)| {
        *out = match target == ignore {
            true => RowLoss::default(),
            false => RowLoss { lse: log_sum_exp_row(level, row), target: row[target as usize] },
        };
    });
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
    /// Scale of the loss, and `z`.
    pub factors: (f32, f32),
}

impl Rows<'_> {
    /// `logits = scale * ((1 + 2 z lse) softmax(logits) - onehot(target))` for one row, zero if it is ignored.
    fn gradient(&self, row: &mut [f32], target: u32, loss: &RowLoss) {
        let (scale, z) = self.factors;
        if target == self.ignore {
            return row.fill(0.0);
        }
        softmax_row(self.level, row, loss.lse, scale * (1.0 + 2.0 * z * loss.lse));
        row[target as usize] -= scale;
    }
}

/// A dtype in which the gradient of logits is handed on.
pub trait LogitGradients: Element {
    /// Turns `logits [n, v]` into the gradient of `scale * sum(lse - logit[target] + z * lse^2)`, rounded to this dtype.
    /// `rounded` is where it goes if it cannot stay in place.
    fn logit_gradients<'a>(rows: &Rows, logits: &'a mut [f32], rounded: &'a mut Vec<Self>) -> &'a [Self];
}

impl LogitGradients for f32 {
    fn logit_gradients<'a>(rows: &Rows, logits: &'a mut [f32], _: &'a mut Vec<f32>) -> &'a [f32] {
        let each = logits.par_chunks_exact_mut(rows.v).zip(rows.targets).zip(rows.losses);
        each.for_each(|((row, &target), loss)| rows.gradient(row, target, loss));
        logits
    }
}

impl LogitGradients for bf16 {
    fn logit_gradients<'a>(rows: &Rows, logits: &'a mut [f32], rounded: &'a mut Vec<bf16>) -> &'a [bf16] {
        rounded.resize(logits.len(), bf16::ZERO);
        let out = rounded.par_chunks_exact_mut(rows.v);
        let each = logits.par_chunks_exact_mut(rows.v).zip(out).zip(rows.targets).zip(rows.losses);
        each.for_each(|(((row, out), &target), loss)| {
            rows.gradient(row, target, loss);
            crate::reduce::round_chunk(rows.level, row, out);
        });
        rounded
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
                    row_losses(level, &logits, v, &targets, u32::MAX, &mut losses);
                    let before = logits.clone();
                    let factors = (0.5, 0.25);
                    let rows = Rows { level, v, targets: &targets, ignore: u32::MAX, losses: &losses, factors };
                    let mut rounded = vec![];
                    let rounded: Vec<bf16> = bf16::logit_gradients(&rows, &mut logits.clone(), &mut rounded).to_vec();
                    let mut unused = vec![];
                    let grads = f32::logit_gradients(&rows, &mut logits, &mut unused);
                    assert!(grads.iter().zip(&rounded).all(|(g, r)| bf16::from_f32(*g) == *r));
                    for (r, &target) in targets.iter().enumerate() {
                        let row = &before[r * v..][..v];
                        if target == u32::MAX {
                            assert!(grads[r * v..][..v].iter().all(|g| *g == 0.0));
                            continue;
                        }
                        let lse = reference(row);
                        assert!((f64::from(losses[r].lse) - lse).abs() <= 1e-6 * lse.abs().max(1.0));
                        for (j, &x) in row.iter().enumerate() {
                            let hot = f64::from(u8::from(j == target as usize));
                            let expected = 0.5 * ((1.0 + 0.5 * lse) * (f64::from(x) - lse).exp() - hot);
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
        row_losses(Level::Avx512, &row, 40, &[1], u32::MAX, &mut out);
        assert!(out[0].lse.is_nan());
    }
}
