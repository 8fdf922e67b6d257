//! Packing by vectors of 32 elements.

use std::arch::x86_64::{
    __m512i, _mm512_loadu_si512, _mm512_permutex2var_epi16, _mm512_setzero_si512, _mm512_storeu_si512,
};
use std::ops::Range;

use half::bf16;

use super::{BLOCK, Operand};
use crate::turn::transpose;

/// Pairs of a vector.
const PAIRS: usize = 16;

/// Where the elements of half of the pairs of two vectors come from: `order[2 i + j]` is element `first + i` of vector `j`.
const fn pairing(first: u16) -> [u16; BLOCK] {
    let mut order = [0; BLOCK];
    let mut at = 0;
    while at < BLOCK {
        order[at] = first + at as u16 / 2 + at as u16 % 2 * BLOCK as u16;
        at += 1;
    }
    order
}

const FIRST: [u16; BLOCK] = pairing(0);
const SECOND: [u16; BLOCK] = pairing(PAIRS as u16);

/// `[(even[i], odd[i])]`, in two vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn paired(even: __m512i, odd: __m512i) -> [__m512i; 2] {
    // SAFETY: both orders have 64 bytes.
    let (first, second) =
        unsafe { (_mm512_loadu_si512(FIRST.as_ptr().cast()), _mm512_loadu_si512(SECOND.as_ptr().cast())) };
    [_mm512_permutex2var_epi16(even, first, odd), _mm512_permutex2var_epi16(even, second, odd)]
}

/// See [`super::turned_blocks`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn turned_blocks(panel: &mut [bf16], from: Operand<bf16>, line: usize, steps: &Range<usize>) -> usize {
    let blocks = steps.len() / BLOCK;
    let (blocks_of_panel, _) = panel.as_chunks_mut::<{ BLOCK * BLOCK }>();
    for (block, to) in blocks_of_panel.iter_mut().take(blocks).enumerate() {
        let [mut upper, mut lower] = [[_mm512_setzero_si512(); PAIRS]; 2];
        for (pair, (upper, lower)) in upper.iter_mut().zip(&mut lower).enumerate() {
            let at = (steps.start + block * BLOCK + 2 * pair) * from.step + line;
            let (even, odd) = (&from.values[at..at + BLOCK], &from.values[at + from.step..at + from.step + BLOCK]);
            // SAFETY: the slices have 32 elements.
            let (even, odd) =
                unsafe { (_mm512_loadu_si512(even.as_ptr().cast()), _mm512_loadu_si512(odd.as_ptr().cast())) };
            [*upper, *lower] = paired(even, odd);
        }
        let tiles = [upper, lower];
        for (tile, to) in tiles.into_iter().zip(to.chunks_exact_mut(PAIRS * BLOCK)) {
            for (row, to) in transpose(tile).into_iter().zip(to.chunks_exact_mut(BLOCK)) {
                // SAFETY: the slice has 32 elements.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), row) };
            }
        }
    }
    blocks * BLOCK
}

/// See [`super::transposed`]; `W` is a multiple of 16.
#[target_feature(enable = "avx512f")]
pub(super) fn transposed<const W: usize>(
    panel: &mut [bf16],
    from: Operand<bf16>,
    lines: &Range<usize>,
    steps: &Range<usize>,
) -> usize {
    const { assert!(W.is_multiple_of(4), "a panel is of whole groups") };
    let groups = steps.len() / BLOCK;
    for first in (0..lines.len()).step_by(PAIRS) {
        let count = PAIRS.min(lines.len() - first);
        for group in 0..groups {
            let mut rows = [_mm512_setzero_si512(); PAIRS];
            for (i, row) in rows.iter_mut().enumerate().take(count) {
                let at = (lines.start + first + i) * from.line + steps.start + group * BLOCK;
                // SAFETY: the slice has the 32 elements.
                *row = unsafe { _mm512_loadu_si512(from.values[at..at + BLOCK].as_ptr().cast()) };
            }
            for (pair, row) in transpose(rows).into_iter().enumerate() {
                let at = ((group * PAIRS + pair) * W + first) * 2;
                // SAFETY: the slice has the 32 elements.
                unsafe { _mm512_storeu_si512(panel[at..at + BLOCK].as_mut_ptr().cast(), row) };
            }
        }
    }
    groups * BLOCK
}

/// See [`super::interleaved`], for panels of 32 lines: `count` panels of `size` elements, `pairs` pairs of each.
///
/// # Safety
/// `from` has the steps from `steps.start`, twice `pairs` of them, of `32 count` lines from `line`; `panels` has `count` times
/// `size` elements, and `size` is at least `64 pairs`.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn interleaved(
    panels: &mut [bf16],
    from: Operand<bf16>,
    line: usize,
    steps: &Range<usize>,
    (count, pairs, size): (usize, usize, usize),
) {
    for pair in 0..pairs {
        // SAFETY: the caller's promise.
        unsafe {
            let even = from.values.as_ptr().add((steps.start + 2 * pair) * from.step + line);
            for panel in 0..count {
                let even = even.add(panel * BLOCK);
                let [first, second] =
                    paired(_mm512_loadu_si512(even.cast()), _mm512_loadu_si512(even.add(from.step).cast()));
                let out = panels.as_mut_ptr().add(panel * size + pair * 2 * BLOCK).cast::<__m512i>();
                _mm512_storeu_si512(out, first);
                _mm512_storeu_si512(out.add(1), second);
            }
        }
    }
}
