//! [`dropout`] with a mask that is a function of a [`DropoutKey`].

use candle_core::{Result, Tensor, bail};
use tallow_kernels::dropout::{self as kernels, Mask};
use tallow_kernels::memory::unspecified;
use tallow_kernels::{rng, simd};

use crate::gradients::{Backward, Gradients, Saved, Saves, size};
use crate::operand::{Scalar, check_dtype, on_cpu, view, with_dtype};
use crate::tape::{composed_of, dense, finish};
use crate::trace::{self, Cost};

/// What a mask is a function of. The same key gives the same mask, so that a recomputed block sees what it saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DropoutKey {
    /// Seed of the run.
    pub seed: u64,
    /// Step or micro-batch, unique over the run and its ranks.
    pub step: u64,
    /// Layer.
    pub layer: u32,
    /// Place within the layer.
    pub site: u32,
    /// Index of the tensor's first element, for a tensor that is a piece of a larger one; 0 otherwise.
    pub offset: u64,
}

/// Zeroes each element of `x [..]` (f32 or bf16) with probability `p` and multiplies the rest by `1 / (1 - p)` (Srivastava
/// et al. 2014). Element `i` is kept where word `offset + i` of Philox4x32-10 is at least `p 2^32`; nothing is stored,
/// and the backward pass draws the same mask again. `p = 0` returns `x` itself.
///
/// # Errors
/// If `p` is not in `[0, 1)` or the dtype is neither f32 nor bf16.
pub fn dropout(x: &Tensor, p: f64, key: DropoutKey) -> Result<Tensor> {
    if !(0.0..1.0).contains(&p) {
        bail!("dropout: p = {p} is not in [0, 1); 0 turns it off")
    }
    check_dtype("dropout", x.dtype())?;
    if p == 0.0 {
        return Ok(x.clone());
    }
    let mask = Mask {
        key: rng::key_from(&[key.seed, key.step]),
        counter: [key.layer, key.site],
        offset: key.offset,
        threshold: (p * 4_294_967_296.0) as u32,
        scale: (1.0 / (1.0 - p)) as f32,
    };
    if !on_cpu(x) {
        return composed_of("dropout", &[x], |x| &x[0] * mask_tensor(&x[0], mask)?);
    }
    let x = dense(x)?;
    let op = Dropout { mask, size: size(&x) };
    let _span = trace::op("dropout", || Cost::bytes(2 * op.size));
    let y = with_dtype!("dropout", x.dtype(), T => T::into_storage(op.run::<T>(&x)?));
    finish(op, &[&x], y, x.shape().clone())
}

/// The factors of each element as a tensor, for devices without the kernel.
fn mask_tensor(x: &Tensor, mask: Mask) -> Result<Tensor> {
    let ones = vec![1f32; x.elem_count()];
    let mut factors = vec![0f32; ones.len()];
    kernels::dropout(simd::level(), mask, &ones, &mut factors);
    Tensor::from_vec(factors, x.shape(), x.device())?.to_dtype(x.dtype())
}

struct Dropout {
    mask: Mask,
    /// Bytes of the input.
    size: usize,
}

impl Dropout {
    fn run<T: Scalar>(&self, x: &Tensor) -> Result<Vec<T>> {
        let (xs, xl) = x.storage_and_layout();
        let mut out = unspecified(x.elem_count());
        kernels::dropout(simd::level(), self.mask, view::<T>(&xs, xl)?, &mut out);
        Ok(out)
    }
}

impl Backward for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn saves(&self) -> Saves {
        Saves::Nothing
    }

    fn cost(&self) -> Cost {
        Cost::bytes(2 * self.size)
    }

    fn backward(&self, _: Saved<'_>, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        if !grads.wants(0) {
            return Ok(());
        }
        with_dtype!(self.name(), dy.dtype(), T => grads.give(0, self.run::<T>(dy)?, dy.shape()))
    }
}
