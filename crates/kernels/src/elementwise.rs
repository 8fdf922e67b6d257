//! Elementwise passes: addition, and the drivers that the activations run on.

use rayon::prelude::*;

use crate::lanes::{Element, Simd, simd_fn};
use crate::simd::Level;

/// Elements that one task takes: large enough to hide the hand-over, small enough to stay in the L2 cache.
pub(crate) const CHUNK: usize = 16 * 1024;

/// A function of one value, of lanes at a time.
pub(crate) trait Map1: Copy + Send + Sync {
    fn apply<S: Simd>(self, s: S, a: S::V) -> S::V;
}

/// A function of two values.
pub(crate) trait Map2: Copy + Send + Sync {
    fn apply<S: Simd>(self, s: S, a: S::V, b: S::V) -> S::V;
}

/// A function of three values with two results.
pub(crate) trait Map3To2: Copy + Send + Sync {
    fn apply<S: Simd>(self, s: S, a: S::V, b: S::V, c: S::V) -> (S::V, S::V);
}

simd_fn! {
    fn map1_chunk[T: Element, F: Map1](s, f: F, a: &[T], out: &mut [T]) {
        let (mut a, mut out) = (&a[..out.len()], out);
        while out.len() >= S::LANES {
            T::store(s, f.apply(s, T::load(s, a)), out);
            a = &a[S::LANES..];
            out = &mut out[S::LANES..];
        }
        if !out.is_empty() {
            T::store_part(s, f.apply(s, T::load_part(s, a)), out);
        }
    }
}

simd_fn! {
    fn map2_chunk[T: Element, F: Map2](s, f: F, a: &[T], b: &[T], out: &mut [T]) {
        let (mut a, mut b, mut out) = (&a[..out.len()], &b[..out.len()], out);
        while out.len() >= S::LANES {
            T::store(s, f.apply(s, T::load(s, a), T::load(s, b)), out);
            (a, b) = (&a[S::LANES..], &b[S::LANES..]);
            out = &mut out[S::LANES..];
        }
        if !out.is_empty() {
            T::store_part(s, f.apply(s, T::load_part(s, a), T::load_part(s, b)), out);
        }
    }
}

simd_fn! {
    fn scale_chunk[T: Element](s, factor: f32, x: &mut [T]) {
        let (by, mut x) = (s.splat(factor), x);
        while x.len() >= S::LANES {
            let scaled = s.mul(T::load(s, x), by);
            T::store(s, scaled, x);
            x = &mut x[S::LANES..];
        }
        if !x.is_empty() {
            let scaled = s.mul(T::load_part(s, x), by);
            T::store_part(s, scaled, x);
        }
    }
}

simd_fn! {
    fn add_assign_chunk[T: Element](s, sum: &mut [T], x: &[T]) {
        let (mut x, mut sum) = (&x[..sum.len()], sum);
        while sum.len() >= S::LANES {
            let total = s.add(T::load(s, sum), T::load(s, x));
            T::store(s, total, sum);
            x = &x[S::LANES..];
            sum = &mut sum[S::LANES..];
        }
        if !sum.is_empty() {
            let total = s.add(T::load_part(s, sum), T::load_part(s, x));
            T::store_part(s, total, sum);
        }
    }
}

simd_fn! {
    fn map3_to_2_chunk[T: Element, F: Map3To2](s, f: F, abc: [&[T]; 3], out0: &mut [T], out1: &mut [T]) {
        let [mut a, mut b, mut c] = abc.map(|x| &x[..out0.len()]);
        let (mut out0, mut out1) = (out0, out1);
        while out0.len() >= S::LANES {
            let (x, y) = f.apply(s, T::load(s, a), T::load(s, b), T::load(s, c));
            T::store(s, x, out0);
            T::store(s, y, out1);
            (a, b, c) = (&a[S::LANES..], &b[S::LANES..], &c[S::LANES..]);
            (out0, out1) = (&mut out0[S::LANES..], &mut out1[S::LANES..]);
        }
        if !out0.is_empty() {
            let (x, y) = f.apply(s, T::load_part(s, a), T::load_part(s, b), T::load_part(s, c));
            T::store_part(s, x, out0);
            T::store_part(s, y, out1);
        }
    }
}

pub(crate) fn map1<T: Element, F: Map1>(level: Level, f: F, a: &[T], out: &mut [T]) {
    assert_eq!(a.len(), out.len());
    out.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK)).for_each(|(out, a)| map1_chunk(level, f, a, out));
}

pub(crate) fn map2<T: Element, F: Map2>(level: Level, f: F, a: &[T], b: &[T], out: &mut [T]) {
    assert!(a.len() == out.len() && b.len() == out.len());
    out.par_chunks_mut(CHUNK)
        .zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)))
        .for_each(|(out, (a, b))| map2_chunk(level, f, a, b, out));
}

pub(crate) fn map3_to_2<T: Element, F: Map3To2>(
    level: Level,
    f: F,
    [a, b, c]: [&[T]; 3],
    out0: &mut [T],
    out1: &mut [T],
) {
    let n = out0.len();
    assert!(a.len() == n && b.len() == n && c.len() == n && out1.len() == n);
    let outs = out0.par_chunks_mut(CHUNK).zip(out1.par_chunks_mut(CHUNK));
    let ins = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)).zip(c.par_chunks(CHUNK));
    outs.zip(ins).for_each(|((o0, o1), ((a, b), c))| map3_to_2_chunk(level, f, [a, b, c], o0, o1));
}

#[derive(Clone, Copy)]
struct Add;

impl Map2 for Add {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, a: S::V, b: S::V) -> S::V {
        s.add(a, b)
    }
}

/// `out[i] = a[i] + b[i]`, added in f32 and rounded once.
///
/// # Panics
/// If the lengths differ.
pub fn add<T: Element>(level: Level, a: &[T], b: &[T], out: &mut [T]) {
    map2(level, Add, a, b, out);
}

/// `sum[i] += x[i]`, added in f32 and rounded once.
///
/// # Panics
/// If the lengths differ.
pub fn add_assign<T: Element>(level: Level, sum: &mut [T], x: &[T]) {
    assert_eq!(sum.len(), x.len());
    sum.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(sum, x)| add_assign_chunk(level, sum, x));
}

/// `x[i] *= factor`, rounded once.
pub fn scale<T: Element>(level: Level, factor: f32, x: &mut [T]) {
    x.par_chunks_mut(CHUNK).for_each(|x| scale_chunk(level, factor, x));
}

/// `out[i, j] = x[i, j] * factor[j] + shift[j]` for rows of `factor.len()`, in f32 and rounded once.
///
/// # Panics
/// If the lengths do not fit.
pub fn affine_rows<T: Element>(x: &[T], factor: &[f32], shift: &[f32], out: &mut [T]) {
    let c = factor.len();
    assert!(c > 0 && shift.len() == c && x.len() == out.len() && x.len().is_multiple_of(c));
    let rows = (CHUNK / c).max(1) * c;
    out.par_chunks_mut(rows).zip(x.par_chunks(rows)).for_each(|(out, x)| {
        for (out, x) in out.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
            let each = out.iter_mut().zip(x).zip(factor.iter().zip(shift));
            each.for_each(|((out, x), (factor, shift))| *out = T::from_f32(x.to_f32() * factor + shift));
        }
    });
}

/// `sums[j] += sum over i of x[i, j] y[i, j] / divisor[j]` for rows of `sums.len()`.
///
/// # Panics
/// If the lengths do not fit.
pub fn add_row_products<T: Element>(x: &[T], y: &[T], divisor: &[f32], sums: &mut [f32]) {
    let c = sums.len();
    assert!(c > 0 && divisor.len() == c && x.len() == y.len() && x.len().is_multiple_of(c));
    let span = c.div_ceil(rayon::current_num_threads()).next_multiple_of(16);
    sums.par_chunks_mut(span).enumerate().for_each(|(part, sums)| {
        let from = part * span;
        let mut products = vec![0f32; sums.len()];
        for (x, y) in x.chunks_exact(c).zip(y.chunks_exact(c)) {
            let (x, y) = (&x[from..][..sums.len()], &y[from..][..sums.len()]);
            products.iter_mut().zip(x.iter().zip(y)).for_each(|(sum, (x, y))| *sum += x.to_f32() * y.to_f32());
        }
        let each = sums.iter_mut().zip(products.iter().zip(&divisor[from..]));
        each.for_each(|(sum, (product, divisor))| *sum += product / divisor);
    });
}

/// Columns `from..from + len` of every row of `out` (rows of `row` values) from the rows of `x` (of `len` values). The
/// other columns become zero, unless `add`: then `x` is added to its columns and the others stay.
///
/// # Panics
/// If the lengths do not fit.
pub fn scatter_columns<T: Element>(x: &[T], (row, from, len): (usize, usize, usize), add: bool, out: &mut [T]) {
    assert!(from + len <= row && x.len() * row == out.len() * len);
    if len == 0 {
        if !add {
            out.fill(T::ZERO);
        }
        return;
    }
    let rows = (CHUNK / row).max(1);
    out.par_chunks_mut(rows * row).zip(x.par_chunks(rows * len)).for_each(|(out, x)| {
        for (out, x) in out.chunks_exact_mut(row).zip(x.chunks_exact(len)) {
            if add {
                let columns = out[from..from + len].iter_mut().zip(x);
                columns.for_each(|(y, x)| *y = T::from_f32(y.to_f32() + x.to_f32()));
            } else {
                out[..from].fill(T::ZERO);
                out[from..from + len].copy_from_slice(x);
                out[from + len..].fill(T::ZERO);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_set_with_zeros_around_or_added_to() {
        let x: Vec<f32> = (0..6).map(|i| i as f32 + 1.0).collect();
        let mut out = vec![f32::NAN; 15];
        scatter_columns(&x, (5, 1, 2), false, &mut out);
        assert_eq!(out, [0., 1., 2., 0., 0., 0., 3., 4., 0., 0., 0., 5., 6., 0., 0.]);
        scatter_columns(&x, (5, 2, 2), true, &mut out);
        assert_eq!(out, [0., 1., 3., 2., 0., 0., 3., 7., 4., 0., 0., 5., 11., 6., 0.]);
    }

    #[test]
    fn rows_are_scaled_shifted_and_summed() {
        let x: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let mut out = vec![f32::NAN; 12];
        affine_rows(&x, &[1.0, 2.0, -1.0], &[0.5, 0.0, 1.0], &mut out);
        let want = [0.5, 2., -1., 3.5, 8., -4., 6.5, 14., -7., 9.5, 20., -10.];
        assert_eq!(out, want);
        let mut sums = vec![1.0, 0.0, -1.0];
        add_row_products(&x, &x, &[1.0, 2.0, 4.0], &mut sums);
        assert_eq!(sums, [1.0 + 126.0, 166.0 / 2.0, -1.0 + 214.0 / 4.0]);
        for n in [1, 16, 33, CHUNK + 5] {
            let mut x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            scale(crate::simd::level(), -0.5, &mut x);
            assert!(x.iter().enumerate().all(|(i, x)| *x == i as f32 * -0.5));
        }
    }

    #[test]
    fn sums_are_those_of_add() {
        for n in [1, 7, 16, 33, CHUNK + 5] {
            let x: Vec<f32> = (0..n).map(|i| (i as f32).sin()).collect();
            let mut sum: Vec<f32> = (0..n).map(|i| (i as f32).cos()).collect();
            let mut want = vec![0.0; n];
            add(crate::simd::level(), &sum, &x, &mut want);
            add_assign(crate::simd::level(), &mut sum, &x);
            assert_eq!(sum, want);
        }
    }
}
