//! Tiles of attention in AMX's tiles of bf16: as in pairs (`pairs`), in larger steps.

use crate::amx::Amx;
use crate::lanes::Element;
use crate::memory::halves;
use crate::simd::Level;

use half::bf16;

use super::arithmetic::Arithmetic;
use super::pack::Head;
use super::pairs::{copy_rows, interleave_rows, portable};
use super::tile::ProductFn;
use super::{Heads, MOST_ROWS, TILE_KEYS};

/// AMX's tiles; to have one with the instructions is the proof that this CPU has them, and those to round to bf16.
#[derive(Clone, Copy)]
pub(super) struct Tiles {
    level: Level,
    amx: Option<Amx>,
}

impl Tiles {
    /// `None` without the instructions.
    pub(super) fn new(level: Level) -> Option<Self> {
        let amx = Amx::new().filter(|_| level >= Level::Amx && crate::simd::has_pairs())?;
        Some(Self { level, amx: Some(amx) })
    }

    /// The same arithmetic without the instructions, slow: for tests.
    #[cfg(test)]
    pub(super) fn portable() -> Self {
        Self { level: Level::Scalar, amx: None }
    }
}

impl<T: Element> Arithmetic<T> for Tiles {
    const PER_WORD: usize = 2;
    const STEP: usize = 32;
    const ROW_STEP: usize = 16;
    const ROWS: usize = MOST_ROWS;
    const PANEL: usize = 16;
    const TURNED: (usize, usize) = (MOST_ROWS / 2, 1);

    fn ready<R>(self, task: impl FnOnce() -> R) -> R {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if let Some(amx) = self.amx {
            let _configured = crate::amx::Tiles::configure(amx);
            return task();
        }
        task()
    }

    fn product(self) -> ProductFn {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if self.amx.is_some() {
            return native::product;
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
        dst[(rows.1 - rows.0).div_ceil(2) * padded..].fill(0.0);
        src.as_bf16().is_some_and(|src| interleave_rows(self.level, &src, head, rows, halves(dst), padded))
    }

    fn words(self, rows: &[f32], words: &mut [f32]) {
        assert!(rows.len().is_multiple_of(TILE_KEYS) && words.len() * 2 >= rows.len());
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if self.amx.is_some() {
            // SAFETY: the CPU has the instructions.
            return unsafe { super::pairs::words_avx512(rows, words) };
        }
        halves(words).iter_mut().zip(rows).for_each(|(half, x)| *half = bf16::from_f32(*x));
    }

    fn steps(self, rows: &[f32], words: &mut [f32]) {
        const PITCH: usize = MOST_ROWS / 2;
        assert!(rows.len().is_multiple_of(32 * TILE_KEYS) && rows.len() <= MOST_ROWS * TILE_KEYS);
        assert!(words.len() >= TILE_KEYS * PITCH);
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if self.amx.is_some() {
            // SAFETY: the CPU has the instructions.
            return unsafe { super::pairs::turned_steps_avx512(rows, words, PITCH) };
        }
        let words = halves(words);
        for (row, values) in rows.chunks_exact(TILE_KEYS).enumerate() {
            for (key, x) in values.iter().enumerate() {
                words[key * 2 * PITCH + row] = bf16::from_f32(*x);
            }
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod native {
    use super::super::tile::Product;
    use crate::amx::{TILE, Tiles};

    /// # Safety
    /// As a [`ProductFn`](super::super::tile::ProductFn), on a thread whose tiles are configured; `m` and `k` are multiples
    /// of 16, `n` is one of 32, and `a_col` is 1.
    pub(super) unsafe fn product(p: Product) {
        debug_assert!(p.m.is_multiple_of(TILE) && p.k.is_multiple_of(TILE) && p.n.is_multiple_of(2 * TILE));
        debug_assert!(p.a_col == 1);
        let mut row = 0;
        while row < p.m {
            let mut column = 0;
            while column < p.n {
                let wide = if p.n - column >= 4 * TILE { 4 } else { 2 };
                // SAFETY: rows and columns stay within m and n; the caller promised the rest.
                unsafe {
                    let (a, b) = (p.a.add(row * p.a_row), p.b.add(column));
                    let c = p.c.add(row * p.ldc + column);
                    let (strides, blocks) = ([p.a_row, p.ldb, p.ldc], p.k / TILE);
                    if wide == 4 {
                        Tiles::row_of_four(a, b, c, strides, blocks, p.fresh);
                    } else {
                        Tiles::row_of_two(a, b, c, strides, blocks, p.fresh);
                    }
                }
                column += wide * TILE;
            }
            row += TILE;
        }
    }
}
