//! The forward pass: online softmax over key tiles.

use rayon::prelude::*;

use crate::lanes::{Element, simd_fn};
use crate::memory::with_scratch;
use crate::simd::Level;

use super::pack::{Head, pack_rows, transpose, unpack_row};
use super::tile::{Product, ProductFn, product};
use super::{Inputs, PANEL, SharedRows, Sizes, TILE_KEYS, TILE_ROWS, decode};

/// Query rows (over all heads of a group) that one task carries through the keys.
const TASK_ROWS: usize = 256;

/// `out[b, t, h] = softmax(scale q k^T) v` over the keys that each query sees, heads of `q` in groups over the heads of
/// `k` and `v`. `out`: `[b, tq, h, d]`, contiguous. `lse`: `[b, h, tq]`, receives the natural logarithm of the sum of
/// exponentials of each row. A query without keys gets zeros and minus infinity.
///
/// # Panics
/// If the sizes do not fit each other.
pub fn attention_forward<T: Element>(level: Level, inputs: &Inputs<'_, T>, out: &mut [T], lse: &mut [f32]) {
    inputs.check();
    let Sizes { b, tq, h, g, d, .. } = inputs.sizes;
    assert!(out.len() == b * tq * h * d && lse.len() == b * h * tq);
    let group = inputs.sizes.group();
    if tq * group <= decode::MAX_ROWS {
        return decode::attend(level, inputs, out, lse);
    }
    let run = Run { level, product: product(level), out: SharedRows::new(out), lse: SharedRows::new(lse) };
    let queries = queries_per_task(b * g, tq, group);
    let blocks = tq.div_ceil(queries);
    (0..b * g * blocks).into_par_iter().for_each(|task| {
        // Late blocks see most keys under a causal mask: they go first.
        let block = blocks - 1 - task / (b * g);
        let (ib, ig) = (task % (b * g) / g, task % g);
        let t0 = block * queries;
        forward_task(inputs, run, Head { b: ib, h: ig }, t0, (t0 + queries).min(tq));
    });
}

/// As many as fill a task, fewer where that would leave threads idle. Results do not depend on it.
fn queries_per_task(heads: usize, tq: usize, group: usize) -> usize {
    let most = (TASK_ROWS / group).max(1);
    let wanted = 3 * rayon::current_num_threads();
    let blocks = wanted.div_ceil(heads).max(tq.div_ceil(most));
    let least = TILE_ROWS.div_ceil(group);
    tq.div_ceil(blocks).max(least).next_multiple_of(PANEL).min(tq)
}

#[derive(Clone, Copy)]
struct Run<T> {
    level: Level,
    product: ProductFn,
    out: SharedRows<T>,
    lse: SharedRows<f32>,
}

/// Queries `[t0, t1)` of all heads of one group. Row `i * (t1 - t0) + t` of the scratch is query `t0 + t` of head `i`.
fn forward_task<T: Element>(inputs: &Inputs<'_, T>, run: Run<T>, head: Head, t0: usize, t1: usize) {
    let Sizes { tq, tk, h, d, .. } = inputs.sizes;
    let (group, padded) = (inputs.sizes.group(), inputs.sizes.padded());
    let queries = t1 - t0;
    let rows = group * queries;
    let tile = TILE_KEYS * padded;
    let lens = [rows * padded, rows * padded, 2 * rows, tile, tile, TILE_ROWS * TILE_KEYS];
    with_scratch(lens, |[q, o, state, k_columns, v_rows, s]| {
        for (i, q) in q.chunks_exact_mut(queries * padded).enumerate() {
            let head = Head { b: head.b, h: head.h * group + i };
            let factor = inputs.scale * std::f32::consts::LOG2_E;
            pack_rows(run.level, &inputs.q, head, (t0, t1), factor, q, padded);
        }
        o.fill(0.0);
        let (peak, total) = state.split_at_mut(rows);
        peak.fill(f32::NEG_INFINITY);
        total.fill(0.0);
        let (lo, hi) = inputs.union(head.b, t0, t1);
        let mut start = lo / TILE_KEYS * TILE_KEYS;
        while start < hi {
            let end = (start + TILE_KEYS).min(tk);
            // The rows of `k` are only needed until they are turned: `v` takes their place.
            pack_rows(run.level, &inputs.k, head, (start, end), 1.0, v_rows, padded);
            transpose(v_rows, padded, end - start, k_columns);
            let finite = pack_rows(run.level, &inputs.v, head, (start, end), 1.0, v_rows, padded);
            let tile = KeyTile { k_columns, v_rows, finite, d, padded };
            for (row, count, t) in row_blocks(group, queries) {
                let mut spans = [(0, 0); TILE_ROWS];
                for (span, t) in spans[..count].iter_mut().zip(t0 + t..) {
                    *span = inputs.span(head.b, t, start, end);
                }
                let block = RowBlock {
                    spans: &spans[..count],
                    q: &q[row * padded..(row + count) * padded],
                    o: &mut o[row * padded..(row + count) * padded],
                    peak: &mut peak[row..row + count],
                    total: &mut total[row..row + count],
                };
                attend_tile(run.level, run.product, &tile, block, s);
            }
            start = end;
        }
        for row in 0..rows {
            let (ih, t) = (head.h * group + row / queries, t0 + row % queries);
            // SAFETY: the rows of this head and these queries are this task's own.
            let (out, lse) = unsafe {
                (run.out.row(((head.b * tq + t) * h + ih) * d, d), run.lse.row((head.b * h + ih) * tq + t, 1))
            };
            finish_row(run.level, &o[row * padded..(row + 1) * padded], peak[row], total[row], out, &mut lse[0]);
        }
    });
}

/// Blocks of at most `TILE_ROWS` rows, within one head each: first row, number of rows, first query.
pub(super) fn row_blocks(group: usize, queries: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..group).flat_map(move |i| {
        (0..queries).step_by(TILE_ROWS).map(move |t| (i * queries + t, TILE_ROWS.min(queries - t), t))
    })
}

/// Divides by the sum of exponentials. `peak` is in base 2; a row without keys (`total` is 0) stays zero.
pub(super) fn finish_row<T: Element>(level: Level, o: &[f32], peak: f32, total: f32, out: &mut [T], lse: &mut f32) {
    let factor = if total == 0.0 { 0.0 } else { 1.0 / total };
    *lse = if total == 0.0 { f32::NEG_INFINITY } else { peak * std::f32::consts::LN_2 + total.ln() };
    unpack_row(level, o, factor, out);
}

struct KeyTile<'a> {
    k_columns: &'a [f32],
    v_rows: &'a [f32],
    finite: bool,
    d: usize,
    padded: usize,
}

/// Up to `TILE_ROWS` query rows with what the online softmax carries.
struct RowBlock<'a> {
    spans: &'a [(usize, usize)],
    q: &'a [f32],
    o: &'a mut [f32],
    peak: &'a mut [f32],
    total: &'a mut [f32],
}

/// Smallest interval that holds all spans; `None` if all are empty.
pub(super) fn hull(spans: &[(usize, usize)]) -> Option<(usize, usize)> {
    let (lo, hi) = spans
        .iter()
        .filter(|(lo, hi)| lo < hi)
        .fold((usize::MAX, 0), |(lo, hi), span| (lo.min(span.0), hi.max(span.1)));
    (lo < hi).then_some((lo, hi))
}

/// Columns `[lo, hi)` widened to whole vectors of any instruction set.
pub(super) fn widen((lo, hi): (usize, usize)) -> (usize, usize) {
    (lo / 16 * 16, hi.next_multiple_of(16))
}

fn attend_tile(level: Level, product: ProductFn, tile: &KeyTile<'_>, block: RowBlock<'_>, s: &mut [f32]) {
    let padded = tile.padded;
    let RowBlock { spans, q, o, peak, total } = block;
    for (panel, spans) in spans.chunks(PANEL).enumerate() {
        let Some(columns) = hull(spans).map(widen) else { continue };
        let first = panel * PANEL;
        assert!(
            columns.1 <= TILE_KEYS && (first + spans.len()) * padded <= q.len() && s.len() >= TILE_ROWS * TILE_KEYS
        );
        // SAFETY: `q` has these rows of `padded >= d` values, `k_columns` has `d` rows of TILE_KEYS, `s` has TILE_ROWS.
        unsafe {
            product(Product {
                m: spans.len(),
                n: columns.1 - columns.0,
                k: tile.d,
                a: q.as_ptr().add(first * padded),
                a_row: padded,
                a_col: 1,
                b: tile.k_columns.as_ptr().add(columns.0),
                ldb: TILE_KEYS,
                c: s.as_mut_ptr().add(first * TILE_KEYS + columns.0),
                ldc: TILE_KEYS,
                fresh: true,
            });
        }
        softmax_panel(level, spans, columns, &mut s[first * TILE_KEYS..], &mut peak[first..], &mut total[first..], {
            &mut o[first * padded..(first + spans.len()) * padded]
        });
    }
    for (panel, spans) in spans.chunks(PANEL).enumerate() {
        let Some(keys) = hull(spans) else { continue };
        let first = panel * PANEL;
        let mut add = |row: usize, rows: usize, (k0, k1): (usize, usize)| {
            assert!(k1 <= TILE_KEYS && (row + rows) * padded <= o.len() && tile.v_rows.len() == TILE_KEYS * padded);
            // SAFETY: `s` has these rows of TILE_KEYS, `v_rows` has TILE_KEYS rows and `o` these rows of `padded`.
            unsafe {
                product(Product {
                    m: rows,
                    n: padded,
                    k: k1 - k0,
                    a: s.as_ptr().add(row * TILE_KEYS + k0),
                    a_row: TILE_KEYS,
                    a_col: 1,
                    b: tile.v_rows.as_ptr().add(k0 * padded),
                    ldb: padded,
                    c: o.as_mut_ptr().add(row * padded),
                    ldc: padded,
                    fresh: false,
                });
            }
        };
        if tile.finite || spans.iter().all(|span| *span == keys) {
            add(first, spans.len(), keys);
        } else {
            // Zero times infinity is NaN: each row by itself, over its own keys.
            spans.iter().enumerate().filter(|(_, span)| span.0 < span.1).for_each(|(i, span)| add(first + i, 1, *span));
        }
    }
}

simd_fn! {
    /// Turns logits (base 2) of a panel into exponentials, zero outside each row's span, and carries maximum and sum;
    /// rows of `o` shrink where the maximum grew.
    fn softmax_panel(
        s, spans: &[(usize, usize)], columns: (usize, usize), logits: &mut [f32], peak: &mut [f32], total: &mut [f32],
        o: &mut [f32],
    ) {
        let padded = o.len() / spans.len();
        for (i, &(lo, hi)) in spans.iter().enumerate() {
            let row = &mut logits[i * TILE_KEYS..(i + 1) * TILE_KEYS][columns.0..columns.1];
            let (lo, hi) = (lo.max(columns.0) - columns.0, hi.max(columns.0) - columns.0);
            if lo >= hi {
                row.fill(0.0);
                continue;
            }
            row[..lo].fill(f32::NEG_INFINITY);
            row[hi..].fill(f32::NEG_INFINITY);
            let mut most = s.splat(peak[i]);
            for v in row.chunks_exact(S::LANES) {
                most = s.max(s.load(v), most);
            }
            let most = s.max_lane(most);
            let m = s.splat(most);
            let mut sum = s.splat(0.0);
            for v in row.chunks_exact_mut(S::LANES) {
                let e = s.exp2(s.sub(s.load(v), m));
                sum = s.add(sum, e);
                s.store(e, v);
            }
            row[..lo].fill(0.0);
            row[hi..].fill(0.0);
            let sum = s.sum(sum);
            if most == peak[i] {
                total[i] += sum;
                continue;
            }
            let before = std::mem::replace(&mut peak[i], most);
            if total[i] == 0.0 {
                total[i] = sum;
                continue;
            }
            let factor = s.exp2(s.splat(before - most));
            total[i] = total[i] * s.first(factor) + sum;
            for v in o[i * padded..(i + 1) * padded].chunks_exact_mut(S::LANES) {
                let scaled = s.mul(s.load(v), factor);
                s.store(scaled, v);
            }
        }
    }
}
