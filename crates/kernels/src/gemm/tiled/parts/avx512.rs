//! Packing whole blocks of 32 lines of 32 steps.

use std::arch::x86_64::{
    __m512, __m512i, _mm512_add_epi32, _mm512_and_si512, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_or_si512, _mm512_permutex2var_epi16, _mm512_set1_epi32, _mm512_setzero_si512,
    _mm512_srli_epi32, _mm512_storeu_si512, _mm512_sub_ps,
};

use half::bf16;

use super::super::pack::{BLOCK, Operand};
use super::{NR, PARTS, SQUARE};
use crate::turn::transpose;

/// Words of a vector, pairs of a block.
const WORDS: usize = 16;

/// The parts of 16 values, each in the upper half of its word; see [`super::parts`].
#[inline]
#[target_feature(enable = "avx512f")]
fn parts(x: __m512) -> [__m512i; PARTS] {
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let h = _mm512_and_si512(_mm512_castps_si512(x), upper);
    let rest = _mm512_sub_ps(x, _mm512_castsi512_ps(h));
    let m = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(rest), _mm512_set1_epi32(0x8000)), upper);
    // Nothing is lower but bits of values below 2^-126.
    let l = _mm512_and_si512(_mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(m))), upper);
    [h, m, l]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(values: &[f32]) -> __m512 {
    let values = &values[..WORDS];
    // SAFETY: 16 values are there.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

/// The upper halves of the words of two vectors.
const UPPER: [u16; 2 * WORDS] = {
    let mut order = [0; 2 * WORDS];
    let mut at = 0;
    while at < 2 * WORDS {
        order[at] = 2 * at as u16 + 1;
        at += 1;
    }
    order
};

/// The parts of 32 values of a line, in their order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn row(values: &[f32]) -> [__m512i; PARTS] {
    // SAFETY: 64 bytes are there.
    let order = unsafe { _mm512_loadu_si512(UPPER.as_ptr().cast()) };
    let (first, second) = (parts(load(values)), parts(load(&values[WORDS..])));
    // Closures would not be inlined into functions without these instructions.
    let mut all = first;
    for (first, second) in all.iter_mut().zip(second) {
        *first = _mm512_permutex2var_epi16(*first, order, second);
    }
    all
}

/// The parts of 16 neighbouring lines of two steps, a pair a word.
#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(even: &[f32], odd: &[f32]) -> [__m512i; PARTS] {
    let (mut all, odd) = (parts(load(even)), parts(load(odd)));
    for (even, odd) in all.iter_mut().zip(odd) {
        *even = _mm512_or_si512(_mm512_srli_epi32::<16>(*even), odd);
    }
    all
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [bf16], value: __m512i) {
    let to = &mut to[..2 * WORDS];
    // SAFETY: 64 bytes are there.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), value) }
}

/// Two steps of 16 lines.
#[inline]
fn two<'a>(from: Operand<'a, f32>, line: usize, step: usize) -> (&'a [f32], &'a [f32]) {
    (&from.values[step * from.step + line..], &from.values[(step + 1) * from.step + line..])
}

/// One part of 16 rows of words, turned.
#[inline]
#[target_feature(enable = "avx512f")]
fn turned(rows: &[[__m512i; PARTS]; WORDS], part: usize) -> [__m512i; WORDS] {
    let mut of_part = [_mm512_setzero_si512(); WORDS];
    for (words, row) in of_part.iter_mut().zip(rows) {
        *words = row[part];
    }
    transpose(of_part)
}

/// A block of `a`: `[part][line][step]`.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn pack_a(block: &mut [bf16], from: Operand<f32>, line: usize, step: usize) {
    if from.step == 1 {
        for i in 0..BLOCK {
            for (part, x) in row(&from.values[(line + i) * from.line + step..]).into_iter().enumerate() {
                store(&mut block[part * SQUARE + i * BLOCK..], x);
            }
        }
        return;
    }
    for half in [0, WORDS] {
        let mut rows = [[_mm512_setzero_si512(); PARTS]; WORDS];
        for (pair, row) in rows.iter_mut().enumerate() {
            let (even, odd) = two(from, line + half, step + 2 * pair);
            *row = pairs(even, odd);
        }
        for part in 0..PARTS {
            for (i, x) in turned(&rows, part).into_iter().enumerate() {
                store(&mut block[part * SQUARE + (half + i) * BLOCK..], x);
            }
        }
    }
}

/// A block of `b`: `[part][pair][line][2]`.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn pack_b(block: &mut [bf16], from: Operand<f32>, line: usize, step: usize) {
    for half in [0, WORDS] {
        if from.step == 1 {
            let mut rows = [[_mm512_setzero_si512(); PARTS]; WORDS];
            for (i, words) in rows.iter_mut().enumerate() {
                *words = row(&from.values[(line + half + i) * from.line + step..]);
            }
            for part in 0..PARTS {
                for (pair, x) in turned(&rows, part).into_iter().enumerate() {
                    store(&mut block[part * SQUARE + pair * 2 * NR + 2 * half..], x);
                }
            }
            continue;
        }
        for pair in 0..WORDS {
            let (even, odd) = two(from, line + half, step + 2 * pair);
            for (part, x) in pairs(even, odd).into_iter().enumerate() {
                store(&mut block[part * SQUARE + pair * 2 * NR + 2 * half..], x);
            }
        }
    }
}
