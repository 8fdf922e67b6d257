//! The forward pass: online softmax over key tiles.

use rayon::prelude::*;

use crate::lanes::{Element, simd_fn};
use crate::memory::with_scratch;
use crate::simd::Level;

use super::arithmetic::{Arithmetic, Widened, padded, square_words, whole_steps, widen};
use super::pack::{Head, transpose, unpack_row};
use super::pairs::InBf16;
use super::tile::Product;
use super::{Inputs, MOST_ROWS, SharedRows, Sizes, TILE_KEYS, decode};

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
    let Sizes { b, tq, h, d, .. } = inputs.sizes;
    assert!(out.len() == b * tq * h * d && lse.len() == b * h * tq);
    let group = inputs.sizes.group();
    if tq * group <= decode::MAX_ROWS {
        return decode::attend(level, inputs, out, lse);
    }
    run_all(InBf16::native::<T>(level, inputs.scale), Widened(level), inputs, out, lse);
}

/// In bf16, if that is and every value that is met is finite: one that is not would meet rows that do not see it. Else
/// `widened`, all of it, so that no result depends on how the work was dealt.
pub(super) fn run_all<T: Element>(
    in_bf16: Option<InBf16>,
    widened: Widened,
    inputs: &Inputs<'_, T>,
    out: &mut [T],
    lse: &mut [f32],
) {
    let run = Run { level: widened.0, out: SharedRows::new(out), lse: SharedRows::new(lse) };
    let done = match in_bf16 {
        Some(InBf16::Pairs(pairs)) => every_task(pairs, inputs, run),
        Some(InBf16::Tiles(tiles)) => every_task(tiles, inputs, run),
        None => false,
    };
    if !done {
        every_task(widened, inputs, run);
    }
}

/// False as soon as a task is.
fn every_task<T: Element, A: Arithmetic<T>>(arithmetic: A, inputs: &Inputs<'_, T>, run: Run<T>) -> bool {
    let Sizes { b, tq, g, .. } = inputs.sizes;
    let queries = queries_per_task::<T, A>(b * g, tq, inputs.sizes.group());
    let blocks = tq.div_ceil(queries);
    (0..b * g * blocks).into_par_iter().all(|task| {
        // Late blocks see most keys under a causal mask: they go first.
        let block = blocks - 1 - task / (b * g);
        let (ib, ig) = (task % (b * g) / g, task % g);
        let t0 = block * queries;
        let (head, t1) = (Head { b: ib, h: ig }, (t0 + queries).min(tq));
        arithmetic.ready(|| forward_task(arithmetic, inputs, run, head, t0, t1))
    })
}

/// As many as fill a task, fewer where that would leave threads idle. Results do not depend on it.
fn queries_per_task<T: Element, A: Arithmetic<T>>(heads: usize, tq: usize, group: usize) -> usize {
    let most = (TASK_ROWS / group).max(1);
    let wanted = 3 * rayon::current_num_threads();
    let blocks = wanted.div_ceil(heads).max(tq.div_ceil(most));
    let least = A::ROWS.div_ceil(group);
    tq.div_ceil(blocks).max(least).next_multiple_of(A::PANEL).min(tq)
}

#[derive(Clone, Copy)]
struct Run<T> {
    level: Level,
    out: SharedRows<T>,
    lse: SharedRows<f32>,
}

/// Queries `[t0, t1)` of all heads of one group. Row `i * stride + t` of the scratch is query `t0 + t` of head `i`. False,
/// with nothing written, if the arithmetic is in pairs and a value is not finite.
fn forward_task<T: Element, A: Arithmetic<T>>(
    arithmetic: A,
    inputs: &Inputs<'_, T>,
    run: Run<T>,
    head: Head,
    t0: usize,
    t1: usize,
) -> bool {
    let Sizes { tq, tk, h, d, .. } = inputs.sizes;
    let (group, padded) = (inputs.sizes.group(), padded::<T, A>(d));
    let (queries, stride) = (t1 - t0, (t1 - t0).next_multiple_of(A::STEP));
    let rows = group * stride;
    let width = padded / A::PER_WORD;
    let tile = TILE_KEYS * width;
    let (factor, logit_factor) = arithmetic.factors(inputs.scale * std::f32::consts::LOG2_E);
    let words = square_words(A::ROWS, A::PER_WORD);
    let lens = [rows * width, rows * padded, 2 * rows, tile, tile, A::ROWS * TILE_KEYS, words];
    with_scratch(lens, |[q, o, state, k_columns, v_steps, s, p]| {
        let mut finite = true;
        for (i, q) in q.chunks_exact_mut(stride * width).enumerate() {
            let head = Head { b: head.b, h: head.h * group + i };
            finite &= arithmetic.pack_rows(&inputs.q, head, (t0, t1), factor, q, padded);
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
            finite &= arithmetic.pack_rows(&inputs.k, head, (start, end), 1.0, v_steps, padded);
            transpose(v_steps, width, end - start, k_columns);
            let v_finite = arithmetic.pack_steps(&inputs.v, head, (start, end), v_steps, padded);
            if A::PER_WORD > 1 && !(finite && v_finite) {
                return false;
            }
            let tile = KeyTile { k_columns, v_steps, finite: v_finite, d, padded, logit_factor };
            for (row, count, t) in row_blocks(A::ROWS, group, queries, stride) {
                let (mut spans, held) = ([(0, 0); MOST_ROWS], count.next_multiple_of(A::ROW_STEP));
                for (span, t) in spans[..count].iter_mut().zip(t0 + t..) {
                    *span = inputs.span(head.b, t, start, end);
                }
                let block = RowBlock {
                    spans: &spans[..count],
                    q: &q[row * width..(row + held) * width],
                    o: &mut o[row * padded..(row + held) * padded],
                    peak: &mut peak[row..row + count],
                    total: &mut total[row..row + count],
                };
                attend_tile(run.level, arithmetic, &tile, block, s, p);
            }
            start = end;
        }
        for (i, t) in (0..group).flat_map(|i| (t0..t1).map(move |t| (i, t))) {
            let (row, ih) = (i * stride + t - t0, head.h * group + i);
            // SAFETY: the rows of this head and these queries are this task's own.
            let (out, lse) = unsafe {
                (run.out.row(((head.b * tq + t) * h + ih) * d, d), run.lse.row((head.b * h + ih) * tq + t, 1))
            };
            finish_row(run.level, &o[row * padded..(row + 1) * padded], peak[row], total[row], out, &mut lse[0]);
        }
        true
    })
}

/// Blocks of at most `most` rows, within one head each, whose first rows are `stride` apart: first row, number of rows,
/// first query.
pub(super) fn row_blocks(
    most: usize,
    group: usize,
    queries: usize,
    stride: usize,
) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..group).flat_map(move |i| (0..queries).step_by(most).map(move |t| (i * stride + t, most.min(queries - t), t)))
}

/// Divides by the sum of exponentials. `peak` is in base 2; a row without keys (`total` is 0) stays zero.
pub(super) fn finish_row<T: Element>(level: Level, o: &[f32], peak: f32, total: f32, out: &mut [T], lse: &mut f32) {
    let factor = if total == 0.0 { 0.0 } else { 1.0 / total };
    *lse = if total == 0.0 { f32::NEG_INFINITY } else { peak * std::f32::consts::LN_2 + total.ln() };
    unpack_row(level, o, factor, out);
}

struct KeyTile<'a> {
    k_columns: &'a [f32],
    v_steps: &'a [f32],
    finite: bool,
    d: usize,
    padded: usize,
    logit_factor: f32,
}

/// Query rows, one for each span, with what the online softmax carries.
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

fn attend_tile<T: Element, A: Arithmetic<T>>(
    level: Level,
    arithmetic: A,
    tile: &KeyTile<'_>,
    block: RowBlock<'_>,
    s: &mut [f32],
    words: &mut [f32],
) {
    let (product, padded) = (arithmetic.product(), tile.padded);
    let (width, pitch) = (padded / A::PER_WORD, TILE_KEYS / A::PER_WORD);
    let RowBlock { spans, q, o, peak, total } = block;
    for (panel, spans) in spans.chunks(A::PANEL).enumerate() {
        let Some(columns) = hull(spans).map(widen::<T, A>) else { continue };
        let (first, held) = (panel * A::PANEL, spans.len().next_multiple_of(A::ROW_STEP));
        assert!(columns.1 <= TILE_KEYS && (first + held) * width <= q.len() && s.len() >= A::ROWS * TILE_KEYS);
        assert!(tile.k_columns.len() == TILE_KEYS * width && tile.d <= padded);
        // SAFETY: `q` has these rows of `width >= d / PER_WORD` words, `k_columns` has `width` rows of TILE_KEYS, `s` has
        // `ROWS`.
        unsafe {
            product(Product {
                m: held,
                n: columns.1 - columns.0,
                k: tile.d.next_multiple_of(A::STEP) / A::PER_WORD,
                a: q.as_ptr().add(first * width),
                a_row: width,
                a_col: 1,
                b: tile.k_columns.as_ptr().add(columns.0),
                ldb: TILE_KEYS,
                c: s.as_mut_ptr().add(first * TILE_KEYS + columns.0),
                ldc: TILE_KEYS,
                fresh: true,
            });
        }
        softmax_panel(
            level,
            spans,
            columns,
            tile.logit_factor,
            &mut s[first * TILE_KEYS..],
            &mut peak[first..],
            &mut total[first..],
            &mut o[first * padded..(first + spans.len()) * padded],
        );
        if A::PER_WORD > 1 {
            arithmetic.words(&s[first * TILE_KEYS..(first + spans.len()) * TILE_KEYS], &mut words[first * pitch..]);
        }
    }
    let p = if A::PER_WORD > 1 { &*words } else { &*s };
    for (panel, spans) in spans.chunks(A::PANEL).enumerate() {
        let Some(keys) = hull(spans) else { continue };
        let first = panel * A::PANEL;
        let mut add = |row: usize, rows: usize, (k0, k1): (usize, usize)| {
            // Steps at the ends hold keys outside as well, for which `p` is zero.
            let (k0, k1) = whole_steps::<T, A>((k0, k1));
            let (w0, w1) = (k0 / A::PER_WORD, k1 / A::PER_WORD);
            assert!(w1 <= pitch && (row + rows) * padded <= o.len() && tile.v_steps.len() == pitch * padded);
            assert!((row + rows) * pitch <= p.len());
            // SAFETY: `p` has these rows of `pitch` words, `v_steps` has `pitch` rows and `o` these rows of `padded`.
            unsafe {
                product(Product {
                    m: rows,
                    n: padded,
                    k: w1 - w0,
                    a: p.as_ptr().add(row * pitch + w0),
                    a_row: pitch,
                    a_col: 1,
                    b: tile.v_steps.as_ptr().add(w0 * padded),
                    ldb: padded,
                    c: o.as_mut_ptr().add(row * padded),
                    ldc: padded,
                    fresh: false,
                });
            }
        };
        if tile.finite || spans.iter().all(|span| *span == keys) {
            add(first, spans.len().next_multiple_of(A::ROW_STEP), keys);
        } else {
            // Zero times infinity is NaN: each row by itself, over its own keys.
            spans.iter().enumerate().filter(|(_, span)| span.0 < span.1).for_each(|(i, span)| add(first + i, 1, *span));
        }
    }
}

simd_fn! {
    /// Turns logits (base 2, but for `factor`) of a panel into exponentials, zero outside each row's span, and carries maximum and sum;
    /// rows of `o` shrink where the maximum grew.
    fn softmax_panel(
        s, spans: &[(usize, usize)], columns: (usize, usize), factor: f32, logits: &mut [f32], peak: &mut [f32],
        total: &mut [f32], o: &mut [f32],
    ) {
        let (padded, scale) = (o.len() / spans.len(), s.splat(factor));
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
                most = s.max(s.mul(s.load(v), scale), most);
            }
            let most = s.max_lane(most);
            let below = s.splat(-most);
            let mut sum = s.splat(0.0);
            for v in row.chunks_exact_mut(S::LANES) {
                let e = s.exp2(s.fma(s.load(v), scale, below));
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
