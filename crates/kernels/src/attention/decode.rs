//! Few queries over many keys, as in generation: no packing, keys read once where they lie.

use rayon::prelude::*;

use crate::lanes::{Element, simd_fn};
use crate::simd::Level;

use super::forward::finish_row;
use super::pack::{Head, pack_row, with_scratch};
use super::{Inputs, SharedRows, Sizes};

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
    let (group, padded) = (inputs.sizes.group(), inputs.sizes.padded());
    with_scratch([padded, SPLIT], |[q, logits]| {
        (0..group * tq)
            .map(|row| {
                let (ih, t) = (head.h * group + row / tq, row % tq);
                let (lo, hi) = inputs.span(head.b, t, keys.0, keys.1);
                let mut part = Part { peak: f32::NEG_INFINITY, total: 0.0, o: vec![0.0; d] };
                if lo == hi {
                    return part;
                }
                pack_row(level, inputs.q.row(head.b, t, ih), inputs.scale * std::f32::consts::LOG2_E, q);
                let logits = &mut logits[..hi - lo];
                for (logit, j) in logits.iter_mut().zip(keys.0 + lo..) {
                    *logit = dot(level, q, inputs.k.row(head.b, j, head.h));
                }
                (part.peak, part.total) = exponentials(level, logits);
                for (weight, j) in logits.iter().zip(keys.0 + lo..) {
                    add_scaled(level, *weight, inputs.v.row(head.b, j, head.h), &mut part.o);
                }
                part
            })
            .collect()
    })
}

simd_fn! {
    fn dot[T: Element](s, q: &[f32], k: &[T]) -> f32 {
        let mut sum = s.splat(0.0);
        let mut i = 0;
        while i + S::LANES <= k.len() {
            sum = s.fma(s.load(&q[i..]), T::load(s, &k[i..]), sum);
            i += S::LANES;
        }
        if i < k.len() {
            sum = s.fma(s.load(&q[i..]), T::load_part(s, &k[i..]), sum);
        }
        s.sum(sum)
    }
}

simd_fn! {
    /// Replaces logits (base 2) by exponentials; returns their maximum and sum.
    fn exponentials(s, logits: &mut [f32]) -> (f32, f32) {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let m = s.splat(most);
        let mut sum = s.splat(0.0);
        let whole = logits.len() / S::LANES * S::LANES;
        let (body, rest) = logits.split_at_mut(whole);
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
    fn add_scaled[T: Element](s, weight: f32, v: &[T], o: &mut [f32]) {
        let w = s.splat(weight);
        let mut i = 0;
        while i < o.len() {
            let end = (i + S::LANES).min(o.len());
            let sum = s.fma(w, T::load_part(s, &v[i..end]), f32::load_part(s, &o[i..end]));
            f32::store_part(s, sum, &mut o[i..end]);
            i = end;
        }
    }
}
