//! [`residual_add`].

use candle_core::{CpuStorage, Result, Tensor};
use tallow_kernels::memory::unspecified;
use tallow_kernels::{elementwise, simd};

use crate::gradients::{Backward, Gradients, Saved, Saves, size};
use crate::operand::{Scalar, check_same, on_cpu, view, with_dtype};
use crate::tape::{composed_of, dense, finish};
use crate::trace::{self, Cost};

/// `x + y`, both `[..]` of the same shape, f32 or bf16 (added in f32), threaded. Both receive the gradient of the sum
/// itself, without a copy.
///
/// # Errors
/// If shape, dtype or device differ (nothing is broadcast), or the dtype is neither f32 nor bf16.
pub fn residual_add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    check_same("residual_add", x, y)?;
    if !on_cpu(x) {
        return composed_of("residual-add", &[x, y], |x| &x[0] + &x[1]);
    }
    let (x, y) = (dense(x)?, dense(y)?);
    let _span = trace::op("residual-add", || Cost::bytes(3 * size(&x)));
    let sum = with_dtype!("residual_add", x.dtype(), T => add::<T>(&x, &y))?;
    finish(ResidualAdd, &[&x, &y], sum, x.shape().clone())
}

fn add<T: Scalar>(x: &Tensor, y: &Tensor) -> Result<CpuStorage> {
    let ((xs, xl), (ys, yl)) = (x.storage_and_layout(), y.storage_and_layout());
    let mut out = unspecified(x.elem_count());
    elementwise::add(simd::level(), view::<T>(&xs, xl)?, view(&ys, yl)?, &mut out);
    Ok(T::into_storage(out))
}

struct ResidualAdd;

impl Backward for ResidualAdd {
    fn name(&self) -> &'static str {
        "residual-add"
    }

    fn saves(&self) -> Saves {
        Saves::Nothing
    }

    fn cost(&self) -> Cost {
        Cost::default()
    }

    fn backward(&self, _: Saved<'_>, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        grads.pass(0, dy)?;
        grads.pass(1, dy)
    }
}
