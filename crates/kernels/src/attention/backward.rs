//! The backward pass: tiles of probabilities recomputed, five products on each.

use rayon::prelude::*;

use crate::lanes::{Element, simd_fn};
use crate::memory::with_scratch;
use crate::simd::Level;

use super::arithmetic::{Arithmetic, Widened, padded, square_words, whole_steps, widen};
use super::forward::{hull, row_blocks};
use super::pack::{Head, transpose, unpack_row};
use super::pairs::InBf16;
use super::tile::{Product, ProductFn};
use super::{Heads, Inputs, MOST_ROWS, SharedRows, Sizes, TILE_KEYS};

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
    run_all(InBf16::native::<T>(level, inputs.scale), Widened(level), inputs, saved, dq, dk, dv);
}

/// In bf16, if that is and every value that is met is finite: one that is not would meet rows that do not see it. Else
/// `widened`, all of it, so that no result depends on how the work was dealt.
pub(super) fn run_all<T: Element>(
    in_bf16: Option<InBf16>,
    widened: Widened,
    inputs: &Inputs<'_, T>,
    saved: &Saved<'_, T>,
    dq: &mut [T],
    dk: &mut [T],
    dv: &mut [T],
) {
    if inputs.sizes.tq == 0 {
        dk.fill(T::ZERO);
        return dv.fill(T::ZERO);
    }
    let run = Run { level: widened.0, dq: SharedRows::new(dq), dk: SharedRows::new(dk), dv: SharedRows::new(dv) };
    let done = match in_bf16 {
        Some(InBf16::Pairs(pairs)) => every_task(pairs, inputs, saved, run),
        Some(InBf16::Tiles(tiles)) => every_task(tiles, inputs, saved, run),
        None => false,
    };
    if !done {
        every_task(widened, inputs, saved, run);
    }
}

/// False as soon as a task is.
fn every_task<T: Element, A: Arithmetic<T>>(
    arithmetic: A,
    inputs: &Inputs<'_, T>,
    saved: &Saved<'_, T>,
    run: Run<T>,
) -> bool {
    let Sizes { b, tq, tk, g, .. } = inputs.sizes;
    let task = |head: Head, queries: (usize, usize), keys: (usize, usize), wanted: Wanted| {
        arithmetic.ready(|| task(arithmetic, inputs, saved, run, Part { head, queries, keys, wanted }))
    };
    let heads = b * g;
    let threads = rayon::current_num_threads();
    let tiles = tk.div_ceil(TILE_KEYS);
    // One task a head computes each tile once: 5 products. Where that would leave over 2 of 7 threads idle, queries and
    // keys are cut up on their own: 7 products, the same sums in the same order.
    if heads * 7 >= heads.div_ceil(threads) * threads * 5 {
        return (0..heads).into_par_iter().all(|at| {
            let head = Head { b: at / g, h: at % g };
            task(head, (0, tq), (0, tiles), Wanted { dq: true, dkv: true })
        });
    }
    let pieces = (4 * threads).div_ceil(heads.max(1)).max(1);
    let per_piece = tiles.div_ceil(pieces).max(1);
    let keys_done = (0..heads * tiles.div_ceil(per_piece)).into_par_iter().all(|at| {
        let (head, first) = (Head { b: at % heads / g, h: at % g }, at / heads * per_piece);
        let keys = (first, (first + per_piece).min(tiles));
        task(head, (0, tq), keys, Wanted { dq: false, dkv: true })
    });
    let per_piece = tq.div_ceil(pieces).max(A::ROWS).next_multiple_of(A::ROWS);
    keys_done
        && (0..heads * tq.div_ceil(per_piece)).into_par_iter().all(|at| {
            let (head, first) = (Head { b: at % heads / g, h: at % g }, at / heads * per_piece);
            let queries = (first, (first + per_piece).min(tq));
            task(head, queries, (0, tiles), Wanted { dq: true, dkv: false })
        })
}

#[derive(Clone, Copy)]
struct Run<T> {
    level: Level,
    dq: SharedRows<T>,
    dk: SharedRows<T>,
    dv: SharedRows<T>,
}

#[derive(Clone, Copy)]
struct Wanted {
    dq: bool,
    dkv: bool,
}

/// Queries `[t0, t1)` against key tiles `[first, last)`: the whole of `dk` and `dv` of these tiles if these are all queries,
/// the whole of `dq` of these queries if the tiles are all tiles.
#[derive(Clone, Copy)]
struct Part {
    head: Head,
    queries: (usize, usize),
    keys: (usize, usize),
    wanted: Wanted,
}

/// Query rows of all heads of a group, in words along the channels and of steps; row `i * stride + t` is query `t0 + t` of head
/// `i`.
struct Rows<'a> {
    q: &'a [f32],
    dout: &'a [f32],
    q_steps: &'a [f32],
    dout_steps: &'a [f32],
    /// Log-sum-exp in base 2, and `rowsum(dout out)`.
    lse: &'a [f32],
    delta: &'a [f32],
    finite: bool,
}

/// False if the arithmetic is in pairs and a value is not finite: what was written is then to be written again.
fn task<T: Element, A: Arithmetic<T>>(
    arithmetic: A,
    inputs: &Inputs<'_, T>,
    saved: &Saved<'_, T>,
    run: Run<T>,
    Part { head, queries: (t0, t1), keys: (first, last), wanted }: Part,
) -> bool {
    let Sizes { tq, tk, h, g, d, .. } = inputs.sizes;
    let (group, padded) = (inputs.sizes.group(), padded::<T, A>(d));
    let (queries, stride) = (t1 - t0, (t1 - t0).next_multiple_of(A::STEP));
    let (width, rows) = (padded / A::PER_WORD, group * stride);
    let tile = TILE_KEYS * width;
    let sums = TILE_KEYS * padded;
    let dq_len = if wanted.dq { rows * padded } else { 0 };
    let square = A::ROWS * TILE_KEYS;
    // Where words are values, rows serve as steps.
    let (steps, words) = (if A::PER_WORD > 1 { rows * width } else { 0 }, square_words(A::ROWS, A::PER_WORD));
    let (q, state) = (rows * width, 2 * rows);
    let lens = [q, q, steps, steps, state, dq_len, tile, tile, tile, sums, sums, square, square, words, words, words];
    with_scratch(lens, |parts| {
        let [q, dout, q_steps, dout_steps, state, dq, k_columns, v_columns, k_steps, dk, dv, squares @ ..] = parts;
        let [p, ds, p_steps, ds_steps, ds_words] = squares;
        let (lse, delta) = state.split_at_mut(rows);
        let packed = [&mut *q, &mut *dout, &mut *q_steps, &mut *dout_steps, &mut *lse, &mut *delta];
        let finite = pack_queries(arithmetic, inputs, saved, run.level, head, (t0, t1), packed);
        let (q_steps, dout_steps) = if A::PER_WORD > 1 { (&*q_steps, &*dout_steps) } else { (&*q, &*dout) };
        let rows_in = Rows { q, dout, q_steps, dout_steps, lse, delta, finite };
        let mut squares = Squares { p, ds, p_steps, ds_steps, ds_words };
        let (_, logit_factor) = arithmetic.factors(inputs.scale * std::f32::consts::LOG2_E);
        dq.fill(0.0);
        let (lo, hi) = inputs.union(head.b, t0, t1);
        for at in first..last {
            let (start, end) = (at * TILE_KEYS, ((at + 1) * TILE_KEYS).min(tk));
            dk.fill(0.0);
            dv.fill(0.0);
            if start < hi && lo < end {
                let v_finite = arithmetic.pack_rows(&inputs.v, head, (start, end), 1.0, k_steps, padded);
                transpose(k_steps, width, end - start, v_columns);
                let k_finite = arithmetic.pack_rows(&inputs.k, head, (start, end), 1.0, k_steps, padded);
                transpose(k_steps, width, end - start, k_columns);
                if A::PER_WORD > 1 {
                    if !(finite && v_finite && k_finite) {
                        return false;
                    }
                    arithmetic.pack_steps(&inputs.k, head, (start, end), k_steps, padded);
                }
                let keys = Keys { k_columns, v_columns, k_steps, finite: k_finite, d, padded, logit_factor };
                for (row, count, t) in row_blocks(A::ROWS, group, queries, stride) {
                    let mut spans = [(0, 0); MOST_ROWS];
                    for (span, t) in spans[..count].iter_mut().zip(t0 + t..) {
                        *span = inputs.span(head.b, t, start, end);
                    }
                    let spans = &spans[..count];
                    if hull(spans).is_none() {
                        continue;
                    }
                    probabilities(arithmetic, run.level, &keys, &rows_in, row, spans, &mut squares);
                    if wanted.dkv {
                        add_key_gradients(arithmetic, &rows_in, row, spans, padded, &squares, [&mut *dk, &mut *dv]);
                    }
                    if wanted.dq {
                        let held = count.next_multiple_of(A::ROW_STEP);
                        let dq = &mut dq[row * padded..(row + held) * padded];
                        add_query_gradients(arithmetic, &keys, spans, &squares, dq);
                    }
                }
            }
            if wanted.dkv {
                // Widened queries carry scale * log2(e).
                let dk_factor = if A::PER_WORD > 1 { inputs.scale } else { std::f32::consts::LN_2 };
                for (i, j) in (start..end).enumerate() {
                    let at = ((head.b * tk + j) * g + head.h) * d;
                    // SAFETY: this tile of this head is this task's own.
                    let (dk_out, dv_out) = unsafe { (run.dk.row(at, d), run.dv.row(at, d)) };
                    unpack_row(run.level, &dk[i * padded..(i + 1) * padded], dk_factor, dk_out);
                    unpack_row(run.level, &dv[i * padded..(i + 1) * padded], 1.0, dv_out);
                }
            }
        }
        if wanted.dq {
            for (i, sums) in dq.chunks_exact(stride * padded).enumerate() {
                for (t, sum) in (t0..t1).zip(sums.chunks_exact(padded)) {
                    // SAFETY: these queries of this head are this task's own.
                    let out = unsafe { run.dq.row(((head.b * tq + t) * h + head.h * group + i) * d, d) };
                    unpack_row(run.level, sum, inputs.scale, out);
                }
            }
        }
        true
    })
}

/// Packs `q` (times its part of scale and log2 e) and `dout`, and fills the two values of each row. True if all are finite.
fn pack_queries<T: Element, A: Arithmetic<T>>(
    arithmetic: A,
    inputs: &Inputs<'_, T>,
    saved: &Saved<'_, T>,
    level: Level,
    head: Head,
    (t0, t1): (usize, usize),
    [q, dout, q_steps, dout_steps, lse, delta]: [&mut [f32]; 6],
) -> bool {
    let Sizes { tq, h, d, .. } = inputs.sizes;
    let (group, padded) = (inputs.sizes.group(), padded::<T, A>(d));
    let (queries, stride) = (t1 - t0, (t1 - t0).next_multiple_of(A::STEP));
    let width = padded / A::PER_WORD;
    let (factor, _) = arithmetic.factors(inputs.scale * std::f32::consts::LOG2_E);
    let mut finite = true;
    for i in 0..group {
        let head = Head { b: head.b, h: head.h * group + i };
        let wide = i * stride * width..(i * stride + queries) * width;
        finite &= arithmetic.pack_rows(&inputs.q, head, (t0, t1), factor, &mut q[wide.clone()], padded);
        finite &= arithmetic.pack_rows(&saved.dout, head, (t0, t1), 1.0, &mut dout[wide], padded);
        if A::PER_WORD > 1 {
            let steps = i * stride * width..(i + 1) * stride * width;
            arithmetic.pack_steps(&inputs.q, head, (t0, t1), &mut q_steps[steps.clone()], padded);
            arithmetic.pack_steps(&saved.dout, head, (t0, t1), &mut dout_steps[steps], padded);
        }
        for (row, t) in (i * stride..).zip(t0..t1) {
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
    k_steps: &'a [f32],
    finite: bool,
    d: usize,
    padded: usize,
    logit_factor: f32,
}

/// `ROWS x TILE_KEYS` probabilities and gradients of logits, and the same in the forms that the products take them in.
struct Squares<'a> {
    p: &'a mut [f32],
    ds: &'a mut [f32],
    p_steps: &'a mut [f32],
    ds_steps: &'a mut [f32],
    ds_words: &'a mut [f32],
}

/// Fills the squares for the rows from `row` on, zero outside the spans.
fn probabilities<T: Element, A: Arithmetic<T>>(
    arithmetic: A,
    level: Level,
    keys: &Keys<'_>,
    rows: &Rows<'_>,
    row: usize,
    spans: &[(usize, usize)],
    squares: &mut Squares<'_>,
) {
    let Squares { p, ds, p_steps, ds_steps, ds_words } = squares;
    let (product, width) = (arithmetic.product(), keys.padded / A::PER_WORD);
    let count = spans.len();
    assert!((row + count.next_multiple_of(A::ROW_STEP)) * width <= rows.q.len() && rows.q.len() == rows.dout.len());
    assert!(p.len() == A::ROWS * TILE_KEYS && ds.len() == p.len() && count <= A::ROWS);
    let steps = keys.d.next_multiple_of(A::STEP) / A::PER_WORD;
    for (panel, spans) in spans.chunks(A::PANEL).enumerate() {
        let first = panel * A::PANEL;
        let columns = hull(spans).map_or((0, 0), widen::<T, A>);
        for (a, b, c) in [(rows.q, keys.k_columns, &mut *p), (rows.dout, keys.v_columns, &mut *ds)] {
            assert!(columns.1 <= TILE_KEYS && b.len() >= steps * TILE_KEYS);
            // SAFETY: the sizes were checked above.
            unsafe {
                product(Product {
                    m: spans.len().next_multiple_of(A::ROW_STEP),
                    n: columns.1 - columns.0,
                    k: steps,
                    a: a.as_ptr().add((row + first) * width),
                    a_row: width,
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
        let (p, ds) = (&mut p[wide.clone()], &mut ds[wide]);
        let (lse, delta) = (&rows.lse[span.clone()], &rows.delta[span]);
        gradients_of_logits(level, spans, columns, keys.logit_factor, lse, delta, p, ds);
    }
    if A::PER_WORD > 1 {
        let held = count.next_multiple_of(A::STEP) * TILE_KEYS;
        for (values, steps) in [(&mut *p, p_steps), (&mut *ds, ds_steps)] {
            values[count * TILE_KEYS..held].fill(0.0);
            arithmetic.steps(&values[..held], steps);
        }
        arithmetic.words(&ds[..count * TILE_KEYS], ds_words);
    }
}

simd_fn! {
    /// `p = 2^(factor s - lse)` and `ds = p (dp - delta)`, zero outside each row's span. `p` comes in as `s`, `ds` as `dp`.
    fn gradients_of_logits(
        s, spans: &[(usize, usize)], columns: (usize, usize), factor: f32, lse: &[f32], delta: &[f32], p: &mut [f32],
        ds: &mut [f32],
    ) {
        let scale = s.splat(factor);
        let rows = p.chunks_exact_mut(TILE_KEYS).zip(ds.chunks_exact_mut(TILE_KEYS));
        for (((p, ds), &(lo, hi)), (lse, delta)) in rows.zip(spans).zip(lse.iter().zip(delta)) {
            let (below, e) = (s.splat(-*lse), s.splat(*delta));
            if lo < hi {
                let inner = p[columns.0..columns.1].chunks_exact_mut(S::LANES);
                for (p, ds) in inner.zip(ds[columns.0..columns.1].chunks_exact_mut(S::LANES)) {
                    let probability = s.exp2(s.fma(s.load(p), scale, below));
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
fn add_key_gradients<T: Element, A: Arithmetic<T>>(
    arithmetic: A,
    rows: &Rows<'_>,
    row: usize,
    spans: &[(usize, usize)],
    padded: usize,
    squares: &Squares<'_>,
    [dk, dv]: [&mut [f32]; 2],
) {
    let product = arithmetic.product();
    let (p, ds) = if A::PER_WORD > 1 { (&*squares.p_steps, &*squares.ds_steps) } else { (&*squares.p, &*squares.ds) };
    for (a, b, c) in [(p, rows.dout_steps, dv), (ds, rows.q_steps, dk)] {
        assert!(a.len() >= A::ROWS / A::PER_WORD * TILE_KEYS && c.len() == TILE_KEYS * padded);
        assert!(row.is_multiple_of(A::PER_WORD));
        let first = row / A::PER_WORD;
        assert!((first + spans.len().next_multiple_of(A::STEP) / A::PER_WORD) * padded <= b.len());
        let mut add = |(key, end): (usize, usize), (i0, i1): (usize, usize)| {
            assert!(end <= TILE_KEYS && i1 <= spans.len());
            // Steps at the ends hold rows outside as well, for which `p` and `ds` are zero.
            let (i0, i1) = whole_steps::<T, A>((i0, i1));
            let (w0, w1) = (i0 / A::PER_WORD, i1 / A::PER_WORD);
            let (a_row, a_col) = A::TURNED;
            // SAFETY: the sizes were checked above.
            unsafe {
                product(Product {
                    m: end - key,
                    n: padded,
                    k: w1 - w0,
                    a: a.as_ptr().add(w0 * a_col + key * a_row),
                    a_row,
                    a_col,
                    b: b.as_ptr().add((first + w0) * padded),
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
        for key in (0..TILE_KEYS).step_by(A::PANEL) {
            let end = (key + A::PANEL).min(TILE_KEYS);
            let sees = |span: &&(usize, usize)| span.0 < end && key < span.1;
            let Some(i0) = spans.iter().position(|s| sees(&s)) else { continue };
            let i1 = spans.iter().rposition(|s| sees(&s)).map_or(i0, |i| i + 1);
            add((key, end), (i0, i1));
        }
    }
}

/// `dq += ds k` for rows with the given spans.
fn add_query_gradients<T: Element, A: Arithmetic<T>>(
    arithmetic: A,
    keys: &Keys<'_>,
    spans: &[(usize, usize)],
    squares: &Squares<'_>,
    dq: &mut [f32],
) {
    let (product, padded, pitch): (ProductFn, _, _) = (arithmetic.product(), keys.padded, TILE_KEYS / A::PER_WORD);
    let ds = if A::PER_WORD > 1 { &*squares.ds_words } else { &*squares.ds };
    assert!(ds.len() == A::ROWS * pitch && dq.len() == spans.len().next_multiple_of(A::ROW_STEP) * padded);
    for (panel, spans) in spans.chunks(A::PANEL).enumerate() {
        let Some(hull) = hull(spans) else { continue };
        let first = panel * A::PANEL;
        let mut add = |row: usize, rows: usize, (k0, k1): (usize, usize)| {
            let (k0, k1) = whole_steps::<T, A>((k0, k1));
            let (w0, w1) = (k0 / A::PER_WORD, k1 / A::PER_WORD);
            assert!(w1 <= pitch && keys.k_steps.len() == pitch * padded);
            // SAFETY: the sizes were checked above.
            unsafe {
                product(Product {
                    m: rows,
                    n: padded,
                    k: w1 - w0,
                    a: ds.as_ptr().add(row * pitch + w0),
                    a_row: pitch,
                    a_col: 1,
                    b: keys.k_steps.as_ptr().add(w0 * padded),
                    ldb: padded,
                    c: dq.as_mut_ptr().add(row * padded),
                    ldc: padded,
                    fresh: false,
                });
            }
        };
        if keys.finite || spans.iter().all(|span| *span == hull) {
            add(first, spans.len().next_multiple_of(A::ROW_STEP), hull);
        } else {
            spans.iter().enumerate().filter(|(_, s)| s.0 < s.1).for_each(|(i, s)| add(first + i, 1, *s));
        }
    }
}
