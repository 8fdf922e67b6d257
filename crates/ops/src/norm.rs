//! [`rms_norm`] and [`layer_norm`].

use candle_core::{CpuStorage, DType, Result, Tensor, bail};
use tallow_kernels::memory::unspecified;
use tallow_kernels::norm::{self as kernels, Stats};
use tallow_kernels::simd;

use crate::gradients::{Backward, Gradients, Saved, size};
use crate::operand::{Scalar, composed, on_cpu, view, with_dtype};
use crate::tape::{composed_of, dense, finish};
use crate::trace::{self, Cost};
use crate::{Weight, reference};

/// `y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension (RMSNorm, Zhang and Sennrich 2019). `x [.., c]` and
/// `weight [c]` in the same dtype, f32 or bf16; computed in f32. Only one value a row is kept for backward.
///
/// # Errors
/// If shapes, dtypes or devices do not fit.
pub fn rms_norm(x: &Tensor, weight: &Weight, eps: f64) -> Result<Tensor> {
    check("rms_norm", x, "weight", weight)?;
    if !on_cpu(x) {
        return composed_of("rms-norm", &[x], |x| reference::rms_norm(&x[0], &composed(weight)?, eps));
    }
    normalise(x, weight, None, eps, Kind::Rms)
}

/// `y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last dimension (LayerNorm, Ba et al. 2016), with the
/// variance over `c` (not `c - 1`). `x [.., c]`, `weight [c]` and `bias [c]` in the same dtype, f32 or bf16; computed in
/// f32. Only two values a row are kept for backward.
///
/// # Errors
/// If shapes, dtypes or devices do not fit.
pub fn layer_norm(x: &Tensor, weight: &Weight, bias: Option<&Weight>, eps: f64) -> Result<Tensor> {
    check("layer_norm", x, "weight", weight)?;
    if let Some(bias) = bias {
        check("layer_norm", x, "bias", bias)?;
    }
    if !on_cpu(x) {
        return composed_of("layer-norm", &[x], |x| {
            reference::layer_norm(&x[0], &composed(weight)?, bias.map(composed).transpose()?.as_ref(), eps)
        });
    }
    normalise(x, weight, bias, eps, Kind::Layer)
}

fn check(op: &str, x: &Tensor, name: &str, weight: &Weight) -> Result<()> {
    let c = x.dims().last().copied().unwrap_or(0);
    if c == 0 || weight.shape().dims() != [c] {
        bail!("{op}: x {:?} needs a {name} of [{c}], got {:?}", x.shape(), weight.shape())
    }
    if x.dtype() != weight.dtype() || !matches!(x.dtype(), DType::F32 | DType::BF16) {
        let (xd, wd) = (x.dtype(), weight.dtype());
        bail!("{op}: x is {xd:?} and {name} {wd:?}: both must be F32 or both BF16")
    }
    if !x.device().same_device(weight.device()) {
        bail!("{op}: x and {name} are on different devices")
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Rms,
    Layer,
}

/// What a row leaves for backward.
enum RowStats {
    Rms(Vec<f32>),
    Layer(Vec<[f32; 2]>),
}

struct Norm {
    weight: Weight,
    bias: Option<Weight>,
    stats: RowStats,
    /// Bytes of the input.
    size: usize,
}

fn normalise(x: &Tensor, weight: &Weight, bias: Option<&Weight>, eps: f64, kind: Kind) -> Result<Tensor> {
    let x = dense(x)?;
    let size = size(&x);
    let name = if kind == Kind::Rms { "rms-norm" } else { "layer-norm" };
    let _span = trace::op(name, || Cost::bytes(2 * size));
    let (y, stats) = with_dtype!("norm", x.dtype(), T => forward::<T>(&x, weight, bias, eps, kind))?;
    finish(Norm { weight: weight.clone(), bias: bias.cloned(), stats, size }, &[&x], y, x.shape().clone())
}

fn forward<T: Scalar>(
    x: &Tensor,
    weight: &Weight,
    bias: Option<&Weight>,
    eps: f64,
    kind: Kind,
) -> Result<(CpuStorage, RowStats)> {
    let weight = weight.value()?.detach().contiguous()?;
    let ((xs, xl), (ws, wl)) = (x.storage_and_layout(), weight.storage_and_layout());
    let (x, weight) = (view::<T>(&xs, xl)?, view::<T>(&ws, wl)?);
    let rows = x.len() / weight.len();
    let mut y = unspecified(x.len());
    let stats = match kind {
        Kind::Rms => {
            let mut rstd = vec![0.0; rows];
            kernels::rms_norm(simd::level(), x, weight, eps as f32, &mut y, &mut rstd);
            RowStats::Rms(rstd)
        }
        Kind::Layer => {
            let bias = bias.map(|b| b.value()?.detach().contiguous()).transpose()?;
            let held = bias.as_ref().map(Tensor::storage_and_layout);
            let bias = held.as_ref().map(|(s, l)| view::<T>(s, l)).transpose()?;
            let mut stats = vec![[0.0; 2]; rows];
            kernels::layer_norm(simd::level(), x, weight, bias, eps as f32, &mut y, &mut stats);
            RowStats::Layer(stats)
        }
    };
    Ok((T::into_storage(y), stats))
}

impl Norm {
    fn gradients<T: Scalar>(&self, x: &Tensor, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        let weight = self.weight.value()?.detach().contiguous()?;
        let ((xs, xl), (ds, dl), (ws, wl)) =
            (x.storage_and_layout(), dy.storage_and_layout(), weight.storage_and_layout());
        let (x_values, w, dy) = (view::<T>(&xs, xl)?, view(&ws, wl)?, view(&ds, dl)?);
        let stats = match &self.stats {
            RowStats::Rms(rstd) => Stats::Rms(rstd),
            RowStats::Layer(stats) => Stats::Layer(stats),
        };
        let sums = |wanted: bool| wanted.then(|| vec![0.0; w.len()]);
        let mut dx = grads.wants(0).then(|| unspecified(x_values.len()));
        let mut dweight = sums(grads.wants_weight(0));
        let mut dbias = sums(self.bias.is_some() && grads.wants_weight(1));
        let (dw, db) = (dweight.as_deref_mut(), dbias.as_deref_mut());
        kernels::norm_backward(simd::level(), x_values, w, dy, stats, dx.as_deref_mut(), dw, db);
        for (i, sums) in [dweight, dbias].into_iter().enumerate() {
            if let Some(sums) = sums {
                grads.weight(i, |slot| add(slot, &sums))?;
            }
        }
        match dx {
            Some(dx) => grads.give(0, dx, x.shape()),
            None => Ok(()),
        }
    }
}

fn add(sum: &mut [f32], values: &[f32]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

impl Backward for Norm {
    fn name(&self) -> &'static str {
        match self.stats {
            RowStats::Rms(_) => "rms-norm",
            RowStats::Layer(_) => "layer-norm",
        }
    }

    fn weights(&self) -> Vec<&Weight> {
        [Some(&self.weight), self.bias.as_ref()].into_iter().flatten().collect()
    }

    fn cost(&self) -> Cost {
        Cost::bytes(3 * self.size)
    }

    fn backward(&self, saved: Saved<'_>, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        with_dtype!(self.name(), dy.dtype(), T => self.gradients::<T>(&saved.inputs[0], dy, grads))
    }
}
