//! Tiles in pairs of bf16, for CPUs that multiply and add such pairs in f32 (AVX512-BF16): twice the rate of f32.
//!
//! Logits and their gradients are summed in f32; probabilities and gradients of logits are rounded to bf16 before they are
//! multiplied, as FlashAttention does (Dao et al. 2022). Tiny values (below 2^-126) count as zero in such products.

use half::bf16;

use crate::lanes::{Element, Portable, simd_fn};
use crate::memory::halves;
use crate::simd::{self, Bf16, Level};

use super::arithmetic::Arithmetic;
use super::pack::{AHEAD, Head, prefetch};
use super::tile::{MultiplyAdd, Product, ProductFn, blocks};
use super::tiles::Tiles;
use super::{Heads, TILE_KEYS};

/// Pairs of bf16, in vectors or in tiles.
#[derive(Clone, Copy)]
pub(super) enum InBf16 {
    /// In vectors.
    Pairs(Pairs),
    /// In tiles.
    Tiles(Tiles),
}

impl InBf16 {
    /// For inputs of type `T`, where they are bf16 and `level` and the CPU have instructions that are worth it. Logits must keep
    /// their order when they are scaled.
    pub(super) fn native<T: Element>(level: Level, scale: f32) -> Option<Self> {
        if T::as_bf16(&[]).is_none() || scale <= 0.0 || scale.is_nan() {
            return None;
        }
        match simd::bf16(level)? {
            Bf16::Pairs => Pairs::new(level).map(Self::Pairs),
            Bf16::Tiles => Tiles::new(level).map(Self::Tiles),
        }
    }
}

/// Pairs of bf16 in vectors; to have one with the instructions is the proof that this CPU has them.
#[derive(Clone, Copy)]
pub(super) struct Pairs {
    level: Level,
    native: bool,
}

impl Pairs {
    /// `None` without the instructions.
    pub(super) fn new(level: Level) -> Option<Self> {
        (level >= Level::Avx512 && simd::has_pairs() && !cfg!(tallow_emulated)).then_some(Self { level, native: true })
    }

    /// The same arithmetic without the instructions, slow: for tests.
    #[cfg(test)]
    pub(super) fn portable() -> Self {
        Self { level: Level::Scalar, native: false }
    }
}

impl<T: Element> Arithmetic<T> for Pairs {
    const PER_WORD: usize = 2;

    fn product(self) -> ProductFn {
        #[cfg(target_arch = "x86_64")]
        if self.native {
            return avx512;
        }
        portable
    }

    fn factors(self, factor: f32) -> (f32, f32) {
        (1.0, factor)
    }

    fn pack_rows(
        self,
        src: &Heads<'_, T>,
        head: Head,
        rows: (usize, usize),
        _: f32,
        dst: &mut [f32],
        padded: usize,
    ) -> bool {
        src.as_bf16().is_some_and(|src| copy_rows(self.level, &src, head, rows, halves(dst), padded))
    }

    fn pack_steps(self, src: &Heads<'_, T>, head: Head, rows: (usize, usize), dst: &mut [f32], padded: usize) -> bool {
        src.as_bf16().is_some_and(|src| interleave_rows(self.level, &src, head, rows, halves(dst), padded))
    }

    fn words(self, rows: &[f32], words: &mut [f32]) {
        assert!(rows.len().is_multiple_of(TILE_KEYS) && words.len() * 2 >= rows.len());
        #[cfg(target_arch = "x86_64")]
        if self.native {
            // SAFETY: the CPU has the instructions.
            return unsafe { words_avx512(rows, words) };
        }
        halves(words).iter_mut().zip(rows).for_each(|(half, x)| *half = bf16::from_f32(*x));
    }

    fn steps(self, rows: &[f32], words: &mut [f32]) {
        assert!(rows.len().is_multiple_of(TILE_KEYS));
        assert!(words.len() * 2 >= rows.len().next_multiple_of(2 * TILE_KEYS));
        #[cfg(target_arch = "x86_64")]
        if self.native {
            // SAFETY: the CPU has the instructions.
            return unsafe { steps_avx512(rows, words) };
        }
        for (two, words) in rows.chunks(2 * TILE_KEYS).zip(halves(words).chunks_exact_mut(2 * TILE_KEYS)) {
            for (key, pair) in words.chunks_exact_mut(2).enumerate() {
                pair[0] = bf16::from_f32(two[key]);
                pair[1] = two.get(TILE_KEYS + key).map_or(bf16::ZERO, |x| bf16::from_f32(*x));
            }
        }
    }
}

/// Whether a value is infinite or NaN.
fn not_finite(x: bf16) -> bool {
    x.to_bits() & 0x7f80 == 0x7f80
}

simd_fn! {
    /// As [`Arithmetic::pack_rows`].
    pub(super) fn copy_rows(
        s, src: &Heads<'_, bf16>, head: Head, rows: (usize, usize), dst: &mut [bf16], padded: usize,
    ) -> bool {
        // `s` only chooses the instruction set: the loops are vectorised by the compiler.
        let _ = s;
        let mut wrong = false;
        for (dst, t) in dst.chunks_exact_mut(padded).zip(rows.0..rows.1) {
            if t + AHEAD < rows.1 {
                prefetch(src.row(head.b, t + AHEAD, head.h));
            }
            let src = src.row(head.b, t, head.h);
            wrong |= src.iter().fold(false, |wrong, x| wrong | not_finite(*x));
            let (values, rest) = dst.split_at_mut(src.len());
            values.copy_from_slice(src);
            rest.fill(bf16::ZERO);
        }
        !wrong
    }
}

simd_fn! {
    /// As [`Arithmetic::pack_steps`].
    pub(super) fn interleave_rows(
        s, src: &Heads<'_, bf16>, head: Head, rows: (usize, usize), dst: &mut [bf16], padded: usize,
    ) -> bool {
        let _ = s;
        let mut wrong = false;
        for (dst, t) in dst.chunks_exact_mut(2 * padded).zip((rows.0..rows.1).step_by(2)) {
            let even = src.row(head.b, t, head.h);
            let (values, rest) = dst.split_at_mut(2 * even.len());
            rest.fill(bf16::ZERO);
            let pairs = values.as_chunks_mut::<2>().0.iter_mut().zip(even);
            wrong |= even.iter().fold(false, |wrong, x| wrong | not_finite(*x));
            if t + 1 < rows.1 {
                let odd = src.row(head.b, t + 1, head.h);
                wrong |= odd.iter().fold(false, |wrong, x| wrong | not_finite(*x));
                pairs.zip(odd).for_each(|((pair, even), odd)| *pair = [*even, *odd]);
            } else {
                pairs.for_each(|(pair, even)| *pair = [*even, bf16::ZERO]);
            }
        }
        !wrong
    }
}

/// Words are pairs of bf16.
struct Both;

impl MultiplyAdd<Portable> for Both {
    #[inline(always)]
    fn apply(_: Portable, x: [f32; 8], y: [f32; 8], sum: [f32; 8]) -> [f32; 8] {
        let halves = |word: f32| (f32::from_bits(word.to_bits() << 16), f32::from_bits(word.to_bits() & 0xffff_0000));
        std::array::from_fn(|lane| {
            let ((x0, x1), (y0, y1)) = (halves(x[lane]), halves(y[lane]));
            sum[lane] + (x0 * y0 + x1 * y1)
        })
    }
}

pub(super) unsafe fn portable(p: Product) {
    // SAFETY: the caller's promise.
    unsafe { blocks::<_, Both>(Portable, p) }
}

#[cfg(target_arch = "x86_64")]
use native::{avx512, steps_avx512};
#[cfg(target_arch = "x86_64")]
pub(super) use native::{turned_steps_avx512, words_avx512};

#[cfg(target_arch = "x86_64")]
mod native {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512,
        _mm512_permutexvar_epi16, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_storeu_si512,
    };

    use super::{Both, MultiplyAdd, Product, TILE_KEYS, blocks};
    use crate::lanes::Avx512;
    use crate::turn::transpose;

    impl MultiplyAdd<Avx512> for Both {
        #[inline(always)]
        fn apply(_: Avx512, x: __m512, y: __m512, sum: __m512) -> __m512 {
            // SAFETY: only `avx512` is made of this, whose caller vouches for the instructions; any bits are pairs.
            unsafe {
                let pairs = |x| std::mem::transmute::<__m512, __m512bh>(x);
                _mm512_dpbf16_ps(sum, pairs(x), pairs(y))
            }
        }
    }

    /// # Safety
    /// As a [`ProductFn`](super::super::tile::ProductFn), on a CPU with AVX512-BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")]
    pub(super) unsafe fn avx512(p: Product) {
        if let Some(s) = Avx512::new() {
            // SAFETY: the caller's promise.
            unsafe { blocks::<_, Both>(s, p) }
        }
    }

    const VECTOR: usize = 16;

    /// Rounds 32 values, in their order.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn rounded(first: __m512, second: __m512) -> __m512i {
        // SAFETY: both are 512 bits.
        unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(second, first)) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(in crate::attention) fn words_avx512(rows: &[f32], words: &mut [f32]) {
        for (x, word) in rows.chunks_exact(2 * VECTOR).zip(words.chunks_exact_mut(VECTOR)) {
            // SAFETY: 32 values and 16 words are there.
            unsafe {
                let (first, second) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x[VECTOR..].as_ptr()));
                _mm512_storeu_si512(word.as_mut_ptr().cast(), rounded(first, second));
            }
        }
    }

    /// Where the halves of 16 words come from in two vectors of 16.
    const INTERLEAVED: [u16; 32] = {
        let mut order = [0; 32];
        let mut at = 0;
        while at < 32 {
            order[at] = (at / 2 + at % 2 * VECTOR) as u16;
            at += 1;
        }
        order
    };

    /// Rows of `TILE_KEYS` values, 32 at a time, as words `[key][pair of rows]` that are `pitch` apart from key to key.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(in crate::attention) fn turned_steps_avx512(rows: &[f32], words: &mut [f32], pitch: usize) {
        // SAFETY: 32 halves are there.
        let order = unsafe { _mm512_loadu_si512(INTERLEAVED.as_ptr().cast()) };
        for (group, rows) in rows.chunks_exact(2 * VECTOR * TILE_KEYS).enumerate() {
            for key in (0..TILE_KEYS).step_by(VECTOR) {
                let mut pairs = [_mm512_setzero_si512(); VECTOR];
                for (two, pair) in rows.chunks_exact(2 * TILE_KEYS).zip(&mut pairs) {
                    let (even, odd) = two.split_at(TILE_KEYS);
                    // SAFETY: 16 values from `key` on are in either row.
                    let (even, odd) =
                        unsafe { (_mm512_loadu_ps(even[key..].as_ptr()), _mm512_loadu_ps(odd[key..].as_ptr())) };
                    *pair = _mm512_permutexvar_epi16(order, rounded(even, odd));
                }
                for (i, row) in transpose(pairs).into_iter().enumerate() {
                    let to = &mut words[(key + i) * pitch + group * VECTOR..][..VECTOR];
                    // SAFETY: the slice has 16 words.
                    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), row) };
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) fn steps_avx512(rows: &[f32], words: &mut [f32]) {
        // SAFETY: 32 halves are there.
        let order = unsafe { _mm512_loadu_si512(INTERLEAVED.as_ptr().cast()) };
        for (two, words) in rows.chunks(2 * TILE_KEYS).zip(words.chunks_exact_mut(TILE_KEYS)) {
            let (even, odd) = two.split_at(TILE_KEYS);
            for (key, word) in words.chunks_exact_mut(VECTOR).enumerate() {
                // SAFETY: a row has TILE_KEYS values, `odd` is one or nothing, and 16 words are there.
                unsafe {
                    let first = _mm512_loadu_ps(even[key * VECTOR..].as_ptr());
                    let second = match odd.get(key * VECTOR..) {
                        Some(odd) if !odd.is_empty() => _mm512_loadu_ps(odd.as_ptr()),
                        _ => _mm512_setzero_ps(),
                    };
                    let pairs = _mm512_permutexvar_epi16(order, rounded(first, second));
                    _mm512_storeu_si512(word.as_mut_ptr().cast(), pairs);
                }
            }
        }
    }
}
