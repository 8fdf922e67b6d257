//! Few queries over many keys, as in generation: no packing, keys read once where they lie.

use rayon::prelude::*;

use crate::lanes::{Element, simd_fn};
use crate::memory::with_scratch;
use crate::simd::Level;

use super::forward::finish_row;
use super::pack::{Head, pack_rows};
use super::{Heads, Inputs, SharedRows, Sizes};

/// Query rows of a group that this path takes.
pub(super) const MAX_ROWS: usize = 8;
/// Keys of one task. Fixed, so that the result does not depend on the threads.
const SPLIT: usize = 512;

/// What a task leaves for each of its rows: maximum (base 2), sum of exponentials, and the weighted sum of values.
struct Part {
    peak: f32,
    total: f32,
    o: Vec<f32>,
}

pub(super) fn attend<T: Element>(level: Level, inputs: &Inputs<'_, T>, out: &mut [T], lse: &mut [f32]) {
    let Sizes { b, tq, tk, h, g, d } = inputs.sizes;
    let group = inputs.sizes.group();
    let rows = group * tq;
    let splits = tk.div_ceil(SPLIT).max(1);
    let parts: Vec<Vec<Part>> = (0..b * g * splits)
        .into_par_iter()
        .map(|task| {
            let (head, split) = (task / splits, task % splits);
            let keys = (split * SPLIT, ((split + 1) * SPLIT).min(tk));
            split_task(level, inputs, Head { b: head / g, h: head % g }, keys)
        })
        .collect();
    let (out, lse) = (SharedRows::new(out), SharedRows::new(lse));
    (0..b * g).into_par_iter().for_each(|head| {
        let parts = &parts[head * splits..(head + 1) * splits];
        for row in 0..rows {
            let (ib, ih, t) = (head / g, head % g * group + row / tq, row % tq);
            let merged = merge(parts.iter().map(|part| &part[row]), d);
            // SAFETY: the rows of this head are this task's own.
            let (out, lse) = unsafe { (out.row(((ib * tq + t) * h + ih) * d, d), lse.row((ib * h + ih) * tq + t, 1)) };
            finish_row(level, &merged.o, merged.peak, merged.total, out, &mut lse[0]);
        }
    });
}

fn merge<'a>(parts: impl Iterator<Item = &'a Part>, d: usize) -> Part {
    let mut sum = Part { peak: f32::NEG_INFINITY, total: 0.0, o: vec![0.0; d] };
    for part in parts.filter(|part| part.total != 0.0) {
        let peak = if part.peak > sum.peak { part.peak } else { sum.peak };
        let [old, new] = [&sum, part].map(|p| if p.peak == peak { 1.0 } else { (p.peak - peak).exp2() });
        let old = if sum.total == 0.0 { 0.0 } else { old };
        sum.total = sum.total * old + part.total * new;
        sum.peak = peak;
        sum.o.iter_mut().zip(&part.o).for_each(|(s, p)| *s = *s * old + *p * new);
    }
    sum
}

fn split_task<T: Element>(level: Level, inputs: &Inputs<'_, T>, head: Head, keys: (usize, usize)) -> Vec<Part> {
    let Sizes { tq, d, .. } = inputs.sizes;
    let (group, padded) = (inputs.sizes.group(), inputs.sizes.d.next_multiple_of(16));
    let rows = group * tq;
    with_scratch([rows * padded, rows * SPLIT], |[q, logits]| {
        let mut spans = [(0, 0); MAX_ROWS];
        for (row, (span, q)) in spans.iter_mut().zip(q.chunks_exact_mut(padded)).enumerate() {
            let (i, t) = (row / tq, row % tq);
            *span = inputs.span(head.b, t, keys.0, keys.1);
            let head = Head { b: head.b, h: head.h * group + i };
            pack_rows(level, &inputs.q, head, (t, t + 1), inputs.scale * std::f32::consts::LOG2_E, q, padded);
        }
        let spans = &spans[..rows];
        all_logits(level, &inputs.k, head, keys, spans, q, padded, logits);
        let parts = spans.iter().zip(logits.chunks_exact_mut(SPLIT)).map(|(&(lo, hi), logits)| {
            let mut part = Part { peak: f32::NEG_INFINITY, total: 0.0, o: vec![0.0; d] };
            if lo < hi {
                (part.peak, part.total) = exponentials(level, &mut logits[lo..hi]);
                weighted_sum(level, &inputs.v, head, keys.0 + lo, &logits[lo..hi], &mut part.o);
            }
            part
        });
        parts.collect()
    })
}

/// Keys that all rows meet before the next ones are read.
const BLOCK: usize = 16;

simd_fn! {
    /// `logits[row * SPLIT + j] = q[row] . k[keys.0 + j]` for `j` in the span of the row.
    fn all_logits[T: Element](
        s, k: &Heads<'_, T>, head: Head, keys: (usize, usize), spans: &[(usize, usize)], q: &[f32], padded: usize,
        logits: &mut [f32],
    ) {
        for first in (0..keys.1 - keys.0).step_by(BLOCK) {
            for ((q, logits), span) in q.chunks_exact(padded).zip(logits.chunks_exact_mut(SPLIT)).zip(spans) {
                let keys_of_row = first.max(span.0)..(first + BLOCK).min(span.1).max(first.max(span.0));
                for (j, logit) in keys_of_row.clone().zip(&mut logits[keys_of_row]) {
                    let k = k.row(head.b, keys.0 + j, head.h);
                    let mut sum = s.splat(0.0);
                    let whole = k.len() / S::LANES * S::LANES;
                    let (body, rest) = k.split_at(whole);
                    for (k, q) in body.chunks_exact(S::LANES).zip(q.chunks_exact(S::LANES)) {
                        sum = s.fma(s.load(q), T::load(s, k), sum);
                    }
                    if !rest.is_empty() {
                        sum = s.fma(s.load(&q[whole..]), T::load_part(s, rest), sum);
                    }
                    *logit = s.sum(sum);
                }
            }
        }
    }
}

simd_fn! {
    /// Replaces logits (base 2) by exponentials; returns their maximum and sum.
    fn exponentials(s, logits: &mut [f32]) -> (f32, f32) {
        let whole = logits.len() / S::LANES * S::LANES;
        let (body, rest) = logits.split_at_mut(whole);
        let mut most = s.splat(f32::NEG_INFINITY);
        for v in body.chunks_exact(S::LANES) {
            most = s.max(s.load(v), most);
        }
        let most = rest.iter().copied().fold(s.max_lane(most), f32::max);
        let m = s.splat(most);
        let mut sum = s.splat(0.0);
        for v in body.chunks_exact_mut(S::LANES) {
            let e = s.exp2(s.sub(s.load(v), m));
            sum = s.add(sum, e);
            s.store(e, v);
        }
        let mut total = s.sum(sum);
        if !rest.is_empty() {
            let e = s.exp2(s.sub(f32::load_part(s, rest), m));
            f32::store_part(s, e, rest);
            total += rest.iter().sum::<f32>();
        }
        (most, total)
    }
}

simd_fn! {
    /// `o = sum of weights[j] * v[first + j]`, up to 4 vectors of channels at a time in registers.
    fn weighted_sum[T: Element](s, v: &Heads<'_, T>, head: Head, first: usize, weights: &[f32], o: &mut [f32]) {
        let mut channel = 0;
        while channel < o.len() {
            let left = o.len() - channel;
            if left >= 4 * S::LANES {
                let mut sums = [s.splat(0.0); 4];
                for (j, weight) in weights.iter().enumerate() {
                    let v = &v.row(head.b, first + j, head.h)[channel..channel + 4 * S::LANES];
                    let weight = s.splat(*weight);
                    for (sum, v) in sums.iter_mut().zip(v.chunks_exact(S::LANES)) {
                        *sum = s.fma(weight, T::load(s, v), *sum);
                    }
                }
                for (sum, o) in sums.into_iter().zip(o[channel..].chunks_exact_mut(S::LANES)) {
                    s.store(sum, o);
                }
                channel += 4 * S::LANES;
            } else {
                let end = channel + left.min(S::LANES);
                let mut sum = s.splat(0.0);
                for (j, weight) in weights.iter().enumerate() {
                    let v = &v.row(head.b, first + j, head.h)[channel..end];
                    sum = s.fma(s.splat(*weight), T::load_part(s, v), sum);
                }
                f32::store_part(s, sum, &mut o[channel..end]);
                channel = end;
            }
        }
    }
}
