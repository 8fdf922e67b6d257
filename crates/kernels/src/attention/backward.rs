//! The backward pass: tiles of probabilities recomputed, five products on each.

use rayon::prelude::*;

use crate::lanes::{Element, simd_fn};
use crate::memory::with_scratch;
use crate::simd::Level;

use super::forward::{hull, row_blocks, widen};
use super::pack::{Head, pack_rows, transpose, unpack_row};
use super::tile::{Product, ProductFn, product};
use super::{Heads, Inputs, PANEL, SharedRows, Sizes, TILE_KEYS, TILE_ROWS};

/// What the forward pass left, and the gradient of its result.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a, T> {
    /// The result, `[b, tq, h, d]`.
    pub out: Heads<'a, T>,
    /// Gradient of the result, `[b, tq, h, d]`.
    pub dout: Heads<'a, T>,
    /// `[b, h, tq]`, from the forward pass.
    pub lse: &'a [f32],
}

/// Gradients of `q [b, tq, h, d]`, `k` and `v` `[b, tk, g, d]`, all contiguous and overwritten. With
/// `p = softmax(scale q k^T)` and `ds = p (dout v^T - rowsum(dout out))`: `dv = p^T dout`, `dk = scale ds^T q`,
/// `dq = scale ds k`.
///
/// # Panics
/// If the sizes do not fit each other.
pub fn attention_backward<T: Element>(
    level: Level,
    inputs: &Inputs<'_, T>,
    saved: &Saved<'_, T>,
    dq: &mut [T],
    dk: &mut [T],
    dv: &mut [T],
) {
    inputs.check();
    let Sizes { b, tq, tk, h, g, d } = inputs.sizes;
    assert!(saved.out.dims == inputs.q.dims && saved.dout.dims == inputs.q.dims && saved.lse.len() == b * h * tq);
    assert!(dq.len() == b * tq * h * d && dk.len() == b * tk * g * d && dv.len() == dk.len());
    let run = Run {
        level,
        product: product(level),
        dq: SharedRows::new(dq),
        dk: SharedRows::new(dk),
        dv: SharedRows::new(dv),
    };
    let heads = b * g;
    let threads = rayon::current_num_threads();
    let tiles = tk.div_ceil(TILE_KEYS);
    // One task a head computes each tile once: 5 products. Where that would leave over 2 of 7 threads idle, queries and
    // keys are cut up on their own: 7 products, the same sums in the same order.
    if heads * 7 >= heads.div_ceil(threads) * threads * 5 {
        (0..heads).into_par_iter().for_each(|at| {
            let head = Head { b: at / g, h: at % g };
            task(inputs, saved, run, head, (0, tq), (0, tiles), Wanted { dq: true, dkv: true });
        });
        return;
    }
    let pieces = (4 * threads).div_ceil(heads.max(1)).max(1);
    let per_piece = tiles.div_ceil(pieces).max(1);
    (0..heads * tiles.div_ceil(per_piece)).into_par_iter().for_each(|at| {
        let (head, first) = (Head { b: at % heads / g, h: at % g }, at / heads * per_piece);
        let keys = (first, (first + per_piece).min(tiles));
        task(inputs, saved, run, head, (0, tq), keys, Wanted { dq: false, dkv: true });
    });
    let per_piece = tq.div_ceil(pieces).max(TILE_ROWS).next_multiple_of(TILE_ROWS);
    (0..heads * tq.div_ceil(per_piece)).into_par_iter().for_each(|at| {
        let (head, first) = (Head { b: at % heads / g, h: at % g }, at / heads * per_piece);
        let queries = (first, (first + per_piece).min(tq));
        task(inputs, saved, run, head, queries, (0, tiles), Wanted { dq: true, dkv: false });
    });
}

#[derive(Clone, Copy)]
struct Run<T> {
    level: Level,
    product: ProductFn,
    dq: SharedRows<T>,
    dk: SharedRows<T>,
    dv: SharedRows<T>,
}

#[derive(Clone, Copy)]
struct Wanted {
    dq: bool,
    dkv: bool,
}

/// Query rows of all heads of a group, widened; row `i * queries + t` is query `t0 + t` of head `i`.
struct Rows<'a> {
    q: &'a [f32],
    dout: &'a [f32],
    /// Log-sum-exp in base 2, and `rowsum(dout out)`.
    lse: &'a [f32],
    delta: &'a [f32],
    finite: bool,
}

/// Queries `[t0, t1)` against key tiles `[first, last)`: the whole of `dk` and `dv` of these tiles if `t0..t1` are all
/// queries, the whole of `dq` of these queries if the tiles are all tiles.
fn task<T: Element>(
    inputs: &Inputs<'_, T>,
    saved: &Saved<'_, T>,
    run: Run<T>,
    head: Head,
    (t0, t1): (usize, usize),
    (first, last): (usize, usize),
    wanted: Wanted,
) {
    let Sizes { tq, tk, h, g, d, .. } = inputs.sizes;
    let (group, padded) = (inputs.sizes.group(), inputs.sizes.padded());
    let queries = t1 - t0;
    let rows = group * queries;
    let tile = TILE_KEYS * padded;
    let dq_len = if wanted.dq { rows * padded } else { 0 };
    let square = TILE_ROWS * TILE_KEYS;
    let lens = [rows * padded, rows * padded, 2 * rows, dq_len, tile, tile, tile, tile, tile, square, square];
    with_scratch(lens, |[q, dout, state, dq, k_columns, v_columns, k_rows, dk, dv, p, ds]| {
        let (lse, delta) = state.split_at_mut(rows);
        let finite =
            pack_queries(inputs, saved, run.level, head, (t0, t1), [&mut *q, &mut *dout, &mut *lse, &mut *delta]);
        let rows_in = Rows { q, dout, lse, delta, finite };
        dq.fill(0.0);
        let (lo, hi) = inputs.union(head.b, t0, t1);
        for at in first..last {
            let (start, end) = (at * TILE_KEYS, ((at + 1) * TILE_KEYS).min(tk));
            dk.fill(0.0);
            dv.fill(0.0);
            if start < hi && lo < end {
                pack_rows(run.level, &inputs.v, head, (start, end), 1.0, k_rows, padded);
                transpose(k_rows, padded, end - start, v_columns);
                let k_finite = pack_rows(run.level, &inputs.k, head, (start, end), 1.0, k_rows, padded);
                transpose(k_rows, padded, end - start, k_columns);
                let keys = Keys { k_columns, v_columns, k_rows, finite: k_finite, d, padded };
                for (row, count, t) in row_blocks(group, queries) {
                    let mut spans = [(0, 0); TILE_ROWS];
                    for (span, t) in spans[..count].iter_mut().zip(t0 + t..) {
                        *span = inputs.span(head.b, t, start, end);
                    }
                    let spans = &spans[..count];
                    if hull(spans).is_none() {
                        continue;
                    }
                    probabilities(run, &keys, &rows_in, row, spans, p, ds);
                    if wanted.dkv {
                        let (squares, sums) = ([&*p, &*ds], [&mut *dk, &mut *dv]);
                        add_key_gradients(run.product, &rows_in, row, spans, padded, squares, sums);
                    }
                    if wanted.dq {
                        add_query_gradients(
                            run.product,
                            &keys,
                            spans,
                            ds,
                            &mut dq[row * padded..(row + count) * padded],
                        );
                    }
                }
            }
            if wanted.dkv {
                for (i, j) in (start..end).enumerate() {
                    let at = ((head.b * tk + j) * g + head.h) * d;
                    // SAFETY: this tile of this head is this task's own.
                    let (dk_out, dv_out) = unsafe { (run.dk.row(at, d), run.dv.row(at, d)) };
                    // The packed queries carry scale * log2(e).
                    unpack_row(run.level, &dk[i * padded..(i + 1) * padded], std::f32::consts::LN_2, dk_out);
                    unpack_row(run.level, &dv[i * padded..(i + 1) * padded], 1.0, dv_out);
                }
            }
        }
        if wanted.dq {
            for (row, sum) in dq.chunks_exact(padded).enumerate() {
                let (ih, t) = (head.h * group + row / queries, t0 + row % queries);
                // SAFETY: these queries of this head are this task's own.
                let out = unsafe { run.dq.row(((head.b * tq + t) * h + ih) * d, d) };
                unpack_row(run.level, sum, inputs.scale, out);
            }
        }
    });
}

/// Packs `q` (times scale and log2 e) and `dout`, and fills the two values of each row. True if all are finite.
fn pack_queries<T: Element>(
    inputs: &Inputs<'_, T>,
    saved: &Saved<'_, T>,
    level: Level,
    head: Head,
    (t0, t1): (usize, usize),
    [q, dout, lse, delta]: [&mut [f32]; 4],
) -> bool {
    let Sizes { tq, h, .. } = inputs.sizes;
    let (group, padded) = (inputs.sizes.group(), inputs.sizes.padded());
    let queries = t1 - t0;
    let mut finite = true;
    for i in 0..group {
        let head = Head { b: head.b, h: head.h * group + i };
        let span = i * queries..(i + 1) * queries;
        let wide = span.start * padded..span.end * padded;
        let factor = inputs.scale * std::f32::consts::LOG2_E;
        finite &= pack_rows(level, &inputs.q, head, (t0, t1), factor, &mut q[wide.clone()], padded);
        finite &= pack_rows(level, &saved.dout, head, (t0, t1), 1.0, &mut dout[wide], padded);
        for (row, t) in span.zip(t0..t1) {
            lse[row] = saved.lse[(head.b * h + head.h) * tq + t] * std::f32::consts::LOG2_E;
            delta[row] = dot(level, saved.out.row(head.b, t, head.h), saved.dout.row(head.b, t, head.h));
        }
    }
    finite
}

simd_fn! {
    fn dot[T: Element](s, a: &[T], b: &[T]) -> f32 {
        let mut sum = s.splat(0.0);
        let mut i = 0;
        while i < a.len() {
            let end = (i + S::LANES).min(a.len());
            sum = s.fma(T::load_part(s, &a[i..end]), T::load_part(s, &b[i..end]), sum);
            i = end;
        }
        s.sum(sum)
    }
}

struct Keys<'a> {
    k_columns: &'a [f32],
    v_columns: &'a [f32],
    k_rows: &'a [f32],
    finite: bool,
    d: usize,
    padded: usize,
}

/// Fills `p` and `ds` (`TILE_ROWS x TILE_KEYS`) for the rows from `row` on, zero outside the spans.
fn probabilities<T>(
    run: Run<T>,
    keys: &Keys<'_>,
    rows: &Rows<'_>,
    row: usize,
    spans: &[(usize, usize)],
    p: &mut [f32],
    ds: &mut [f32],
) {
    let padded = keys.padded;
    assert!((row + spans.len()) * padded <= rows.q.len() && rows.q.len() == rows.dout.len());
    assert!(p.len() == TILE_ROWS * TILE_KEYS && ds.len() == p.len() && spans.len() <= TILE_ROWS);
    for (panel, spans) in spans.chunks(PANEL).enumerate() {
        let first = panel * PANEL;
        let columns = hull(spans).map_or((0, 0), widen);
        for (a, b, c) in [(rows.q, keys.k_columns, &mut *p), (rows.dout, keys.v_columns, &mut *ds)] {
            assert!(columns.1 <= TILE_KEYS && b.len() >= keys.d * TILE_KEYS);
            // SAFETY: the sizes were checked above.
            unsafe {
                (run.product)(Product {
                    m: spans.len(),
                    n: columns.1 - columns.0,
                    k: keys.d,
                    a: a.as_ptr().add((row + first) * padded),
                    a_row: padded,
                    a_col: 1,
                    b: b.as_ptr().add(columns.0),
                    ldb: TILE_KEYS,
                    c: c.as_mut_ptr().add(first * TILE_KEYS + columns.0),
                    ldc: TILE_KEYS,
                    fresh: true,
                });
            }
        }
        let span = row + first..row + first + spans.len();
        let wide = first * TILE_KEYS..(first + spans.len()) * TILE_KEYS;
        gradients_of_logits(
            run.level,
            spans,
            columns,
            &rows.lse[span.clone()],
            &rows.delta[span],
            &mut p[wide.clone()],
            &mut ds[wide],
        );
    }
}

simd_fn! {
    /// `p = 2^(s - lse)` and `ds = p (dp - delta)`, zero outside each row's span. `p` comes in as `s`, `ds` as `dp`.
    fn gradients_of_logits(
        s, spans: &[(usize, usize)], columns: (usize, usize), lse: &[f32], delta: &[f32], p: &mut [f32], ds: &mut [f32],
    ) {
        let rows = p.chunks_exact_mut(TILE_KEYS).zip(ds.chunks_exact_mut(TILE_KEYS));
        for (((p, ds), &(lo, hi)), (lse, delta)) in rows.zip(spans).zip(lse.iter().zip(delta)) {
            let (l, e) = (s.splat(*lse), s.splat(*delta));
            if lo < hi {
                let inner = p[columns.0..columns.1].chunks_exact_mut(S::LANES);
                for (p, ds) in inner.zip(ds[columns.0..columns.1].chunks_exact_mut(S::LANES)) {
                    let probability = s.exp2(s.sub(s.load(p), l));
                    let gradient = s.mul(probability, s.sub(s.load(ds), e));
                    s.store(probability, p);
                    s.store(gradient, ds);
                }
            }
            for row in [p, ds] {
                row[..lo].fill(0.0);
                row[hi..].fill(0.0);
            }
        }
    }
}

/// `dv += p^T dout` and `dk += ds^T q` for the keys that any of the rows sees.
fn add_key_gradients(
    product: ProductFn,
    rows: &Rows<'_>,
    row: usize,
    spans: &[(usize, usize)],
    padded: usize,
    [p, ds]: [&[f32]; 2],
    [dk, dv]: [&mut [f32]; 2],
) {
    for (a, b, c) in [(p, rows.dout, dv), (ds, rows.q, dk)] {
        assert!(a.len() == TILE_ROWS * TILE_KEYS && c.len() == TILE_KEYS * padded);
        assert!((row + spans.len()) * padded <= b.len());
        let mut add = |(key, end): (usize, usize), (i0, i1): (usize, usize)| {
            assert!(end <= TILE_KEYS && i1 <= spans.len());
            // SAFETY: the sizes were checked above.
            unsafe {
                product(Product {
                    m: end - key,
                    n: padded,
                    k: i1 - i0,
                    a: a.as_ptr().add(i0 * TILE_KEYS + key),
                    a_row: 1,
                    a_col: TILE_KEYS,
                    b: b.as_ptr().add((row + i0) * padded),
                    ldb: padded,
                    c: c.as_mut_ptr().add(key * padded),
                    ldc: padded,
                    fresh: false,
                });
            }
        };
        if !rows.finite {
            // Zero times infinity is NaN: each row by itself, to the keys that it sees.
            spans.iter().enumerate().filter(|(_, s)| s.0 < s.1).for_each(|(i, s)| add(*s, (i, i + 1)));
            continue;
        }
        for key in (0..TILE_KEYS).step_by(PANEL) {
            let end = (key + PANEL).min(TILE_KEYS);
            let sees = |span: &&(usize, usize)| span.0 < end && key < span.1;
            let Some(i0) = spans.iter().position(|s| sees(&s)) else { continue };
            let i1 = spans.iter().rposition(|s| sees(&s)).map_or(i0, |i| i + 1);
            add((key, end), (i0, i1));
        }
    }
}

/// `dq += ds k` for rows with the given spans.
fn add_query_gradients(product: ProductFn, keys: &Keys<'_>, spans: &[(usize, usize)], ds: &[f32], dq: &mut [f32]) {
    let padded = keys.padded;
    assert!(ds.len() == TILE_ROWS * TILE_KEYS && dq.len() == spans.len() * padded);
    for (panel, spans) in spans.chunks(PANEL).enumerate() {
        let Some(hull) = hull(spans) else { continue };
        let first = panel * PANEL;
        let mut add = |row: usize, rows: usize, (k0, k1): (usize, usize)| {
            assert!(k1 <= TILE_KEYS && keys.k_rows.len() == TILE_KEYS * padded);
            // SAFETY: the sizes were checked above.
            unsafe {
                product(Product {
                    m: rows,
                    n: padded,
                    k: k1 - k0,
                    a: ds.as_ptr().add(row * TILE_KEYS + k0),
                    a_row: TILE_KEYS,
                    a_col: 1,
                    b: keys.k_rows.as_ptr().add(k0 * padded),
                    ldb: padded,
                    c: dq.as_mut_ptr().add(row * padded),
                    ldc: padded,
                    fresh: false,
                });
            }
        };
        if keys.finite || spans.iter().all(|span| *span == hull) {
            add(first, spans.len(), hull);
        } else {
            spans.iter().enumerate().filter(|(_, s)| s.0 < s.1).for_each(|(i, s)| add(first + i, 1, *s));
        }
    }
}
