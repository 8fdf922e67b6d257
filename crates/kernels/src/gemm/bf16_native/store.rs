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

    /// Writes the rows `rows` and columns `cols` from `sums`, which has `stride` values a row.
    ///
    /// # Safety
    /// No other call at the same time is of the same elements.
    pub(super) unsafe fn store(&self, sums: &[f32], stride: usize, rows: Range<usize>, cols: Range<usize>) {
        assert!(rows.end <= self.rows && cols.end <= self.width, "a tile beyond its result");
        let (level, at) = (crate::simd::level(), rows.start * self.width + cols.start);
        let (height, width, pitch) = (rows.len(), cols.len(), self.width);
        // SAFETY: rows and columns are within the result (asserted), which is borrowed for as long as the target lives, and
        // the caller promises that nobody else has these elements now.
        unsafe {
            match self.kind {
                Kind::Bf16(c, add) => {
                    rows_to(level, Window { first: c.add(at), height, width, pitch }, sums, stride, add)
                }
                Kind::F32(c, add) => {
                    rows_to(level, Window { first: c.add(at), height, width, pitch }, sums, stride, add)
                }
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
    fn rows_to[T: Element](s, to: Window<T>, sums: &[f32], stride: usize, add: bool) {
        let mut window = to;
        for (row, sums) in (0..window.height).zip(sums.chunks(stride)) {
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

simd_fn! {
    /// Adds a tile's rows of `NR` values to sums that have `stride` values a row.
    pub(super) fn add_tile(s, tile: &[[f32; NR]], sums: &mut [f32], stride: usize) {
        for (row, sums) in tile.iter().zip(sums.chunks_mut(stride)) {
            for (row, sums) in row.chunks_exact(S::LANES).zip(sums.chunks_exact_mut(S::LANES)) {
                s.store(s.add(s.load(sums), s.load(row)), sums);
            }
        }
    }
}
