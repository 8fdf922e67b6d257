//! bf16 products on machines without bf16 instructions: operands widened to f32, a panel of rows at a time.

use half::bf16;
use rayon::prelude::*;

use super::{Out, Strides, f32_gemm};

/// Rows of the result computed at once, so that the widened rows of `a` and the f32 result stay small.
const PANEL: usize = 512;

pub(super) fn product(
    (m, n, k): (usize, usize, usize),
    (a, sa): (&[bf16], Strides),
    (b, sb): (&[bf16], Strides),
    out: Out,
) {
    let b = widen(&b[..k * n]);
    let (out, add) = match out {
        Out::F32(c, add) => return f32_gemm((m, n, k), (&widen(&a[..m * k]), sa), (&b, sb), c, add),
        Out::Bf16(c, add) => (c, add),
    };
    let mut panel = vec![0f32; PANEL.min(m) * n];
    for start in (0..m).step_by(PANEL) {
        let rows = PANEL.min(m - start);
        let a = if sa.rows == 1 { gather(a, sa, start, rows, k) } else { widen(&a[start * k..(start + rows) * k]) };
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

/// Rows `start..start + rows` of a transposed matrix, row-major.
fn gather(a: &[bf16], sa: Strides, start: usize, rows: usize, k: usize) -> Vec<f32> {
    (0..rows * k).into_par_iter().map(|i| a[(start + i / k) * sa.rows + i % k * sa.cols].to_f32()).collect()
}
