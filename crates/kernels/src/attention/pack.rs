//! Tiles widened to f32 in per-thread scratch.

use std::cell::RefCell;

use crate::lanes::{Element, simd_fn};
use crate::simd::Level;

use super::{Heads, TILE_KEYS};

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

thread_local! {
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with scratch of `N` parts of the given lengths, each starting on a cache line, contents unspecified. The
/// memory stays with the thread.
pub(super) fn with_scratch<const N: usize, R>(lens: [usize; N], f: impl FnOnce([&mut [f32]; N]) -> R) -> R {
    let lines = lens.map(|len| len.div_ceil(16));
    // Taken out rather than borrowed: a task stolen while this one waits would find none, and make its own.
    let mut held = SCRATCH.take();
    let total = lines.iter().sum();
    if held.len() < total {
        held.resize(total, Line([0.0; 16]));
    }
    let mut rest = &mut held[..total];
    let parts = std::array::from_fn(|i| {
        let (part, after) = std::mem::take(&mut rest).split_at_mut(lines[i]);
        rest = after;
        // SAFETY: a line is 16 floats without padding.
        unsafe { std::slice::from_raw_parts_mut(part.as_mut_ptr().cast(), lens[i]) }
    });
    let result = f(parts);
    SCRATCH.set(held);
    result
}

simd_fn! {
    /// `dst[..d] = factor * src`, zeros to the end of `dst`. True if all values are finite.
    pub(super) fn pack_row[T: Element](s, src: &[T], factor: f32, dst: &mut [f32]) -> bool {
        let (factor, zero) = (s.splat(factor), s.splat(0.0));
        // Infinity and NaN times zero are NaN, and stay it.
        let mut probe = zero;
        let mut i = 0;
        while i + S::LANES <= src.len() {
            let v = s.mul(T::load(s, &src[i..]), factor);
            probe = s.fma(v, zero, probe);
            s.store(v, &mut dst[i..]);
            i += S::LANES;
        }
        if i < src.len() {
            let v = s.mul(T::load_part(s, &src[i..]), factor);
            probe = s.fma(v, zero, probe);
            f32::store_part(s, v, &mut dst[i..src.len()]);
        }
        dst[src.len()..].fill(0.0);
        s.sum(probe) == 0.0
    }
}

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

/// Rows `[start, end)` of a head into `dst[.., padded]`. True if all values are finite.
pub(super) fn pack_rows<T: Element>(
    level: Level,
    src: &Heads<'_, T>,
    head: Head,
    (start, end): (usize, usize),
    factor: f32,
    dst: &mut [f32],
    padded: usize,
) -> bool {
    let rows = dst.chunks_exact_mut(padded).zip(start..end);
    rows.fold(true, |finite, (row, t)| pack_row(level, src.row(head.b, t, head.h), factor, row) & finite)
}

/// Keys `[start, end)` of a head as columns: `dst[channel * TILE_KEYS + key]`, zeros for the keys past `end`.
pub(super) fn pack_columns<T: Element>(src: &Heads<'_, T>, head: Head, (start, end): (usize, usize), dst: &mut [f32]) {
    let dst = &mut dst[..src.dims[3] * TILE_KEYS];
    const BLOCK: usize = 8;
    for first in (0..TILE_KEYS).step_by(BLOCK) {
        let rows: [&[T]; BLOCK] = std::array::from_fn(|i| {
            let t = start + first + i;
            if t < end { src.row(head.b, t, head.h) } else { &[] }
        });
        if rows.iter().all(|row| !row.is_empty()) {
            for (channel, column) in dst.chunks_exact_mut(TILE_KEYS).enumerate() {
                let column = &mut column[first..first + BLOCK];
                for (place, row) in column.iter_mut().zip(rows) {
                    *place = row[channel].to_f32();
                }
            }
        } else {
            for (channel, column) in dst.chunks_exact_mut(TILE_KEYS).enumerate() {
                for (place, row) in column[first..first + BLOCK].iter_mut().zip(rows) {
                    *place = row.get(channel).map_or(0.0, |v| v.to_f32());
                }
            }
        }
    }
}
