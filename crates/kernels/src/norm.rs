//! RMSNorm and LayerNorm over rows of `c` channels, forward and backward. All arithmetic is in f32.

use rayon::prelude::*;

use crate::lanes::{Element, simd_fn};
use crate::simd::Level;

/// Most partial sums that the weight gradients are kept in; rows are dealt to them in order, whatever the threads.
const MAX_PARTS: usize = 64;
const MIN_ROWS_PER_PART: usize = 16;

simd_fn! {
    fn rms_rows[T: Element](s, x: &[T], weight: &[T], eps: f32, y: &mut [T], rstd: &mut [f32]) {
        let c = weight.len();
        for ((x, y), rstd) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)).zip(rstd) {
            let mut squares = s.splat(0.0);
            let mut i = 0;
            while i < c {
                let v = T::load_part(s, &x[i..(i + S::LANES).min(c)]);
                squares = s.fma(v, v, squares);
                i += S::LANES;
            }
            *rstd = 1.0 / (s.sum(squares) / c as f32 + eps).sqrt();
            let r = s.splat(*rstd);
            let mut i = 0;
            while i + S::LANES <= c {
                let v = s.mul(s.mul(T::load(s, &x[i..]), r), T::load(s, &weight[i..]));
                T::store(s, v, &mut y[i..]);
                i += S::LANES;
            }
            if i < c {
                let v = s.mul(s.mul(T::load_part(s, &x[i..]), r), T::load_part(s, &weight[i..]));
                T::store_part(s, v, &mut y[i..]);
            }
        }
    }
}

simd_fn! {
    fn layer_rows[T: Element](s, x: &[T], weight: &[T], bias: Option<&[T]>, eps: f32, y: &mut [T], stats: &mut [[f32; 2]]) {
        let c = weight.len();
        for ((x, y), stat) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)).zip(stats) {
            let mut total = s.splat(0.0);
            let mut i = 0;
            while i < c {
                total = s.add(total, T::load_part(s, &x[i..(i + S::LANES).min(c)]));
                i += S::LANES;
            }
            let mean = s.sum(total) / c as f32;
            let m = s.splat(mean);
            // Deviations first, squares after: no cancellation for rows far from zero.
            let mut squares = s.splat(0.0);
            let mut i = 0;
            while i + S::LANES <= c {
                let d = s.sub(T::load(s, &x[i..]), m);
                squares = s.fma(d, d, squares);
                i += S::LANES;
            }
            let mut sum = s.sum(squares);
            for v in &x[i..] {
                sum += (v.to_f32() - mean) * (v.to_f32() - mean);
            }
            let rstd = 1.0 / (sum / c as f32 + eps).sqrt();
            *stat = [mean, rstd];
            let r = s.splat(rstd);
            let mut i = 0;
            while i < c {
                let end = (i + S::LANES).min(c);
                let normal = s.mul(s.sub(T::load_part(s, &x[i..end]), m), r);
                let scaled = s.mul(normal, T::load_part(s, &weight[i..end]));
                let shifted = match bias {
                    Some(bias) => s.add(scaled, T::load_part(s, &bias[i..end])),
                    None => scaled,
                };
                T::store_part(s, shifted, &mut y[i..end]);
                i = end;
            }
        }
    }
}

simd_fn! {
    /// One part of the rows: `dx` (where wanted), and sums for the weight and bias gradients (where wanted).
    fn backward_rows[T: Element](
        s, x: &[T], weight: &[T], dy: &[T], stats: Stats<'_>, dx: Option<&mut [T]>,
        dweight: Option<&mut [f32]>, dbias: Option<&mut [f32]>,
    ) {
        let c = weight.len();
        let (mut dx, mut dweight, mut dbias) = (dx, dweight, dbias);
        for (row, (x, dy)) in x.chunks_exact(c).zip(dy.chunks_exact(c)).enumerate() {
            let (mean, rstd) = stats.row(row);
            let (m, r) = (s.splat(mean), s.splat(rstd));
            if let Some(dx) = dx.as_deref_mut() {
                let dx = &mut dx[row * c..(row + 1) * c];
                let mut project = s.splat(0.0);
                let mut total = s.splat(0.0);
                let mut i = 0;
                while i < c {
                    let end = (i + S::LANES).min(c);
                    let g = s.mul(T::load_part(s, &dy[i..end]), T::load_part(s, &weight[i..end]));
                    // Lanes past the end have g = 0.
                    let normal = s.mul(s.sub(T::load_part(s, &x[i..end]), m), r);
                    project = s.fma(g, normal, project);
                    total = s.add(g, total);
                    i = end;
                }
                let p = s.splat(s.sum(project) / c as f32);
                let t = s.splat(if stats.centred() { s.sum(total) / c as f32 } else { 0.0 });
                let mut i = 0;
                while i < c {
                    let end = (i + S::LANES).min(c);
                    let g = s.mul(T::load_part(s, &dy[i..end]), T::load_part(s, &weight[i..end]));
                    let normal = s.mul(s.sub(T::load_part(s, &x[i..end]), m), r);
                    let v = s.mul(r, s.fnma(normal, p, s.sub(g, t)));
                    T::store_part(s, v, &mut dx[i..end]);
                    i = end;
                }
            }
            if let Some(dweight) = dweight.as_deref_mut() {
                let mut i = 0;
                while i < c {
                    let end = (i + S::LANES).min(c);
                    let normal = s.mul(s.sub(T::load_part(s, &x[i..end]), m), r);
                    let sum = s.fma(T::load_part(s, &dy[i..end]), normal, f32::load_part(s, &dweight[i..end]));
                    f32::store_part(s, sum, &mut dweight[i..end]);
                    i = end;
                }
            }
            if let Some(dbias) = dbias.as_deref_mut() {
                let mut i = 0;
                while i < c {
                    let end = (i + S::LANES).min(c);
                    let sum = s.add(T::load_part(s, &dy[i..end]), f32::load_part(s, &dbias[i..end]));
                    f32::store_part(s, sum, &mut dbias[i..end]);
                    i = end;
                }
            }
        }
    }
}

/// What the forward pass keeps of each row.
#[derive(Clone, Copy, Debug)]
pub enum Stats<'a> {
    /// RMSNorm: `1 / sqrt(mean(x^2) + eps)`.
    Rms(&'a [f32]),
    /// LayerNorm: mean and `1 / sqrt(var(x) + eps)`.
    Layer(&'a [[f32; 2]]),
}

impl<'a> Stats<'a> {
    fn len(self) -> usize {
        match self {
            Stats::Rms(rstd) => rstd.len(),
            Stats::Layer(stats) => stats.len(),
        }
    }

    fn rows(self, start: usize, end: usize) -> Stats<'a> {
        match self {
            Stats::Rms(rstd) => Stats::Rms(&rstd[start..end]),
            Stats::Layer(stats) => Stats::Layer(&stats[start..end]),
        }
    }

    #[inline(always)]
    fn row(self, i: usize) -> (f32, f32) {
        match self {
            Stats::Rms(rstd) => (0.0, rstd[i]),
            Stats::Layer(stats) => (stats[i][0], stats[i][1]),
        }
    }

    #[inline(always)]
    fn centred(self) -> bool {
        matches!(self, Stats::Layer(_))
    }
}

/// Rows for one task, about 16 Ki values.
fn rows_per_task(c: usize) -> usize {
    (crate::elementwise::CHUNK / c.max(1)).max(1)
}

/// `y = x rstd weight` with `rstd = 1 / sqrt(mean(x^2) + eps)` for each row (Zhang and Sennrich 2019).
/// `x`, `y`: `rows * c` values; `weight`: `c`; `rstd`: `rows`.
///
/// # Panics
/// If the lengths do not fit or `c` is 0.
pub fn rms_norm<T: Element>(level: Level, x: &[T], weight: &[T], eps: f32, y: &mut [T], rstd: &mut [f32]) {
    let c = weight.len();
    assert!(c > 0 && x.len() == rstd.len() * c && y.len() == x.len());
    let rows = rows_per_task(c);
    y.par_chunks_mut(rows * c)
        .zip(x.par_chunks(rows * c))
        .zip(rstd.par_chunks_mut(rows))
        .for_each(|((y, x), rstd)| rms_rows(level, x, weight, eps, y, rstd));
}

/// `y = (x - mean) rstd weight + bias` for each row (Ba et al. 2016); `stats` receives mean and rstd.
///
/// # Panics
/// If the lengths do not fit or `c` is 0.
pub fn layer_norm<T: Element>(
    level: Level,
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    eps: f32,
    y: &mut [T],
    stats: &mut [[f32; 2]],
) {
    let c = weight.len();
    assert!(c > 0 && x.len() == stats.len() * c && y.len() == x.len() && bias.is_none_or(|b| b.len() == c));
    let rows = rows_per_task(c);
    y.par_chunks_mut(rows * c)
        .zip(x.par_chunks(rows * c))
        .zip(stats.par_chunks_mut(rows))
        .for_each(|((y, x), stats)| layer_rows(level, x, weight, bias, eps, y, stats));
}

/// Gradients of both norms. `dx` is overwritten; `dweight` and `dbias` are added to, in f32. Each is computed only
/// where it is given. The sums run over parts of the rows in a fixed order, so they do not depend on the threads.
///
/// # Panics
/// If the lengths do not fit or `c` is 0.
#[allow(clippy::too_many_arguments)]
pub fn norm_backward<T: Element>(
    level: Level,
    x: &[T],
    weight: &[T],
    dy: &[T],
    stats: Stats<'_>,
    dx: Option<&mut [T]>,
    dweight: Option<&mut [f32]>,
    dbias: Option<&mut [f32]>,
) {
    let c = weight.len();
    let num_rows = stats.len();
    assert!(c > 0 && x.len() == num_rows * c && dy.len() == x.len());
    assert!(dx.as_ref().is_none_or(|d| d.len() == x.len()));
    assert!([&dweight, &dbias].into_iter().all(|d| d.as_ref().is_none_or(|d| d.len() == c)));
    let rows = num_rows.div_ceil(MAX_PARTS).max(MIN_ROWS_PER_PART);
    let num_parts = num_rows.div_ceil(rows);
    let mut dweight_parts = vec![0.0; if dweight.is_some() { num_parts * c } else { 0 }];
    let mut dbias_parts = vec![0.0; if dbias.is_some() { num_parts * c } else { 0 }];
    let mut dx_parts = per_part(dx, rows * c, num_parts);
    let mut dw = per_part(dweight.is_some().then_some(&mut dweight_parts[..]), c, num_parts);
    let mut db = per_part(dbias.is_some().then_some(&mut dbias_parts[..]), c, num_parts);
    dx_parts.par_iter_mut().zip(dw.par_iter_mut().zip(db.par_iter_mut())).enumerate().for_each(
        |(part, (dx, (dw, db)))| {
            let (start, end) = (part * rows, ((part + 1) * rows).min(num_rows));
            let span = start * c..end * c;
            let stats = stats.rows(start, end);
            backward_rows(level, &x[span.clone()], weight, &dy[span], stats, dx.take(), dw.take(), db.take());
        },
    );
    for (sum, parts) in [(dweight, &dweight_parts), (dbias, &dbias_parts)] {
        if let Some(sum) = sum {
            for part in parts.chunks_exact(c) {
                sum.iter_mut().zip(part).for_each(|(sum, v)| *sum += v);
            }
        }
    }
}

/// `num_parts` pieces of `size` (the last may be shorter), or as many `None`.
fn per_part<T>(whole: Option<&mut [T]>, size: usize, num_parts: usize) -> Vec<Option<&mut [T]>> {
    match whole {
        Some(whole) => whole.chunks_mut(size).map(Some).collect(),
        None => (0..num_parts).map(|_| None).collect(),
    }
}
