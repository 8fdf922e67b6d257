//! [`rms_norm`] and [`layer_norm`].

use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use tallow_kernels::memory::unspecified;
use tallow_kernels::norm::{self as kernels, Stats};
use tallow_kernels::simd;

use crate::operand::{Scalar, accumulate, composed, on_cpu, slice, view, with_dtype};
use crate::{Weight, reference};

/// `y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension (RMSNorm, Zhang and Sennrich 2019). `x [.., c]` and
/// `weight [c]` in the same dtype, f32 or bf16; computed in f32. Only one value a row is kept for backward.
///
/// # Errors
/// If shapes, dtypes or devices do not fit.
pub fn rms_norm(x: &Tensor, weight: &Weight, eps: f64) -> Result<Tensor> {
    check("rms_norm", x, "weight", weight)?;
    if !on_cpu(x) {
        return reference::rms_norm(x, &composed(weight)?, eps);
    }
    Norm { weight: weight.clone(), bias: None, eps, kind: Kind::Rms, saved: OnceLock::new() }.record(x)
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
        return reference::layer_norm(x, &composed(weight)?, bias.map(composed).transpose()?.as_ref(), eps);
    }
    let (weight, bias) = (weight.clone(), bias.cloned());
    Norm { weight, bias, eps, kind: Kind::Layer, saved: OnceLock::new() }.record(x)
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
enum Saved {
    Rms(Vec<f32>),
    Layer(Vec<[f32; 2]>),
}

struct Norm {
    weight: Weight,
    bias: Option<Weight>,
    eps: f64,
    kind: Kind,
    saved: OnceLock<Saved>,
}

impl Norm {
    /// The second and third operand only put the op on the tape; the values are read from `self`.
    fn record(self, x: &Tensor) -> Result<Tensor> {
        let x = x.contiguous()?;
        let weight = self.weight.anchor().unwrap_or(self.weight.value()).clone();
        let bias = self.bias.as_ref().map_or(&x, |b| b.anchor().unwrap_or(b.value())).clone();
        let bias = if self.bias.is_some() { bias } else { bias.detach() };
        x.apply_op3(&weight, &bias, self)
    }

    fn forward<T: Scalar>(&self, x: &[T]) -> Result<CpuStorage> {
        let weight = self.weight.value().contiguous()?;
        let (ws, wl) = weight.storage_and_layout();
        let weight = view::<T>(&ws, wl)?;
        let rows = x.len() / weight.len();
        let mut y = unspecified(x.len());
        let saved = match self.kind {
            Kind::Rms => {
                let mut rstd = vec![0.0; rows];
                kernels::rms_norm(simd::level(), x, weight, self.eps as f32, &mut y, &mut rstd);
                Saved::Rms(rstd)
            }
            Kind::Layer => {
                let bias = self.bias.as_ref().map(|b| b.value().contiguous()).transpose()?;
                let held = bias.as_ref().map(Tensor::storage_and_layout);
                let bias = held.as_ref().map(|(s, l)| view::<T>(s, l)).transpose()?;
                let mut stats = vec![[0.0; 2]; rows];
                kernels::layer_norm(simd::level(), x, weight, bias, self.eps as f32, &mut y, &mut stats);
                Saved::Layer(stats)
            }
        };
        // Set twice only if candle ran the op twice, with the same result.
        let _ = self.saved.set(saved);
        Ok(T::to_cpu_storage_owned(y))
    }

    /// `dx` where wanted, and the sums for weight and bias.
    fn backward<T: Scalar>(
        &self,
        x: &Tensor,
        dy: &Tensor,
        (dweight, dbias): (Option<&mut [f32]>, Option<&mut [f32]>),
    ) -> Result<Option<Tensor>> {
        let weight = self.weight.value().contiguous()?;
        let ((xs, xl), (ds, dl), (ws, wl)) =
            (x.storage_and_layout(), dy.storage_and_layout(), weight.storage_and_layout());
        let stats = match self.saved.get() {
            Some(Saved::Rms(rstd)) => Stats::Rms(rstd),
            Some(Saved::Layer(stats)) => Stats::Layer(stats),
            None => bail!("norm: backward without a forward pass"),
        };
        let mut dx = x.track_op().then(|| unspecified(x.elem_count()));
        let (x_values, w, dy) = (view::<T>(&xs, xl)?, view(&ws, wl)?, view(&ds, dl)?);
        kernels::norm_backward(simd::level(), x_values, w, dy, stats, dx.as_deref_mut(), dweight, dbias);
        dx.map(|dx| Tensor::from_vec(dx, x.shape(), x.device())).transpose()
    }
}

fn add(sum: &mut [f32], values: &[f32]) {
    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

impl CustomOp3 for Norm {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Rms => "rms-norm",
            Kind::Layer => "layer-norm",
        }
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = with_dtype!(self.name(), storage.dtype(), T => self.forward::<T>(slice(storage, layout)?))?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let c = self.weight.shape().elem_count();
        let dy = dy.contiguous()?;
        let mut dweight = weight.track_op().then(|| vec![0.0; c]);
        let mut dbias = (self.bias.is_some() && bias.track_op()).then(|| vec![0.0; c]);
        let sums = (dweight.as_deref_mut(), dbias.as_deref_mut());
        let dx = with_dtype!(self.name(), x.dtype(), T => self.backward::<T>(x, &dy, sums))?;
        let dweight =
            dweight.map(|sums| accumulate(&self.weight, weight, |slot| add(slot, &sums))).transpose()?.flatten();
        let dbias = match (&self.bias, dbias) {
            (Some(held), Some(sums)) => accumulate(held, bias, |slot| add(slot, &sums))?,
            _ => None,
        };
        Ok((dx, dweight, dbias))
    }
}
