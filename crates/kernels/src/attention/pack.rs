//! Tiles in per-thread scratch, widened to f32; words of either kind turned.

use crate::lanes::{Element, simd_fn};

use super::{Heads, TILE_KEYS};

simd_fn! {
    /// `dst = factor * src` for as many values as `dst` has.
    pub(super) fn unpack_row[T: Element](s, src: &[f32], factor: f32, dst: &mut [T]) {
        let factor = s.splat(factor);
        let mut i = 0;
        while i + S::LANES <= dst.len() {
            T::store(s, s.mul(s.load(&src[i..]), factor), &mut dst[i..]);
            i += S::LANES;
        }
        if i < dst.len() {
            let v = s.mul(f32::load_part(s, &src[i..dst.len()]), factor);
            T::store_part(s, v, &mut dst[i..]);
        }
    }
}

/// Which head of which row of the batch.
#[derive(Clone, Copy)]
pub(super) struct Head {
    pub b: usize,
    pub h: usize,
}

/// Rows ahead of the one in hand that are asked for: the strides of a head are too long for the hardware to follow.
pub(super) const AHEAD: usize = 6;

/// Asks for all cache lines of a row.
#[inline(always)]
pub(super) fn prefetch<T>(row: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in row.chunks((64 / size_of::<T>()).max(1)) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing, and the address is within the row.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

simd_fn! {
    /// Rows `[start, end)` of a head, times `factor`, into `dst[.., padded]`. True if all values are finite.
    pub(super) fn pack_rows[T: Element](
        s, src: &Heads<'_, T>, head: Head, rows: (usize, usize), factor: f32, dst: &mut [f32], padded: usize,
    ) -> bool {
        let (factor, zero) = (s.splat(factor), s.splat(0.0));
        // Infinity and NaN times zero are NaN, and stay it.
        let mut probe = zero;
        for (dst, t) in dst.chunks_exact_mut(padded).zip(rows.0..rows.1) {
            if t + AHEAD < rows.1 {
                prefetch(src.row(head.b, t + AHEAD, head.h));
            }
            let src = src.row(head.b, t, head.h);
            let whole = src.len() / S::LANES * S::LANES;
            let (body, rest) = src.split_at(whole);
            for (src, dst) in body.chunks_exact(S::LANES).zip(dst.chunks_exact_mut(S::LANES)) {
                let v = s.mul(T::load(s, src), factor);
                probe = s.fma(v, zero, probe);
                s.store(v, dst);
            }
            if whole < padded {
                let v = s.mul(T::load_part(s, rest), factor);
                probe = s.fma(v, zero, probe);
                dst[whole..].fill(0.0);
                f32::store_part(s, v, &mut dst[whole..src.len()]);
            }
        }
        s.sum(probe) == 0.0
    }
}

/// `columns[word * TILE_KEYS + key] = rows[key * width + word]` for the `width` words of a row; zeros for the keys from `keys`
/// on.
pub(super) fn transpose(rows: &mut [f32], width: usize, keys: usize, columns: &mut [f32]) {
    const BLOCK: usize = 4;
    assert!(rows.len() == TILE_KEYS * width && columns.len() == rows.len() && width.is_multiple_of(BLOCK));
    rows[keys * width..].fill(0.0);
    for key in (0..TILE_KEYS).step_by(BLOCK) {
        for word in (0..width).step_by(BLOCK) {
            let from = &rows[key * width + word..][..3 * width + BLOCK];
            let to = &mut columns[word * TILE_KEYS + key..][..3 * TILE_KEYS + BLOCK];
            transpose4(from, width, to);
        }
    }
}

/// 4 x 4 values, `stride` apart in `from` and `TILE_KEYS` in `to`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose4(from: &[f32], stride: usize, to: &mut [f32]) {
    use std::arch::x86_64::*;
    assert!(from.len() >= 3 * stride + 4 && to.len() >= 3 * TILE_KEYS + 4);
    // SAFETY: SSE is part of x86-64, and the lengths were checked.
    unsafe {
        let row = |i: usize| _mm_loadu_ps(from.as_ptr().add(i * stride));
        let (ab, cd) = (_mm_unpacklo_ps(row(0), row(1)), _mm_unpacklo_ps(row(2), row(3)));
        let (ef, gh) = (_mm_unpackhi_ps(row(0), row(1)), _mm_unpackhi_ps(row(2), row(3)));
        let out = [_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab), _mm_movelh_ps(ef, gh), _mm_movehl_ps(gh, ef)];
        for (i, v) in out.into_iter().enumerate() {
            _mm_storeu_ps(to.as_mut_ptr().add(i * TILE_KEYS), v);
        }
    }
}

/// 4 x 4 values, `stride` apart in `from` and `TILE_KEYS` in `to`.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn transpose4(from: &[f32], stride: usize, to: &mut [f32]) {
    for i in 0..4 {
        for j in 0..4 {
            to[j * TILE_KEYS + i] = from[i * stride + j];
        }
    }
}
