//! Sums and casts over flat slices.

use half::bf16;
use rayon::prelude::*;

use crate::lanes::simd_fn;
use crate::memory::halves;
use crate::simd::Level;

/// Elements of a block: sums are taken a block at a time and added in order, whatever the threads.
const BLOCK: usize = 16 * 1024;

simd_fn! {
    fn block_squares(s, x: &[f32]) -> f32 {
        let mut sums = [s.splat(0.0); 4];
        let mut rest = x;
        while rest.len() >= 4 * S::LANES {
            for (i, sum) in sums.iter_mut().enumerate() {
                let v = s.load(&rest[i * S::LANES..]);
                *sum = s.fma(v, v, *sum);
            }
            rest = &rest[4 * S::LANES..];
        }
        let vector = s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]));
        s.sum(vector) + rest.iter().map(|x| x * x).sum::<f32>()
    }
}

simd_fn! {
    /// Rounds to bf16, to nearest even.
    pub(crate) fn round_chunk(s, from: &[f32], to: &mut [bf16]) {
        let (mut from, mut to) = (from, to);
        while to.len() >= S::LANES {
            s.store_bf16(s.load(from), to);
            from = &from[S::LANES..];
            to = &mut to[S::LANES..];
        }
        for (to, from) in to.iter_mut().zip(from) {
            *to = bf16::from_f32(*from);
        }
    }
}

simd_fn! {
    /// Rounds a row to bf16 where it lies: the first half of its memory.
    pub(crate) fn round_in_place(s, row: &mut [f32]) {
        let len = row.len();
        let mut at = 0;
        // What is written never passes what is yet to be read.
        while at + S::LANES <= len {
            let values = s.load(&row[at..]);
            s.store_bf16(values, &mut halves(row)[at..]);
            at += S::LANES;
        }
        for at in at..len {
            let value = row[at];
            halves(row)[at] = bf16::from_f32(value);
        }
    }
}

/// Sum of the squares of `x`, blocks in f32 and their total in f64. Independent of the number of threads.
pub fn sum_of_squares(level: Level, x: &[f32]) -> f64 {
    let blocks: Vec<f32> = x.par_chunks(BLOCK).map(|block| block_squares(level, block)).collect();
    blocks.iter().map(|&sum| f64::from(sum)).sum()
}

/// True if no value is NaN or infinite.
pub fn all_finite(x: &[f32]) -> bool {
    x.par_chunks(BLOCK).all(|block| block.iter().all(|x| x.is_finite()))
}

/// `to = from`, rounded to nearest even.
pub fn round_to_bf16(level: Level, from: &[f32], to: &mut [bf16]) {
    assert_eq!(from.len(), to.len(), "rounding: slices of different lengths");
    to.par_chunks_mut(BLOCK).zip(from.par_chunks(BLOCK)).for_each(|(to, from)| round_chunk(level, from, to));
}

/// Sets everything to zero.
pub fn fill_zero(x: &mut [f32]) {
    x.par_chunks_mut(BLOCK).for_each(|x| x.fill(0.0));
}

/// `out[i, j] = x[i, j] + row[j]` for rows of `row.len()`, added in f32 and rounded once.
pub fn add_to_rows<T: crate::lanes::Element>(x: &[f32], row: &[T], out: &mut [T]) {
    let rows = out.par_chunks_exact_mut(row.len()).zip(x.par_chunks_exact(row.len()));
    rows.for_each(|(out, x)| {
        out.iter_mut().zip(x).zip(row).for_each(|((out, x), r)| *out = T::from_f32(x + r.to_f32()));
    });
}

/// `sums[j] += sum over i of x[i, j]` for rows of `sums.len()`.
pub fn add_rows<T: crate::lanes::Element>(x: &[T], sums: &mut [f32]) {
    let c = sums.len();
    let span = c.div_ceil(rayon::current_num_threads()).next_multiple_of(16);
    sums.par_chunks_mut(span).enumerate().for_each(|(part, sums)| {
        for row in x.chunks_exact(c) {
            let row = &row[part * span..][..sums.len()];
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x.to_f32());
        }
    });
}

/// L2 norm of each row of `x [n, c]`.
pub fn row_norms(level: Level, x: &[f32], c: usize, out: &mut [f32]) {
    out.par_iter_mut().zip(x.par_chunks_exact(c)).for_each(|(norm, row)| {
        let squares: f64 = row.chunks(BLOCK).map(|part| f64::from(block_squares(level, part))).sum();
        *norm = squares.sqrt() as f32;
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_value_that_is_not_finite_is_found() {
        let mut x = vec![1e30f32; 40_001];
        assert!(all_finite(&x) && all_finite(&[]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            x[40_000] = bad;
            assert!(!all_finite(&x));
        }
    }

    #[test]
    fn squares_match_f64_at_odd_lengths() {
        for n in [0, 1, 15, 63, 64, 65, 40_001] {
            let x: Vec<f32> = (0..n).map(|i| ((i * 31 % 17) as f32 - 8.0) / 3.0).collect();
            let exact: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            for level in [Level::Scalar, Level::Avx2, Level::Avx512] {
                let error = (sum_of_squares(level, &x) - exact).abs();
                let mut norm = [f32::NAN];
                if n > 0 {
                    row_norms(level, &x, n, &mut norm);
                    assert!((f64::from(norm[0]) - exact.sqrt()).abs() <= 1e-5 * exact.sqrt().max(1.0));
                }
                assert!(error <= 1e-5 * exact.max(1.0), "{n} {level:?} {error}");
            }
        }
    }
}
