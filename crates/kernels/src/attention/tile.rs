//! The register-blocked product that all five products of attention are made of.

use crate::lanes::{Portable, Simd};
use crate::simd::Level;

/// What a word of `a` and one of `b` add to a sum: f32 multiplied, or pairs of bf16 multiplied and added.
pub(super) trait MultiplyAdd<S: Simd> {
    /// `sum + x y`, lane by lane.
    fn apply(s: S, x: S::V, y: S::V, sum: S::V) -> S::V;
}

/// Words are f32.
struct Single;

impl<S: Simd> MultiplyAdd<S> for Single {
    #[inline(always)]
    fn apply(s: S, x: S::V, y: S::V, sum: S::V) -> S::V {
        s.fma(x, y, sum)
    }
}

/// `c[m, n] += a[m, k] b[k, n]`, or `=` where `fresh`. `a[i, p]` is at `a + i * a_row + p * a_col`, so `a` may be a
/// transposed view; `b` and `c` have contiguous rows `ldb` and `ldc` apart; `n` is a multiple of 16. Each element is one
/// chain of fused additions over `p` in order, from what `c` holds or from 0. An element of `a` and `b` is a word of 32 bits,
/// see [`MultiplyAdd`].
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: *const f32,
    pub a_row: usize,
    pub a_col: usize,
    pub b: *const f32,
    pub ldb: usize,
    pub c: *mut f32,
    pub ldc: usize,
    pub fresh: bool,
}

/// Runs a [`Product`] with one instruction set.
///
/// # Safety
/// All elements that the sizes and strides name are readable (`c` writable), `c` overlaps neither `a` nor `b`, and the
/// CPU has the instruction set that the function was selected for.
pub(super) type ProductFn = unsafe fn(Product);

/// The product for a level, or for the next lower one that the CPU has.
pub(super) fn product(level: Level) -> ProductFn {
    #[cfg(target_arch = "x86_64")]
    {
        use crate::lanes::{Avx2, Avx512};
        if level >= Level::Avx512 && Avx512::new().is_some() {
            return avx512;
        }
        if level >= Level::Avx2 && Avx2::new().is_some() {
            return avx2;
        }
    }
    let _ = level;
    portable
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn avx512(p: Product) {
    if let Some(s) = crate::lanes::Avx512::new() {
        // SAFETY: the caller's promise.
        unsafe { blocks::<_, Single>(s, p) }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(p: Product) {
    if let Some(s) = crate::lanes::Avx2::new() {
        // SAFETY: the caller's promise.
        unsafe { blocks::<_, Single>(s, p) }
    }
}

unsafe fn portable(p: Product) {
    // SAFETY: the caller's promise.
    unsafe { blocks::<_, Single>(Portable, p) }
}

/// Cuts the product into register tiles of up to 6 rows and `S::TILE` vectors.
#[inline(always)]
pub(super) unsafe fn blocks<S: Simd, A: MultiplyAdd<S>>(s: S, mut p: Product) {
    let columns = p.n / S::LANES;
    let (a, b, c, m) = (p.a, p.b, p.c, p.m);
    let mut row = 0;
    while row < m {
        let rows = match m - row {
            6.. => 6,
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        let mut column = 0;
        while column < columns {
            let wide = match (columns - column).min(S::TILE) {
                4.. => 4,
                2.. => 2,
                _ => 1,
            };
            // SAFETY: rows and columns stay within m and n.
            unsafe {
                p.a = a.add(row * p.a_row);
                p.b = b.add(column * S::LANES);
                p.c = c.add(row * p.ldc + column * S::LANES);
                match (rows, wide) {
                    (6, 4) => registers::<S, A, 6, 4>(s, p),
                    (6, 2) => registers::<S, A, 6, 2>(s, p),
                    (6, _) => registers::<S, A, 6, 1>(s, p),
                    (4, 4) => registers::<S, A, 4, 4>(s, p),
                    (4, 2) => registers::<S, A, 4, 2>(s, p),
                    (4, _) => registers::<S, A, 4, 1>(s, p),
                    (2, 4) => registers::<S, A, 2, 4>(s, p),
                    (2, 2) => registers::<S, A, 2, 2>(s, p),
                    (2, _) => registers::<S, A, 2, 1>(s, p),
                    (_, 4) => registers::<S, A, 1, 4>(s, p),
                    (_, 2) => registers::<S, A, 1, 2>(s, p),
                    _ => registers::<S, A, 1, 1>(s, p),
                }
            }
            column += wide;
        }
        row += rows;
    }
}

/// `M` rows by `N` vectors, all sums in registers.
#[inline(always)]
unsafe fn registers<S: Simd, A: MultiplyAdd<S>, const M: usize, const N: usize>(s: S, p: Product) {
    let mut acc = [[s.splat(0.0); N]; M];
    // SAFETY: the caller's promise for the elements of this tile.
    unsafe {
        if !p.fresh {
            for (i, row) in acc.iter_mut().enumerate() {
                for (j, sum) in row.iter_mut().enumerate() {
                    *sum = s.load_ptr(p.c.add(i * p.ldc + j * S::LANES));
                }
            }
        }
        let (mut a, mut b) = (p.a, p.b);
        for _ in 0..p.k {
            let mut columns = [s.splat(0.0); N];
            for (j, column) in columns.iter_mut().enumerate() {
                *column = s.load_ptr(b.add(j * S::LANES));
            }
            for (i, row) in acc.iter_mut().enumerate() {
                let x = s.splat(*a.add(i * p.a_row));
                for (sum, column) in row.iter_mut().zip(columns) {
                    *sum = A::apply(s, x, column, *sum);
                }
            }
            a = a.wrapping_add(p.a_col);
            b = b.wrapping_add(p.ldb);
        }
        for (i, row) in acc.iter().enumerate() {
            for (j, sum) in row.iter().enumerate() {
                s.store_ptr(*sum, p.c.add(i * p.ldc + j * S::LANES));
            }
        }
    }
}
