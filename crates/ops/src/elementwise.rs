//! [`residual_add`].

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use tallow_kernels::memory::unspecified;
use tallow_kernels::{elementwise, simd};

use crate::operand::{Scalar, check_same, on_cpu, slice, with_dtype};

/// `x + y`, both `[..]` of the same shape, f32 or bf16 (added in f32), threaded. Both receive the gradient of the sum
/// itself, without a copy.
///
/// # Errors
/// If shape, dtype or device differ (nothing is broadcast), or the dtype is neither f32 nor bf16.
pub fn residual_add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    check_same("residual_add", x, y)?;
    if !on_cpu(x) {
        return x + y;
    }
    x.contiguous()?.apply_op2(&y.contiguous()?, ResidualAdd)
}

struct ResidualAdd;

impl CustomOp2 for ResidualAdd {
    fn name(&self) -> &'static str {
        "residual-add"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        fn run<T: Scalar>(s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<CpuStorage> {
            let (x, y) = (slice::<T>(s1, l1)?, slice::<T>(s2, l2)?);
            let mut out = unspecified(x.len());
            elementwise::add(simd::level(), x, y, &mut out);
            Ok(T::to_cpu_storage_owned(out))
        }
        let out = with_dtype!(self.name(), s1.dtype(), T => run::<T>(s1, l1, s2, l2))?;
        Ok((out, l1.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((x.track_op().then(|| dy.clone()), y.track_op().then(|| dy.clone())))
    }
}
