//! In what form the tiles of attention are multiplied.

use crate::lanes::Element;
use crate::simd::Level;

use super::pack::{Head, pack_rows};
use super::tile::{ProductFn, product};
use super::{Heads, TILE_KEYS};

/// Operands of the products of tiles, in words of 32 bits of which each holds [`PER_WORD`](Self::PER_WORD) steps of the
/// inner dimension.
///
/// Packing says whether all values are finite, and this matters: where a value is not, products over rows that do not see
/// it must leave it out.
pub(super) trait Arithmetic<T: Element>: Copy + Send + Sync {
    /// Steps of the inner dimension in a word; divides 16.
    const PER_WORD: usize;
    /// Products are over whole groups of that many steps: channels, keys or rows. Zeros fill up the last.
    const STEP: usize = Self::PER_WORD;
    /// Products are of whole groups of that many rows, of which the last may be anything.
    const ROW_STEP: usize = 1;
    /// Query rows that pass through a key tile together; a multiple of `STEP`.
    const ROWS: usize = 8 * Self::PANEL;
    /// Rows of a panel, or keys: what no row of a panel sees is left out.
    const PANEL: usize = 6;
    /// Words from one key to the next, and from one group of rows to the next, in what [`steps`](Self::steps) writes.
    const TURNED: (usize, usize) = (1, TILE_KEYS);

    /// Runs a task on a thread that is ready for [`product`](Self::product).
    fn ready<R>(self, task: impl FnOnce() -> R) -> R {
        task()
    }

    /// The product of words.
    fn product(self) -> ProductFn;

    /// Parts of a factor of the logits: that of the queries when they are packed, and that of the sums.
    fn factors(self, factor: f32) -> (f32, f32);

    /// Rows `[start, end)` of a head, times `factor`, as rows of `padded / PER_WORD` words along the channels.
    fn pack_rows(
        self,
        src: &Heads<'_, T>,
        head: Head,
        rows: (usize, usize),
        factor: f32,
        dst: &mut [f32],
        padded: usize,
    ) -> bool;

    /// The same rows as rows of `padded` words, of which each holds a channel of `PER_WORD` of them; zeros fill up the last
    /// `STEP`.
    fn pack_steps(self, src: &Heads<'_, T>, head: Head, rows: (usize, usize), dst: &mut [f32], padded: usize) -> bool;

    /// Rows of `TILE_KEYS` values in words along the keys.
    fn words(self, rows: &[f32], words: &mut [f32]);

    /// Rows of `TILE_KEYS` values, a multiple of `STEP`, in words of which each holds a key of `PER_WORD` rows, laid out as
    /// [`TURNED`](Self::TURNED) says.
    fn steps(self, rows: &[f32], words: &mut [f32]);
}

/// f32, to which values are widened. Squares are words as they are: nothing is left to do for them.
#[derive(Clone, Copy)]
pub(super) struct Widened(pub(super) Level);

impl<T: Element> Arithmetic<T> for Widened {
    const PER_WORD: usize = 1;

    fn product(self) -> ProductFn {
        product(self.0)
    }

    fn factors(self, factor: f32) -> (f32, f32) {
        (factor, 1.0)
    }

    fn pack_rows(
        self,
        src: &Heads<'_, T>,
        head: Head,
        rows: (usize, usize),
        factor: f32,
        dst: &mut [f32],
        padded: usize,
    ) -> bool {
        pack_rows(self.0, src, head, rows, factor, dst, padded)
    }

    fn pack_steps(self, src: &Heads<'_, T>, head: Head, rows: (usize, usize), dst: &mut [f32], padded: usize) -> bool {
        pack_rows(self.0, src, head, rows, 1.0, dst, padded)
    }

    fn words(self, _: &[f32], _: &mut [f32]) {}

    fn steps(self, _: &[f32], _: &mut [f32]) {}
}

/// Channels filled up to whole vectors of any instruction set, and whole steps.
pub(super) fn padded<T: Element, A: Arithmetic<T>>(d: usize) -> usize {
    d.next_multiple_of(A::STEP.max(16))
}

/// Smallest range of whole steps that holds a range.
pub(super) fn whole_steps<T: Element, A: Arithmetic<T>>((lo, hi): (usize, usize)) -> (usize, usize) {
    (lo / A::STEP * A::STEP, hi.next_multiple_of(A::STEP))
}

/// Columns widened to whole vectors of any instruction set, and whole steps.
pub(super) fn widen<T: Element, A: Arithmetic<T>>((lo, hi): (usize, usize)) -> (usize, usize) {
    let step = A::STEP.max(16);
    (lo / step * step, hi.next_multiple_of(step))
}

/// Words of a square of `rows` rows that [`Arithmetic::words`] and [`Arithmetic::steps`] write: none where it serves itself.
pub(super) fn square_words(rows: usize, per_word: usize) -> usize {
    if per_word == 1 { 0 } else { rows.next_multiple_of(per_word) * TILE_KEYS / per_word }
}
