//! [`attention`] in tiles, and [`KeyRanges`], its only kind of mask.

use std::sync::Arc;

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};
use tallow_kernels::attention::{self as kernels, Heads, Inputs, Sizes, attention_backward, attention_forward};
use tallow_kernels::memory::unspecified;
use tallow_kernels::simd;

use crate::gradients::{Backward, Gradients, Saved, Saves};
use crate::operand::{Scalar, check_dtype, on_cpu, with_dtype};
use crate::reference;
use crate::tape::{composed_of, dense, finish};
use crate::trace::{self, Cost};

/// For each query the one contiguous range of keys `[lo, hi)` that it sees: covers causal attention, packed documents,
/// sliding windows, padding, decoding with a cache, and full attention.
///
/// A query with an empty range (`lo == hi`) gets a zero output row, and neither receives nor gives gradients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRanges {
    b: usize,
    tq: usize,
    tk: usize,
    lo: Vec<u32>,
    hi: Vec<u32>,
}

impl KeyRanges {
    /// Ranges as given, `b * tq` values each, row by row.
    ///
    /// # Errors
    /// If the lengths do not fit, a size is zero, `tk` is over `u32::MAX`, or a range is not `lo <= hi <= tk`.
    pub fn new(b: usize, tq: usize, tk: usize, lo: Vec<u32>, hi: Vec<u32>) -> Result<Self> {
        if b == 0 || tq == 0 || tk == 0 || u32::try_from(tk).is_err() {
            bail!("key ranges: b {b}, tq {tq}, tk {tk}: each must be at least 1 and tk fit 32 bits")
        }
        let len = b.checked_mul(tq);
        if len != Some(lo.len()) || len != Some(hi.len()) {
            bail!("key ranges: {} and {} values for b {b} * tq {tq}", lo.len(), hi.len())
        }
        if let Some(i) = (0..lo.len()).find(|&i| lo[i] > hi[i] || hi[i] as usize > tk) {
            let (row, query) = (i / tq, i % tq);
            bail!("key ranges: row {row} query {query}: [{}, {}) is not within 0..{tk}", lo[i], hi[i])
        }
        Ok(Self { b, tq, tk, lo, hi })
    }

    /// Causal: the queries are the last `tq` of `tk` tokens, and each sees all tokens up to itself.
    ///
    /// # Errors
    /// If a size is zero or `tq > tk`.
    pub fn causal(b: usize, tq: usize, tk: usize) -> Result<Self> {
        if tq > tk {
            bail!("causal key ranges: {tq} queries cannot be the last of {tk} keys")
        }
        check_size(b, tq)?;
        let hi = (0..b).flat_map(|_| tk - tq + 1..=tk).map(|hi| hi as u32).collect();
        Self::new(b, tq, tk, vec![0; b * tq], hi)
    }

    /// Causal within documents: token `i` of a row sees tokens `doc_start[i]..=i`, and at most the last `window` of
    /// them (itself included). `doc_start` has `b * t` values: where in its row each token's document begins.
    ///
    /// # Errors
    /// If the length does not fit, a document begins after its token, or the window is 0.
    pub fn causal_documents(b: usize, t: usize, doc_start: &[u32], window: Option<usize>) -> Result<Self> {
        let causal = Self::causal(b, t, t)?;
        if doc_start.len() != b * t {
            bail!("document starts: {} values for b {b} * t {t}", doc_start.len())
        }
        if let Some(i) = (0..b * t).find(|&i| doc_start[i] >= causal.hi[i]) {
            bail!("document starts: row {} token {}: its document begins at {}", i / t, i % t, doc_start[i])
        }
        let ranges = Self { lo: doc_start.to_vec(), ..causal };
        match window {
            Some(window) => ranges.with_window(window),
            None => Ok(ranges),
        }
    }

    /// Causal within documents but for a prefix of each, whose tokens see each other both ways (Raffel et al. 2020): token
    /// `i` of a row sees tokens `j` of its document with `j <= i` or `j < prefix_end[i]`. `doc_start` and `prefix_end` have
    /// `b * t` values: where in its row each token's document begins, and the place behind its prefix. With
    /// `prefix_end = doc_start` this is [`causal_documents`](Self::causal_documents) without a window.
    ///
    /// # Errors
    /// If a length does not fit, a document begins after its token, or a prefix reaches outside its document.
    pub fn prefix_documents(b: usize, t: usize, doc_start: &[u32], prefix_end: &[u32]) -> Result<Self> {
        let mut ranges = Self::causal_documents(b, t, doc_start, None)?;
        if prefix_end.len() != b * t {
            bail!("prefixes: {} values for b {b} * t {t}", prefix_end.len())
        }
        for (i, &end) in prefix_end.iter().enumerate().filter(|&(i, &end)| end > ranges.hi[i]) {
            let (row, token) = (i / t, i % t);
            if end as usize > t || doc_start[row * t + end as usize - 1] != doc_start[i] {
                bail!("prefixes: row {row} token {token}: its prefix ends at {end}, outside its document")
            }
        }
        ranges.hi.iter_mut().zip(prefix_end).for_each(|(hi, &end)| *hi = (*hi).max(end));
        Ok(ranges)
    }

    /// Full attention; with `lens` (`b` values) only the first `lens[i]` tokens of row `i` are seen, by all of its
    /// queries.
    ///
    /// # Errors
    /// If a size is zero, the number of lengths is not `b`, or one is over `t`.
    pub fn bidirectional(b: usize, t: usize, lens: Option<&[u32]>) -> Result<Self> {
        check_size(b, t)?;
        let hi = match lens {
            None => vec![t as u32; b * t],
            Some(lens) if lens.len() == b => lens.iter().flat_map(|&len| std::iter::repeat_n(len, t)).collect(),
            Some(lens) => bail!("bidirectional key ranges: {} lengths for {b} rows", lens.len()),
        };
        Self::new(b, t, t, vec![0; b * t], hi)
    }

    /// Keeps only the last `window` keys of each range: a sliding window where the ranges are causal.
    ///
    /// # Errors
    /// If the window is 0.
    pub fn with_window(mut self, window: usize) -> Result<Self> {
        if window == 0 {
            bail!("a window of 0 keys leaves nothing to attend to; use 1 or more, or none")
        }
        let window = u32::try_from(window).unwrap_or(u32::MAX);
        self.lo.iter_mut().zip(&self.hi).for_each(|(lo, hi)| *lo = (*lo).max(hi.saturating_sub(window)));
        Ok(self)
    }

    /// First key of each query, `b * tq` values.
    pub fn lo(&self) -> &[u32] {
        &self.lo
    }

    /// One past the last key of each query, `b * tq` values.
    pub fn hi(&self) -> &[u32] {
        &self.hi
    }

    /// `(b, tq, tk)`.
    pub fn dims(&self) -> (usize, usize, usize) {
        (self.b, self.tq, self.tk)
    }

    /// Pairs of query and key that are seen, over all rows: what the cost of attention is proportional to.
    pub fn pairs(&self) -> u64 {
        self.lo.iter().zip(&self.hi).map(|(lo, hi)| u64::from(hi - lo)).sum()
    }
}

/// Caps what is allocated before the lengths are checked.
fn check_size(b: usize, t: usize) -> Result<()> {
    match b.checked_mul(t) {
        Some(n) if n <= isize::MAX as usize / 16 => Ok(()),
        _ => bail!("key ranges: b {b} * t {t} is too large"),
    }
}

/// `softmax(scale q k^T) v` over each query's range of keys (Vaswani et al. 2017), in tiles (Dao et al. 2022).
///
/// `q [b, tq, h, d]`, `k` and `v [b, tk, g, d]`, f32 or bf16 alike, computed in f32; query head `i` attends to key head
/// `i / (h / g)` (grouped queries, Ainslie et al. 2023). Returns `[b, tq, h, d]`. Any strides will do as long as channels
/// are contiguous. Keeps one f32 for each query and head; memory is never in proportion to `tq * tk`, and time is in
/// proportion to the pairs that are seen. Changing keys or values outside a query's range leaves its row bit for bit.
///
/// # Errors
/// If shapes, dtypes, devices or the ranges do not fit each other.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, ranges: &Arc<KeyRanges>, scale: f64) -> Result<Tensor> {
    let sizes = check(q, k, v, ranges)?;
    if !on_cpu(q) {
        return composed_of("attention", &[q, k, v], |x| reference::attention(&x[0], &x[1], &x[2], ranges, scale));
    }
    let [q, k, v] = [q, k, v].map(dense_channels);
    let (q, k, v) = (q?, k?, v?);
    let mut op =
        Attention { sizes, ranges: ranges.clone(), scale: scale as f32, lse: vec![], size: q.dtype().size_in_bytes() };
    let _span = trace::op("attention", || op.forward_cost());
    let (y, lse) = with_dtype!("attention", q.dtype(), T => op.forward::<T>([&q, &k, &v]))?;
    op.lse = lse;
    finish(op, &[&q, &k, &v], y, q.shape().clone())
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, ranges: &KeyRanges) -> Result<Sizes> {
    let ((b, tq, h, d), (bk, tk, g, dk)) = (q.dims4()?, k.dims4()?);
    if k.shape() != v.shape() || b != bk || d != dk || g == 0 || d == 0 || h == 0 || !h.is_multiple_of(g) {
        let (qs, ks, vs) = (q.shape(), k.shape(), v.shape());
        bail!("attention: q {qs:?}, k {ks:?}, v {vs:?}: expected q [b, tq, h, d], k and v [b, tk, g, d], g dividing h")
    }
    if ranges.dims() != (b, tq, tk) {
        bail!("attention: key ranges are for (b, tq, tk) {:?}, tensors are {:?}", ranges.dims(), (b, tq, tk))
    }
    check_dtype("attention", q.dtype())?;
    if [k, v].iter().any(|x| x.dtype() != q.dtype() || !x.device().same_device(q.device())) {
        bail!("attention: q {:?}, k {:?}, v {:?} must share dtype and device", q.dtype(), k.dtype(), v.dtype())
    }
    Ok(Sizes { b, tq, tk, h, g, d })
}

/// As it is if the last dimension is contiguous (strides elsewhere are fine), else copied.
fn dense_channels(x: &Tensor) -> Result<Tensor> {
    if x.stride().last() == Some(&1) { Ok(x.clone()) } else { dense(x) }
}

struct Attention {
    sizes: Sizes,
    ranges: Arc<KeyRanges>,
    scale: f32,
    /// Log-sum-exp of each query's logits, `[b, h, tq]`.
    lse: Vec<f32>,
    /// Bytes of an element.
    size: usize,
}

/// The rows of an operand where they lie.
fn heads<'a, T: Scalar>(storage: &'a Storage, layout: &Layout) -> Result<Heads<'a, T>> {
    let Storage::Cpu(storage) = storage else { bail!("attention: recorded on the CPU, but an operand lies elsewhere") };
    let data = &T::cpu_storage_as_slice(storage)?[layout.start_offset()..];
    let (dims, strides) = (layout.dims(), layout.stride());
    Heads::new(data, [dims[0], dims[1], dims[2], dims[3]], [strides[0], strides[1], strides[2]])
        .ok_or_else(|| candle_core::Error::Msg(format!("attention: layout {layout:?} reaches past its storage")))
}

impl Attention {
    /// Multiply-adds of one of the products over all pairs that are seen.
    fn pair_work(&self) -> f64 {
        self.ranges.pairs() as f64 * (self.sizes.h * self.sizes.d) as f64
    }

    fn forward_cost(&self) -> Cost {
        let Sizes { b, tq, tk, h, g, d } = self.sizes;
        Cost { flops: 4.0 * self.pair_work(), bytes: (self.size * b * d * (2 * tq * h + 2 * tk * g)) as f64 }
    }

    fn inputs<'a, T: Scalar>(&'a self, [q, k, v]: [Heads<'a, T>; 3]) -> Inputs<'a, T> {
        Inputs { sizes: self.sizes, q, k, v, lo: self.ranges.lo(), hi: self.ranges.hi(), scale: self.scale }
    }

    fn forward<T: Scalar>(&self, inputs: [&Tensor; 3]) -> Result<(CpuStorage, Vec<f32>)> {
        let Sizes { b, tq, h, d, .. } = self.sizes;
        let (mut out, mut lse) = (vec![T::ZERO; b * tq * h * d], vec![0.0; b * h * tq]);
        let [q, k, v] = inputs.map(Tensor::storage_and_layout);
        let inputs = self.inputs([heads::<T>(&q.0, q.1)?, heads(&k.0, k.1)?, heads(&v.0, v.1)?]);
        attention_forward(simd::level(), &inputs, &mut out, &mut lse);
        Ok((T::into_storage(out), lse))
    }

    fn gradients<T: Scalar>(
        &self,
        inputs: [&Tensor; 3],
        out: &Tensor,
        dout: &Tensor,
        grads: &mut Gradients<'_>,
    ) -> Result<()> {
        let [q, k, v, o, d] = [inputs[0], inputs[1], inputs[2], out, dout].map(Tensor::storage_and_layout);
        let saved = kernels::Saved { out: heads::<T>(&o.0, o.1)?, dout: heads(&d.0, d.1)?, lse: &self.lse };
        let [mut dq, mut dk, mut dv] = inputs.map(|x| unspecified::<T>(x.elem_count()));
        let operands = self.inputs([heads(&q.0, q.1)?, heads(&k.0, k.1)?, heads(&v.0, v.1)?]);
        attention_backward(simd::level(), &operands, &saved, &mut dq, &mut dk, &mut dv);
        for (i, (dx, x)) in [dq, dk, dv].into_iter().zip(inputs).enumerate() {
            if grads.wants(i) {
                grads.give(i, dx, x.shape())?;
            }
        }
        Ok(())
    }
}

impl Backward for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn saves(&self) -> Saves {
        Saves::InputsAndOutput
    }

    fn cost(&self) -> Cost {
        let Sizes { b, tq, tk, h, g, d } = self.sizes;
        let elements = b * d * (4 * tq * h + 4 * tk * g);
        Cost { flops: 10.0 * self.pair_work(), bytes: (self.size * elements) as f64 }
    }

    fn backward(&self, saved: Saved<'_>, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        let ([q, k, v], Some(out)) = (saved.inputs, saved.output) else {
            bail!("attention: backward without its operands and its result")
        };
        with_dtype!(self.name(), q.dtype(), T => self.gradients::<T>([q, k, v], out, dy, grads))
    }
}
