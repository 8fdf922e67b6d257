//! bf16 products on machines without bf16 instructions: operands widened to f32, a panel of rows at a time.

use half::bf16;
use rayon::prelude::*;

use super::{Out, Strides, f32_gemm};
use crate::memory::unspecified;

/// Rows of the result computed at once, so that the widened rows of `a` and the f32 result stay small.
const PANEL: usize = 512;

pub(super) fn product(
    (m, n, k): (usize, usize, usize),
    (a, sa): (&[bf16], Strides),
    (b, sb): (&[bf16], Strides),
    out: Out,
) {
    assert!(sa.reach(m, k) <= a.len(), "matrix product: a slice is too short");
    if m == 0 || n == 0 || k == 0 {
        return match out {
            Out::Bf16(c, false) => c[..m * n].fill(bf16::ZERO),
            Out::F32(c, false) => c[..m * n].fill(0.0),
            Out::Bf16(_, true) | Out::F32(_, true) => {}
        };
    }
    let b = widen(&b[..k * n]);
    let (out, add) = match out {
        // Widened in the order in which it lies, but without gaps.
        Out::F32(c, add) if sa.cols == 1 => {
            return f32_gemm((m, n, k), (&widen_rows(a, m, k, sa.rows), super::plain(k)), (&b, sb), c, add);
        }
        Out::F32(c, add) => {
            return f32_gemm((m, n, k), (&widen_rows(a, k, m, sa.cols), super::turned(m)), (&b, sb), c, add);
        }
        Out::Bf16(c, add) => (c, add),
    };
    let mut panel = vec![0f32; PANEL.min(m) * n];
    for start in (0..m).step_by(PANEL) {
        let rows = PANEL.min(m - start);
        let a = match sa.cols {
            1 => widen_rows(&a[start * sa.rows..], rows, k, sa.rows),
            _ => gather(a, sa, start, rows, k),
        };
        let sums = &mut panel[..rows * n];
        f32_gemm((rows, n, k), (&a, super::plain(k)), (&b, sb), sums, false);
        let rounded = out[start * n..(start + rows) * n].par_iter_mut().zip(sums.par_iter());
        match add {
            true => rounded.for_each(|(c, &x)| *c = bf16::from_f32(c.to_f32() + x)),
            false => rounded.for_each(|(c, &x)| *c = bf16::from_f32(x)),
        }
    }
}

fn widen(x: &[bf16]) -> Vec<f32> {
    x.par_iter().map(|x| x.to_f32()).collect()
}

/// `rows` rows of `len` values that are `pitch` apart, without the gaps.
fn widen_rows(x: &[bf16], rows: usize, len: usize, pitch: usize) -> Vec<f32> {
    if pitch == len || rows <= 1 {
        return widen(&x[..rows * len]);
    }
    let mut wide = unspecified::<f32>(rows * len);
    wide.par_chunks_mut(len.max(1)).zip(x.par_chunks(pitch)).for_each(|(wide, x)| {
        wide.iter_mut().zip(x).for_each(|(wide, x)| *wide = x.to_f32());
    });
    wide
}

/// Rows `start..start + rows` of a transposed matrix, row-major.
fn gather(a: &[bf16], sa: Strides, start: usize, rows: usize, k: usize) -> Vec<f32> {
    (0..rows * k).into_par_iter().map(|i| a[(start + i / k) * sa.rows + i % k * sa.cols].to_f32()).collect()
}
