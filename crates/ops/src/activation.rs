//! [`silu`], [`swiglu`], [`gelu`], [`relu`]: backward recomputes from the inputs.

use candle_core::{CpuStorage, Result, Tensor};
use tallow_kernels::activation::{self as kernels, Activation};
use tallow_kernels::memory::unspecified;
use tallow_kernels::simd;

use crate::gradients::{Backward, Gradients, Saved, size};
use crate::operand::{Scalar, check_dtype, check_same, on_cpu, view, with_dtype};
use crate::reference;
use crate::tape::{composed_of, dense, finish};
use crate::trace::{self, Cost};

/// Which GELU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gelu {
    /// `x Phi(x)`, `Phi` the normal distribution function (Hendrycks and Gimpel 2016); `gelu` of Hugging Face.
    Exact,
    /// `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`; `gelu_new` and `gelu_pytorch_tanh` of Hugging Face.
    Tanh,
}

/// `x / (1 + e^-x)`, elementwise on `x [..]`, f32 or bf16.
///
/// # Errors
/// If the dtype is neither f32 nor bf16.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    elementwise(x, Activation::Silu)
}

/// GELU, elementwise on `x [..]`, f32 or bf16.
///
/// # Errors
/// If the dtype is neither f32 nor bf16.
pub fn gelu(x: &Tensor, kind: Gelu) -> Result<Tensor> {
    elementwise(
        x,
        match kind {
            Gelu::Exact => Activation::GeluExact,
            Gelu::Tanh => Activation::GeluTanh,
        },
    )
}

/// `max(x, 0)`, elementwise on `x [..]`, f32 or bf16; the derivative at 0 is 0.
///
/// # Errors
/// If the dtype is neither f32 nor bf16.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    elementwise(x, Activation::Relu)
}

fn elementwise(x: &Tensor, f: Activation) -> Result<Tensor> {
    check_dtype("activation", x.dtype())?;
    let op = Elementwise { f, size: size(x) };
    if !on_cpu(x) {
        return composed_of(op.name(), &[x], |x| reference::activation(&x[0], f));
    }
    let x = dense(x)?;
    let _span = trace::op(op.name(), || Cost::bytes(2 * op.size));
    let y = with_dtype!(op.name(), x.dtype(), T => op.forward::<T>(&x))?;
    finish(op, &[&x], y, x.shape().clone())
}

/// `silu(gate) * up` elementwise (SwiGLU, Shazeer 2020); both `[..]` of the same shape, f32 or bf16.
///
/// # Errors
/// If shape, dtype or device differ, or the dtype is neither f32 nor bf16.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    check_same("swiglu", gate, up)?;
    if !on_cpu(gate) {
        return composed_of("swiglu", &[gate, up], |x| reference::swiglu(&x[0], &x[1]));
    }
    let (gate, up) = (dense(gate)?, dense(up)?);
    let op = SwiGlu { size: size(&gate) };
    let _span = trace::op("swiglu", || Cost::bytes(3 * op.size));
    let y = with_dtype!("swiglu", gate.dtype(), T => swiglu_forward::<T>(&gate, &up))?;
    finish(op, &[&gate, &up], y, gate.shape().clone())
}

struct Elementwise {
    f: Activation,
    /// Bytes of the input.
    size: usize,
}

impl Elementwise {
    fn forward<T: Scalar>(&self, x: &Tensor) -> Result<CpuStorage> {
        let (xs, xl) = x.storage_and_layout();
        let mut out = unspecified(x.elem_count());
        kernels::activation(simd::level(), self.f, view::<T>(&xs, xl)?, &mut out);
        Ok(T::into_storage(out))
    }
}

impl Backward for Elementwise {
    fn name(&self) -> &'static str {
        match self.f {
            Activation::Silu => "silu",
            Activation::GeluExact => "gelu-exact",
            Activation::GeluTanh => "gelu-tanh",
            Activation::Relu => "relu",
        }
    }

    fn cost(&self) -> Cost {
        Cost::bytes(3 * self.size)
    }

    fn backward(&self, saved: Saved<'_>, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        if !grads.wants(0) {
            return Ok(());
        }
        let x = &saved.inputs[0];
        with_dtype!(self.name(), x.dtype(), T => {
            let ((xs, xl), (ds, dl)) = (x.storage_and_layout(), dy.storage_and_layout());
            let mut dx = unspecified::<T>(x.elem_count());
            kernels::activation_backward(simd::level(), self.f, view(&xs, xl)?, view(&ds, dl)?, &mut dx);
            grads.give(0, dx, x.shape())
        })
    }
}

fn swiglu_forward<T: Scalar>(gate: &Tensor, up: &Tensor) -> Result<CpuStorage> {
    let ((gs, gl), (us, ul)) = (gate.storage_and_layout(), up.storage_and_layout());
    let mut out = unspecified(gate.elem_count());
    kernels::swiglu(simd::level(), view::<T>(&gs, gl)?, view(&us, ul)?, &mut out);
    Ok(T::into_storage(out))
}

struct SwiGlu {
    /// Bytes of one operand.
    size: usize,
}

impl Backward for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cost(&self) -> Cost {
        Cost::bytes(5 * self.size)
    }

    fn backward(&self, saved: Saved<'_>, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        let [gate, up] = saved.inputs else { candle_core::bail!("swiglu: backward without its operands") };
        with_dtype!(self.name(), gate.dtype(), T => {
            let ((gs, gl), (us, ul), (ds, dl)) =
                (gate.storage_and_layout(), up.storage_and_layout(), dy.storage_and_layout());
            let (mut dgate, mut dup) = (unspecified::<T>(gate.elem_count()), unspecified::<T>(gate.elem_count()));
            let (g, u, d) = (view(&gs, gl)?, view(&us, ul)?, view(&ds, dl)?);
            kernels::swiglu_backward(simd::level(), g, u, d, &mut dgate, &mut dup);
            for (i, dx) in [dgate, dup].into_iter().enumerate() {
                if grads.wants(i) {
                    grads.give(i, dx, gate.shape())?;
                }
            }
            Ok(())
        })
    }
}
