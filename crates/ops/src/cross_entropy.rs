//! [`linear_cross_entropy`]: head and loss in one, without logits of tokens x vocabulary; [`logprobs_top`] likewise.

use candle_core::{CpuStorage, DType, Result, Tensor, bail};
use rayon::prelude::*;
use tallow_kernels::cross_entropy::{self as kernels, Factors, Rows};
use tallow_kernels::memory::unspecified;
use tallow_kernels::simd;

use crate::gradients::{Backward, Gradients, Saved, Saves};
use crate::head_rows::{HeadRows, unpacked_rows};
use crate::operand::{Scalar, check_dtype, mutate, on_cpu, view, with_dtype};
use crate::tape::{composed_of, dense, finish, is_tracked};
use crate::trace::{self, Cost};
use crate::{ReplacedRows, Table, Weight, reference};

/// The target of a position that predicts nothing.
pub const IGNORE_INDEX: u32 = u32::MAX;

/// Bytes of f32 logits that exist at once, where that makes more rows than [`CHUNK_ROWS`].
const CHUNK_BYTES: usize = 4 << 20;

/// Rows of logits that exist at once at least: for each chunk the head is read twice, and the sum of its gradient too.
const CHUNK_ROWS: usize = 512;

/// What [`linear_cross_entropy`] computes.
#[derive(Clone, Debug, PartialEq)]
pub struct CrossEntropyOptions {
    /// Factor of the loss: one over the targets of the whole step, for its mean.
    pub scale: f64,
    /// Weight of `lse^2` (PaLM, Chowdhery et al. 2022, section 5), which keeps logits from drifting; 0 is none.
    pub z_loss: f64,
    /// The part of each target that is spread evenly over the vocabulary (Szegedy et al. 2016); 0 is none.
    pub label_smoothing: f64,
    /// Positions with this target add nothing.
    pub ignore_index: u32,
    /// Rows of logits at once; `None` chooses by the vocabulary.
    pub chunk: Option<usize>,
}

impl Default for CrossEntropyOptions {
    fn default() -> Self {
        Self { scale: 1.0, z_loss: 0.0, label_smoothing: 0.0, ignore_index: IGNORE_INDEX, chunk: None }
    }
}

/// What is to be predicted, and how much each of it counts.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// `[n]` u32.
    pub ids: &'a Tensor,
    /// `n` weights, finite and not negative; none for 1 each.
    pub weights: Option<&'a [f32]>,
}

impl<'a> From<&'a Tensor> for Targets<'a> {
    fn from(ids: &'a Tensor) -> Self {
        Self { ids, weights: None }
    }
}

/// What [`linear_cross_entropy`] gives.
pub struct CrossEntropy {
    /// `scale * sum of w ((1 - s) nll + s (lse - mean logit) + z_loss lse^2)`, f32 `[]`, on the tape.
    pub loss: Tensor,
    /// Sum of `w nll` in nats, without scale, smoothing and z-loss.
    pub nll_sum: f64,
    /// Sum of the weights of targets that are not ignored; their number where none is given.
    pub weight_sum: f64,
    /// Targets that are not ignored.
    pub num_targets: usize,
}

/// `scale * sum over i of w_i ((1 - s) (lse_i - logit_i[target_i]) + s (lse_i - mean of logit_i) + z lse_i^2)` with
/// `logits = x W^T`, `lse` their log-sum-exp, `s` the label smoothing.
///
/// `x [n, c]` and `W`, the table `[v, c]`, of one dtype, f32 or bf16; target ids `[n]` u32. Logits are f32, a chunk of rows at a
/// time.
///
/// **Terminal.** The gradients of `x` and of a weight with a slot are computed here, while a chunk's logits exist, and the
/// slot has received its own when this returns. Backward must start from the loss itself: any other gradient than 1
/// arriving there is an error where a slot was added to.
///
/// # Errors
/// If a target is neither ignored nor below `v`, a weight or the smoothing is out of range, or shapes, dtypes or devices do
/// not fit.
pub fn linear_cross_entropy<'a, 'b>(
    x: &Tensor,
    table: impl Into<Table<'b>>,
    targets: impl Into<Targets<'a>>,
    options: &CrossEntropyOptions,
) -> Result<CrossEntropy> {
    let (table, targets) = (table.into(), targets.into());
    let (n, c, v) = check("linear_cross_entropy", x, table)?;
    if targets.ids.dims() != [n] || targets.ids.dtype() != DType::U32 {
        bail!("linear_cross_entropy: x {:?} needs u32 targets [{n}], got {:?}", x.shape(), targets.ids.shape())
    }
    let ids = targets.ids.to_vec1::<u32>()?;
    check_targets(&ids, v, options.ignore_index)?;
    if let Some(weights) = targets.weights {
        if weights.len() != n {
            bail!("linear_cross_entropy: {} weights for {n} targets", weights.len())
        }
        if let Some(i) = weights.iter().position(|w| !(w.is_finite() && *w >= 0.0)) {
            bail!("linear_cross_entropy: weight {} at index {i} is not finite and at least 0", weights[i])
        }
    }
    if !(0.0..1.0).contains(&options.label_smoothing) {
        bail!("linear_cross_entropy: label smoothing {} is not in [0, 1)", options.label_smoothing)
    }
    if !on_cpu(x) {
        let mut made = None;
        let loss = composed_of("linear-cross-entropy", &[x], |x| {
            let made_of = reference::linear_cross_entropy(&x[0], &table.composed()?, targets, options)?;
            made = Some((made_of.nll_sum, made_of.weight_sum, made_of.num_targets));
            Ok(made_of.loss)
        })?;
        let (nll_sum, weight_sum, num_targets) = made.unwrap_or_default();
        return Ok(CrossEntropy { loss, nll_sum, weight_sum, num_targets });
    }
    let chunk = options.chunk.unwrap_or_else(|| chunk_rows(v)).clamp(1, n.max(1));
    let job = Job { n, c, v, targets: &ids, weights: targets.weights, chunk, options };
    let x = dense(x)?;
    let _span = trace::op("linear-cross-entropy", || {
        let products = if is_tracked(&x) || table.weight.needs_grad() { 6.0 } else { 2.0 };
        let size = x.dtype().size_in_bytes();
        Cost { flops: products * (n * c) as f64 * v as f64, bytes: (2 * size * n * c + (size + 8) * v * c) as f64 }
    });
    with_dtype!("linear_cross_entropy", x.dtype(), T => job.run::<T>(&x, table))
}

fn check(op: &str, x: &Tensor, table: Table) -> Result<(usize, usize, usize)> {
    let weight = table.weight;
    let (xs, ws) = (x.shape(), weight.shape());
    let (&[n, c], &[v, width]) = (xs.dims(), ws.dims()) else {
        bail!("{op}: expected x [n, c] and a weight [v, c], got {xs:?} and {ws:?}")
    };
    if c != width || c == 0 || v == 0 {
        bail!("{op}: expected x [n, c] and a weight [v, c], got {xs:?} and {ws:?}")
    }
    check_dtype(op, x.dtype())?;
    if x.dtype() != weight.dtype() || !x.device().same_device(weight.device()) {
        bail!("{op}: x {:?} and weight {:?} must share dtype and device", x.dtype(), weight.dtype())
    }
    table.check(op)?;
    Ok((n, c, v))
}

fn check_targets(targets: &[u32], v: usize, ignore: u32) -> Result<()> {
    match targets.iter().position(|&t| t != ignore && t as usize >= v) {
        Some(at) => bail!("target {} at index {at} is not below the {v} rows of the head", targets[at]),
        None => Ok(()),
    }
}

fn chunk_rows(v: usize) -> usize {
    (CHUNK_BYTES / (4 * v)).next_multiple_of(64).max(CHUNK_ROWS)
}

/// Bytes that [`linear_cross_entropy`] holds at its worst moment besides its result, for `tokens` rows of `hidden` channels
/// in `dtype`. On a CPU without bf16 products the head and the gradient of the logits are widened as well. Of a `packed` head
/// some rows are unpacked at a time.
pub fn cross_entropy_workspace(tokens: usize, hidden: usize, vocab: usize, dtype: DType, packed: bool) -> usize {
    let rows = chunk_rows(vocab).min(tokens);
    let (logits, some) = (rows * vocab, unpacked_rows(vocab, hidden));
    let unpacked = if packed { some * (hidden * dtype.size_in_bytes() + 8 * rows) + 4 * rows * hidden } else { 0 };
    unpacked
        + match dtype {
            DType::BF16 if tallow_kernels::peak::native_bf16() => 4 * logits,
            DType::BF16 if packed => 4 * logits + 4 * some * (hidden + rows),
            DType::BF16 => 8 * logits + 4 * vocab * hidden,
            _ => 4 * logits,
        }
}

struct Job<'a> {
    n: usize,
    c: usize,
    v: usize,
    targets: &'a [u32],
    weights: Option<&'a [f32]>,
    chunk: usize,
    options: &'a CrossEntropyOptions,
}

/// The sums over all rows.
#[derive(Default)]
struct Sums {
    nll: f64,
    /// Of `lse - mean logit`.
    spread: f64,
    lse_squares: f64,
    weights: f64,
    targets: usize,
}

impl Job<'_> {
    fn run<T: Scalar>(&self, x: &Tensor, table: Table) -> Result<CrossEntropy> {
        HeadRows::<T>::with(table, |head| self.run_with(x, table, head))
    }

    fn run_with<T: Scalar>(&self, x: &Tensor, table: Table, head: &HeadRows<T>) -> Result<CrossEntropy> {
        let (xs, xl) = x.storage_and_layout();
        let x_values = view::<T>(&xs, xl)?;
        let mut dx = is_tracked(x).then(|| unspecified(self.n * self.c));
        let weight = table.weight;
        let rows = table.replaced.map(ReplacedRows::rows);
        let mut drows = rows.filter(|rows| rows.needs_grad()).map(|rows| vec![0f32; rows.shape().elem_count()]);
        let (sums, dw) = match (weight.needs_grad(), weight.grad()) {
            (true, Some(slot)) => {
                let drows = drows.as_deref_mut();
                let sums = mutate(slot, |dw| self.chunks(x_values, head, dx.as_deref_mut(), Some(dw), drows))?;
                (sums, None)
            }
            (true, _) => {
                let mut dw = vec![0f32; self.v * self.c];
                let sums = self.chunks(x_values, head, dx.as_deref_mut(), Some(&mut dw), drows.as_deref_mut())?;
                (sums, Some(dw))
            }
            (false, _) => (self.chunks(x_values, head, dx.as_deref_mut(), None, drows.as_deref_mut())?, None),
        };
        if let (Some(slot), Some(drows)) = (rows.and_then(Weight::grad), &drows) {
            mutate(slot, |sum: &mut [f32]| {
                sum.iter_mut().zip(drows).for_each(|(sum, x)| *sum += x);
                Ok(())
            })?;
        }
        let weights: Vec<Weight> = table.weights().cloned().collect();
        let slot_is_added_to = weights.iter().any(|weight| weight.grad().is_some() && weight.needs_grad());
        let on_tape =
            |sum: Option<Vec<f32>>, of: Option<&Weight>| sum.filter(|_| of.is_some_and(|w| w.grad().is_none()));
        let sums_on_tape = [on_tape(dw, Some(weight)), on_tape(drows, rows)];
        let &CrossEntropyOptions { scale, z_loss, label_smoothing: s, .. } = self.options;
        let value = scale * ((1.0 - s) * sums.nll + s * sums.spread + z_loss * sums.lse_squares);
        let dx = dx.map(|dx| Tensor::from_vec(dx, x.shape(), x.device())).transpose()?;
        let op = Loss { weights, dx, sums_on_tape, slot_is_added_to };
        let loss = finish(op, &[x], CpuStorage::F32(vec![value as f32]), ())?;
        Ok(CrossEntropy { loss, nll_sum: sums.nll, weight_sum: sums.weights, num_targets: sums.targets })
    }

    fn chunks<T: Scalar>(
        &self,
        x: &[T],
        head: &HeadRows<T>,
        mut dx: Option<&mut [T]>,
        mut dw: Option<&mut [f32]>,
        mut drows: Option<&mut [f32]>,
    ) -> Result<Sums> {
        let (level, &Self { n, c, v, chunk, options, .. }) = (simd::level(), self);
        let mut logits = unspecified(chunk.min(n) * v);
        let mut losses = vec![kernels::RowLoss::default(); chunk.min(n)];
        let mut sums = Sums::default();
        for start in (0..n).step_by(chunk.max(1)) {
            let rows = chunk.min(n - start);
            let targets = &self.targets[start..start + rows];
            let (x, logits, losses) = (&x[start * c..][..rows * c], &mut logits[..rows * v], &mut losses[..rows]);
            head.logits((rows, c, v), x, logits)?;
            let smoothed = options.label_smoothing > 0.0;
            let weights = self.weights.map(|weights| &weights[start..start + rows]);
            kernels::row_losses(level, logits, v, (targets, options.ignore_index), smoothed, losses);
            for (i, loss) in losses.iter().enumerate().filter(|(i, _)| targets[*i] != options.ignore_index) {
                let (w, lse) = (weights.map_or(1.0, |weights| f64::from(weights[i])), f64::from(loss.lse));
                sums.nll += w * (lse - f64::from(loss.target));
                sums.spread += w * (lse - f64::from(loss.mean));
                sums.lse_squares += w * lse.powi(2);
                sums.weights += w;
                sums.targets += 1;
            }
            if dx.is_none() && dw.is_none() && drows.is_none() {
                continue;
            }
            let factors = Factors {
                scale: options.scale as f32,
                z_loss: options.z_loss as f32,
                smoothing: options.label_smoothing as f32,
            };
            let rows_of = Rows { level, v, targets, ignore: options.ignore_index, losses, weights, factors };
            let kernels::LogitGradient { values: g, pitch } = T::logit_gradients(&rows_of, logits);
            let apart = head.take_apart(g, pitch);
            if let Some(dx) = dx.as_deref_mut() {
                head.input_gradient((rows, c, v), (g, pitch), apart.as_ref(), &mut dx[start * c..][..rows * c])?;
            }
            if let (Some(drows), Some(apart)) = (drows.as_deref_mut(), &apart) {
                head.rows_gradient((rows, c), apart, x, drows);
            }
            if let Some(dw) = dw.as_deref_mut() {
                T::tn_add_pitched(v, c, rows, (g, pitch), x, dw);
            }
        }
        Ok(sums)
    }
}

/// The gradients that were computed with the loss.
struct Loss {
    /// The matrix, and the rows that stand in for some of its.
    weights: Vec<Weight>,
    dx: Option<Tensor>,
    /// Of each that is on candle's tape.
    sums_on_tape: [Option<Vec<f32>>; 2],
    slot_is_added_to: bool,
}

impl Backward for Loss {
    fn name(&self) -> &'static str {
        "linear-cross-entropy"
    }

    fn weights(&self) -> Vec<&Weight> {
        self.weights.iter().collect()
    }

    fn saves(&self) -> Saves {
        Saves::Nothing
    }

    fn has_given_already(&self) -> bool {
        self.slot_is_added_to
    }

    fn cost(&self) -> Cost {
        Cost::default()
    }

    fn backward(&self, _: Saved<'_>, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        let dy = dy.to_scalar::<f32>()?;
        if dy != 1.0 && self.slot_is_added_to {
            bail!(
                "linear_cross_entropy: its backward must start from the loss, but a gradient of {dy} arrived there: \
                 put factors into CrossEntropyOptions::scale"
            )
        }
        if let Some(dx) = self.dx.as_ref().filter(|_| grads.wants(0)) {
            // Held here as well, so it is not the slot's own.
            let dx = if dy == 1.0 { dx.clone() } else { (dx * f64::from(dy))? };
            grads.pass(0, &dx)?;
        }
        for (i, dw) in self.sums_on_tape.iter().enumerate() {
            if let Some(dw) = dw {
                grads.weight(i, |sum| sum.iter_mut().zip(dw).for_each(|(sum, dw)| *sum += dy * dw))?;
            }
        }
        Ok(())
    }
}

/// What a model says of one position.
#[derive(Clone, Debug, PartialEq)]
pub struct TopLogprobs {
    /// Log-probability of the position's target, in nats.
    pub target: f32,
    /// The most likely tokens, best first, equal ones by id.
    pub top: Vec<(u32, f32)>,
}

/// Log-probability of `targets` (`n` ids) and the `k` most likely tokens at each row of `x [n, c]` under the head
/// `table [v, c]`, both f32 or bf16; logits in f32, a chunk of rows at a time. Nothing is recorded.
///
/// # Errors
/// If a target is not below `v`, or shapes, dtypes or devices do not fit.
pub fn logprobs_top<'a>(
    x: &Tensor,
    table: impl Into<Table<'a>>,
    targets: &[u32],
    k: usize,
) -> Result<Vec<TopLogprobs>> {
    let table = table.into();
    let (n, c, v) = check("logprobs_top", x, table)?;
    if targets.len() != n {
        bail!("logprobs_top: {} targets for {n} rows", targets.len())
    }
    if let Some(at) = targets.iter().position(|&t| t as usize >= v) {
        bail!("target {} at index {at} is not below the {v} rows of the head", targets[at])
    }
    let mut all = Vec::with_capacity(n);
    let chunk = chunk_rows(v);
    for start in (0..n).step_by(chunk) {
        let rows = chunk.min(n - start);
        let logits = logits(&x.detach().narrow(0, start, rows)?, table, (rows, c, v))?;
        let mut lse = vec![0f32; rows];
        kernels::log_sum_exp_rows(simd::level(), &logits, v, &mut lse);
        let rows = logits.par_chunks_exact(v).zip(&lse).zip(&targets[start..start + rows]);
        all.par_extend(rows.map(|((row, lse), &target)| TopLogprobs {
            target: row[target as usize] - lse,
            top: largest(row, k).into_iter().map(|id| (id, row[id as usize] - lse)).collect(),
        }));
    }
    Ok(all)
}

/// Logits of `x [n, c]` under the head `table [v, c]`, both f32 or bf16, as f32 `[n * v]`, row by row: not rounded to the
/// compute dtype, so that sampling sees what [`logprobs_top`] reports. Nothing is recorded.
///
/// # Errors
/// If shapes, dtypes or devices do not fit.
pub fn head_logits<'a>(x: &Tensor, table: impl Into<Table<'a>>) -> Result<Vec<f32>> {
    let table = table.into();
    let sizes = check("head_logits", x, table)?;
    logits(&x.detach(), table, sizes)
}

fn logits(x: &Tensor, table: Table, (n, c, v): (usize, usize, usize)) -> Result<Vec<f32>> {
    if !on_cpu(x) {
        return reference::linear(x, &table.composed()?.detach(), None)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1();
    }
    fn run<T: Scalar>(x: &Tensor, table: Table, sizes: (usize, usize, usize)) -> Result<Vec<f32>> {
        let (xs, xl) = x.storage_and_layout();
        let mut logits = unspecified(sizes.0 * sizes.2);
        HeadRows::<T>::with(table, |head| head.logits(sizes, view::<T>(&xs, xl)?, &mut logits))?;
        Ok(logits)
    }
    let x = dense(x)?;
    with_dtype!("logprobs_top", x.dtype(), T => run::<T>(&x, table, (n, c, v)))
}

/// Ids of the `k` largest values, largest first, equal ones by id.
fn largest(row: &[f32], k: usize) -> Vec<u32> {
    let order = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
    let k = k.min(ids.len());
    if k == 0 {
        return vec![];
    }
    if k < ids.len() {
        ids.select_nth_unstable_by(k - 1, order);
        ids.truncate(k);
    }
    ids.sort_unstable_by(order);
    ids
}
