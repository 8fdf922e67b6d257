//! Softmax cross-entropy over rows of logits, f32, in place.

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

/// Turns `logits [n, v]` into the gradient of `scale * sum(lse - logit[target] + z * lse^2)`:
/// `scale * ((1 + 2 z lse) softmax - onehot)`, rounded to `T`; zero rows where the target is `ignore`.
#[allow(clippy::too_many_arguments)]
pub fn row_gradients<T: Element>(
    level: Level,
    logits: &mut [f32],
    v: usize,
    targets: &[u32],
    ignore: u32,
    losses: &[RowLoss],
    (scale, z): (f32, f32),
    out: &mut [T],
) {
    let rows = logits.par_chunks_exact_mut(v).zip(out.par_chunks_exact_mut(v)).zip(targets).zip(losses);
    rows.for_each(|(((row, out), &target), loss)| {
        if target == ignore {
            row.fill(0.0);
        } else {
            softmax_row(level, row, loss.lse, scale * (1.0 + 2.0 * z * loss.lse));
            row[target as usize] -= scale;
        }
        out.iter_mut().zip(row).for_each(|(o, x)| *o = T::from_f32(*x));
    });
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
                    let mut grads = vec![0f32; 3 * v];
                    row_gradients(level, &mut logits, v, &targets, u32::MAX, &losses, (0.5, 0.25), &mut grads);
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
