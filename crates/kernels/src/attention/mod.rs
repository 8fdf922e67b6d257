//! Scaled dot-product attention in tiles (Dao et al. 2022, 2023), forward and backward.
//!
//! Every query sees one contiguous range of keys `[lo, hi)`, which covers causal, packed documents, sliding windows,
//! padding and full attention; tiles that no query of a block sees are skipped. Nothing of size `tq * tk` is kept: the
//! forward pass leaves the logarithm of each row's sum of exponentials, and the backward pass recomputes the tiles.
//!
//! Layout: `q`, `k`, `v` are `[b, t, h, d]` with any strides and contiguous channels; results are contiguous. Shapes in
//! names: b batch, t time, h query heads, g key/value heads, d head size.
//!
//! Results do not depend on the number of threads: each output is one chain of additions over the keys (or queries) in
//! order. Where a value outside a query's range could only be multiplied by zero it changes nothing, and where it is
//! infinite or NaN it is left out of the product.

mod backward;
mod decode;
mod forward;
mod pack;
mod tile;

pub use backward::{Saved, attention_backward};
pub use forward::attention_forward;

use crate::lanes::Element;

/// Keys in a tile.
const TILE_KEYS: usize = 64;
/// Query rows that pass through a key tile together: 8 register panels.
const TILE_ROWS: usize = 48;
/// Rows of a register panel.
const PANEL: usize = 6;

/// Sizes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Batch.
    pub b: usize,
    /// Queries a row.
    pub tq: usize,
    /// Keys a row.
    pub tk: usize,
    /// Query heads.
    pub h: usize,
    /// Key/value heads; divides `h`.
    pub g: usize,
    /// Head size.
    pub d: usize,
}

impl Sizes {
    /// Query heads of each key/value head.
    fn group(self) -> usize {
        self.h / self.g
    }

    /// Channels filled up to whole vectors of any instruction set.
    fn padded(self) -> usize {
        self.d.next_multiple_of(16)
    }
}

/// A `[b, t, h, d]` tensor with strides, channels contiguous.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a, T> {
    data: &'a [T],
    strides: [usize; 3],
    dims: [usize; 4],
}

impl<'a, T> Heads<'a, T> {
    /// `data[ib * strides[0] + it * strides[1] + ih * strides[2] + id]` is the element at `[ib, it, ih, id]`.
    /// `None` if that would reach past `data`.
    pub fn new(data: &'a [T], dims: [usize; 4], strides: [usize; 3]) -> Option<Self> {
        let last =
            (0..3).try_fold(0usize, |at, i| at.checked_add(dims[i].saturating_sub(1).checked_mul(strides[i])?))?;
        let fits = dims.contains(&0) || last.checked_add(dims[3])? <= data.len();
        fits.then_some(Self { data, strides, dims })
    }

    /// A contiguous tensor; `None` if the length does not fit.
    pub fn contiguous(data: &'a [T], dims: [usize; 4]) -> Option<Self> {
        let [_, t, h, d] = dims;
        Self::new(data, dims, [t * h * d, h * d, d])
    }

    /// The channels at `[b, t, h]`.
    #[inline(always)]
    fn row(&self, b: usize, t: usize, h: usize) -> &'a [T] {
        let at = b * self.strides[0] + t * self.strides[1] + h * self.strides[2];
        &self.data[at..at + self.dims[3]]
    }
}

/// The inputs of both passes.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, T> {
    /// Sizes.
    pub sizes: Sizes,
    /// `[b, tq, h, d]`.
    pub q: Heads<'a, T>,
    /// `[b, tk, g, d]`.
    pub k: Heads<'a, T>,
    /// `[b, tk, g, d]`.
    pub v: Heads<'a, T>,
    /// First key of each query, `b * tq` values.
    pub lo: &'a [u32],
    /// One past the last key of each query.
    pub hi: &'a [u32],
    /// Factor on the logits.
    pub scale: f32,
}

impl<T: Element> Inputs<'_, T> {
    fn check(&self) {
        let Sizes { b, tq, tk, h, g, d } = self.sizes;
        assert!(g > 0 && h.is_multiple_of(g) && d > 0, "attention: {h} query heads over {g} key heads of size {d}");
        assert_eq!(self.q.dims, [b, tq, h, d]);
        assert_eq!(self.k.dims, [b, tk, g, d]);
        assert_eq!(self.v.dims, [b, tk, g, d]);
        assert!(self.lo.len() == b * tq && self.hi.len() == b * tq);
        assert!(self.hi.iter().all(|&hi| hi as usize <= tk));
    }

    /// Keys of query `t` in row `b` within `[start, end)`, relative to `start`; empty ranges are `(0, 0)`.
    #[inline(always)]
    fn span(&self, b: usize, t: usize, start: usize, end: usize) -> (usize, usize) {
        let at = b * self.sizes.tq + t;
        let (lo, hi) = ((self.lo[at] as usize).max(start), (self.hi[at] as usize).min(end));
        if lo < hi { (lo - start, hi - start) } else { (0, 0) }
    }

    /// Smallest interval of keys that holds the ranges of queries `[t0, t1)` of row `b`.
    fn union(&self, b: usize, t0: usize, t1: usize) -> (usize, usize) {
        (t0..t1).fold((usize::MAX, 0), |(lo, hi), t| {
            let (l, h) = self.span(b, t, 0, self.sizes.tk);
            if l < h { (lo.min(l), hi.max(h)) } else { (lo, hi) }
        })
    }
}

/// A result that tasks write at once, each in rows of its own.
#[derive(Clone, Copy)]
struct SharedRows<T> {
    data: *mut T,
    len: usize,
}

// SAFETY: only `row` reaches the data, and its callers take disjoint rows.
unsafe impl<T: Send> Send for SharedRows<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedRows<T> {}

impl<T> SharedRows<T> {
    fn new(data: &mut [T]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len() }
    }

    /// # Safety
    /// No other task takes an overlapping row while this one is in use, and the slice outlives it.
    #[allow(clippy::mut_from_ref)]
    unsafe fn row(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at + len <= self.len);
        // SAFETY: within the slice; the caller vouches for disjointness.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(at), len) }
    }
}
