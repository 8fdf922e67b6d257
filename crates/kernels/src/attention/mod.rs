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
//! infinite or NaN it is left out of the product. bf16 on a CPU with instructions for it is multiplied in pairs (`pairs`, `tiles`),
//! unless an operand is infinite or NaN: then the whole call is in f32, and its finite results may differ in their rounding.

mod arithmetic;
mod backward;
mod decode;
mod forward;
mod pack;
mod pairs;
mod tile;
mod tiles;

pub use backward::{Saved, attention_backward};
pub use forward::attention_forward;

use half::bf16;

use crate::lanes::Element;

/// Keys in a tile.
const TILE_KEYS: usize = 64;
/// Most query rows that pass through a key tile together.
const MOST_ROWS: usize = 64;

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

    /// The same, where the values are bf16.
    fn as_bf16(&self) -> Option<Heads<'a, bf16>>
    where
        T: Element,
    {
        Some(Heads { data: T::as_bf16(self.data)?, strides: self.strides, dims: self.dims })
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::arithmetic::Widened;
    use super::pairs::{InBf16, Pairs};
    use super::tiles::Tiles;
    use super::*;
    use crate::simd::Level;

    fn values(len: usize, stream: u64) -> Vec<bf16> {
        let mut values = vec![0.0; len];
        crate::rng::fill_normal(&mut values, 11, stream, 1.0);
        values.into_iter().map(bf16::from_f32).collect()
    }

    /// Largest difference, of the largest value.
    fn apart(got: &[bf16], want: &[bf16]) -> f32 {
        let most = want.iter().fold(0f32, |most, x| most.max(x.to_f32().abs()));
        got.iter().zip(want).fold(0f32, |worst, (a, b)| worst.max((a.to_f32() - b.to_f32()).abs())) / most
    }

    /// The arithmetic in pairs, with the CPU's instructions and without, against f32: packing and tiles at odd sizes, heads in
    /// groups of odd length, ranges that begin and end within a pair.
    #[test]
    fn pairs_agree_with_f32() {
        for (tq, tk, h, g, d) in [(97, 97, 4, 2, 20), (61, 150, 3, 1, 64), (130, 131, 2, 2, 35), (200, 200, 2, 1, 96)] {
            let sizes = Sizes { b: 2, tq, tk, h, g, d };
            let (q, k, v) = (values(2 * tq * h * d, 1), values(2 * tk * g * d, 2), values(2 * tk * g * d, 3));
            let dout = values(2 * tq * h * d, 4);
            let hi: Vec<u32> = (0..2).flat_map(|_| (tk - tq + 1..=tk).map(|hi| hi as u32)).collect();
            let lo: Vec<u32> = hi.iter().map(|hi| if hi % 5 == 0 { *hi } else { hi.saturating_sub(71) }).collect();
            let heads = |x: &'static [bf16], t, heads| Heads::contiguous(x, [2, t, heads, d]).unwrap();
            let leak = |x: Vec<bf16>| -> &'static [bf16] { x.leak() };
            let inputs = Inputs {
                sizes,
                q: heads(leak(q), tq, h),
                k: heads(leak(k), tk, g),
                v: heads(leak(v), tk, g),
                lo: &lo,
                hi: &hi,
                scale: 0.2,
            };
            let dout = heads(leak(dout), tq, h);
            let portable = [InBf16::Pairs(Pairs::portable()), InBf16::Tiles(Tiles::portable())];
            let native = [Pairs::new(Level::Avx512).map(InBf16::Pairs), Tiles::new(Level::Amx).map(InBf16::Tiles)];
            let all = portable.into_iter().chain(native.into_iter().flatten()).map(Some);
            let all = std::iter::once(None).chain(all);
            let results: Vec<Vec<Vec<bf16>>> = all
                .map(|pairs| {
                    let mut out = vec![bf16::NAN; 2 * tq * h * d];
                    let mut lse = vec![0.0; 2 * h * tq];
                    forward::run_all(pairs, Widened(Level::Scalar), &inputs, &mut out, &mut lse);
                    let (mut dq, mut dk, mut dv) =
                        (vec![bf16::NAN; out.len()], vec![bf16::NAN; 2 * tk * g * d], vec![bf16::NAN; 2 * tk * g * d]);
                    let of_out = Heads::contiguous(&out, [2, tq, h, d]).unwrap();
                    let saved = Saved { out: of_out, dout, lse: &lse };
                    backward::run_all(pairs, Widened(Level::Scalar), &inputs, &saved, &mut dq, &mut dk, &mut dv);
                    vec![out, dq, dk, dv]
                })
                .collect();
            for in_pairs in &results[1..] {
                for (what, (got, want)) in ["out", "dq", "dk", "dv"].iter().zip(in_pairs.iter().zip(&results[0])) {
                    let error = apart(got, want);
                    assert!(error < 1e-2, "{sizes:?} {what}: {error}");
                }
            }
        }
    }
}
