//! Passes over flat buckets: the AdamW step, gradient norms, casts. No gradients flow here.

use std::ops::Range;

use candle_core::{DType, Result, Tensor, bail};
use half::bf16;
use tallow_kernels::{adamw, reduce, simd};

pub use tallow_kernels::adamw::AdamWParams;

use crate::operand::{mutate, view};
use crate::trace::{self, Cost};

/// The flat tensors of one bucket, all of one length, contiguous, on the CPU.
pub struct AdamWBuckets<'a> {
    /// f32 master weights.
    pub master: &'a Tensor,
    /// f32 sum of gradients; zero afterwards.
    pub grad: &'a Tensor,
    /// f32 first moment.
    pub m: &'a Tensor,
    /// f32 second moment.
    pub v: &'a Tensor,
    /// bf16 copy of the weights that the ops read; `None` where they read the master itself.
    pub compute: Option<&'a Tensor>,
}

/// One AdamW step (Loshchilov and Hutter 2019, as PyTorch's `AdamW` has it; see [`tallow_kernels::adamw::adamw`]) over the
/// elements `range` of a bucket, in place and in one pass.
///
/// # Errors
/// If the tensors differ in length, are of another dtype or device, or the range reaches past them.
pub fn adamw_step(buckets: AdamWBuckets, range: Range<usize>, params: &AdamWParams) -> Result<()> {
    let AdamWBuckets { master, grad, m, v, compute } = buckets;
    let len = master.elem_count();
    let sizes = [grad, m, v].into_iter().chain(compute).map(Tensor::elem_count);
    if sizes.into_iter().any(|n| n != len) || range.start > range.end || range.end > len {
        bail!("adamw_step: buckets of different lengths, or {range:?} is not within {len} elements")
    }
    if range.is_empty() {
        return Ok(());
    }
    let copy = if compute.is_some() { 2 } else { 0 };
    let _span = trace::op("adamw", || Cost::bytes((32 + copy) * range.len()));
    let cut = |t: &Tensor| t.narrow(0, range.start, range.len());
    let (master, grad, m, v) = (cut(master)?, cut(grad)?, cut(m)?, cut(v)?);
    let compute = compute.map(cut).transpose()?;
    // Each closure holds the write lock of one more tensor.
    let step = |w: &mut [f32], g: &mut [f32], m: &mut [f32], v: &mut [f32], c: Option<&mut [bf16]>| {
        adamw::adamw(simd::level(), params, w, g, m, v, c);
        Ok(())
    };
    mutate(&master, |w| {
        mutate(&grad, |g| {
            mutate(&m, |m| {
                mutate(&v, |v| match &compute {
                    None => step(w, g, m, v, None),
                    Some(compute) => mutate(compute, |c| step(w, g, m, v, Some(c))),
                })
            })
        })
    })
}

/// Sum of the squares of an f32 tensor on the CPU, the same whatever the number of threads.
///
/// # Errors
/// If it is of another dtype or device.
pub fn global_sq_norm(x: &Tensor) -> Result<f64> {
    let x = x.contiguous()?;
    let _span = trace::op("gradient-norm", || Cost::bytes(4 * x.elem_count()));
    let (storage, layout) = x.storage_and_layout();
    Ok(reduce::sum_of_squares(simd::level(), view(&storage, layout)?))
}

/// True if no value of an f32 tensor on the CPU is NaN or infinite.
///
/// # Errors
/// If it is of another dtype or device.
pub fn all_finite(x: &Tensor) -> Result<bool> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    Ok(reduce::all_finite(view(&storage, layout)?))
}

/// Sets an f32 tensor on the CPU to zero, in place.
///
/// # Errors
/// If it is of another dtype or device, or not contiguous.
pub fn fill_zero(x: &Tensor) -> Result<()> {
    mutate(x, |x| {
        reduce::fill_zero(x);
        Ok(())
    })
}

/// Writes `src` (f32) rounded to nearest even into `dst` (bf16), both flat on the CPU.
///
/// # Errors
/// If they are of other dtypes, devices or different lengths.
pub fn cast_to_bf16(src: &Tensor, dst: &Tensor) -> Result<()> {
    if src.elem_count() != dst.elem_count() || dst.dtype() != DType::BF16 {
        bail!("cast_to_bf16: {:?} {:?} into {:?} {:?}", src.shape(), src.dtype(), dst.shape(), dst.dtype())
    }
    let src = src.contiguous()?;
    let (storage, layout) = src.storage_and_layout();
    let from = view(&storage, layout)?;
    mutate(dst, |to| {
        reduce::round_to_bf16(simd::level(), from, to);
        Ok(())
    })
}
