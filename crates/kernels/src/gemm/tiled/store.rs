//! Writing finished tiles to the result.

use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;

use super::super::Out;
use super::NR;
use crate::lanes::{Element, simd_fn};

/// The result `[rows, width]`, shared by tasks that each write elements of their own.
pub(super) struct Target<'a> {
    kind: Kind,
    rows: usize,
    width: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

#[derive(Clone, Copy)]
enum Kind {
    Bf16(*mut bf16, bool),
    F32(*mut f32, bool),
}

// SAFETY: the pointers are to slices that are borrowed for writing for as long as the target lives; `Target::store` is
// the only access to them, and who calls it promises that no two calls at once are of the same elements.
unsafe impl Sync for Target<'_> {}

impl<'a> Target<'a> {
    /// Takes the first `rows` rows of `width` columns.
    pub(super) fn new(out: Out<'a>, rows: usize, width: usize) -> Self {
        let kind = match out {
            Out::Bf16(c, add) => Kind::Bf16(c[..rows * width].as_mut_ptr(), add),
            Out::F32(c, add) => Kind::F32(c[..rows * width].as_mut_ptr(), add),
        };
        Self { kind, rows, width, borrowed: PhantomData }
    }

    /// Writes the rows `rows` and columns `cols` from `tile`, which has `NR` values a row.
    ///
    /// # Safety
    /// No other call at the same time is of the same elements.
    pub(super) unsafe fn store(&self, tile: &[f32], rows: Range<usize>, cols: Range<usize>) {
        assert!(rows.end <= self.rows && cols.end <= self.width, "a tile beyond its result");
        let (level, at) = (crate::simd::level(), rows.start * self.width + cols.start);
        let (height, width, pitch) = (rows.len(), cols.len(), self.width);
        // SAFETY: rows and columns are within the result (asserted), which is borrowed for as long as the target lives, and
        // the caller promises that nobody else has these elements now.
        unsafe {
            match self.kind {
                Kind::Bf16(c, add) => {
                    let mut window = Window { first: c.add(at), height, width, pitch };
                    if add || !rounded_whole(&mut window, tile) {
                        rows_to(level, window, tile, add)
                    }
                }
                Kind::F32(c, add) => rows_to(level, Window { first: c.add(at), height, width, pitch }, tile, add),
            }
        }
    }
}

/// Rows of a result that its holder alone may write: who makes one vouches for that, and that they are there.
struct Window<T> {
    first: *mut T,
    height: usize,
    width: usize,
    /// Elements from one row to the next.
    pitch: usize,
}

impl<T> Window<T> {
    fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.height);
        // SAFETY: who made the window vouched for its rows.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.pitch), self.width) }
    }
}

simd_fn! {
    fn rows_to[T: Element](s, to: Window<T>, tile: &[f32], add: bool) {
        let mut window = to;
        for (row, sums) in (0..window.height).zip(tile.chunks_exact(NR)) {
            let to = window.row(row);
            let (mut to, mut sums) = (to, sums);
            while to.len() >= S::LANES {
                let mut v = s.load(sums);
                if add {
                    v = s.add(T::load(s, to), v);
                }
                T::store(s, v, to);
                (to, sums) = (&mut to[S::LANES..], &sums[S::LANES..]);
            }
            for (to, sum) in to.iter_mut().zip(sums) {
                *to = T::from_f32(if add { to.to_f32() + sum } else { *sum });
            }
        }
    }
}

/// Rounds a tile of whole rows by the instruction for it, if there is one; false if not, or if rows are shorter.
fn rounded_whole(to: &mut Window<bf16>, tile: &[f32]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if to.width == NR && !cfg!(tallow_emulated) && crate::simd::has_pairs() {
        // SAFETY: the CPU has the instructions.
        unsafe { rounded_avx512(to, tile) };
        return true;
    }
    let _ = (to, tile);
    false
}

/// Sums of products that were made by such instructions are never below 2^-126, where this one's results would be zero.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn rounded_avx512(to: &mut Window<bf16>, tile: &[f32]) {
    use std::arch::x86_64::{__m512i, _mm512_cvtne2ps_pbh, _mm512_loadu_ps, _mm512_storeu_si512};
    for (row, sums) in tile.chunks_exact(NR).enumerate().take(to.height) {
        let to = &mut to.row(row)[..NR];
        // SAFETY: both have two vectors' values; any bits are an integer.
        unsafe {
            let (first, second) = (_mm512_loadu_ps(sums.as_ptr()), _mm512_loadu_ps(sums.as_ptr().add(16)));
            let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(second, first));
            _mm512_storeu_si512(to.as_mut_ptr().cast(), both);
        }
    }
}
