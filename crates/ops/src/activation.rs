//! [`silu`], [`swiglu`], [`gelu`], [`relu`]: backward recomputes from the inputs.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use tallow_kernels::activation::{self as kernels, Activation};
use tallow_kernels::memory::unspecified;
use tallow_kernels::simd;

use crate::operand::{Scalar, check_dtype, check_same, on_cpu, slice, view, with_dtype};
use crate::reference;

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
    if !on_cpu(x) {
        return reference::activation(x, f);
    }
    x.contiguous()?.apply_op1(Elementwise { f })
}

/// `silu(gate) * up` elementwise (SwiGLU, Shazeer 2020); both `[..]` of the same shape, f32 or bf16.
///
/// # Errors
/// If shape, dtype or device differ, or the dtype is neither f32 nor bf16.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    check_same("swiglu", gate, up)?;
    if !on_cpu(gate) {
        return reference::swiglu(gate, up);
    }
    gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGlu)
}

struct Elementwise {
    f: Activation,
}

impl CustomOp1 for Elementwise {
    fn name(&self) -> &'static str {
        match self.f {
            Activation::Silu => "silu",
            Activation::GeluExact => "gelu-exact",
            Activation::GeluTanh => "gelu-tanh",
            Activation::Relu => "relu",
        }
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        fn run<T: Scalar>(f: Activation, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
            let x = slice::<T>(storage, layout)?;
            let mut out = unspecified(x.len());
            kernels::activation(simd::level(), f, x, &mut out);
            Ok(T::to_cpu_storage_owned(out))
        }
        let out = with_dtype!(self.name(), storage.dtype(), T => run::<T>(self.f, storage, layout))?;
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        x.apply_op2_no_bwd(&dy.contiguous()?, &ElementwiseBackward { f: self.f }).map(Some)
    }
}

struct ElementwiseBackward {
    f: Activation,
}

impl CustomOp2 for ElementwiseBackward {
    fn name(&self) -> &'static str {
        "activation-backward"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        fn run<T: Scalar>(f: Activation, x: &[T], dy: &[T]) -> CpuStorage {
            let mut dx = unspecified(x.len());
            kernels::activation_backward(simd::level(), f, x, dy, &mut dx);
            T::to_cpu_storage_owned(dx)
        }
        let dx = with_dtype!(self.name(), s1.dtype(), T => run::<T>(self.f, slice(s1, l1)?, slice(s2, l2)?));
        Ok((dx, l1.shape().clone()))
    }
}

struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        fn run<T: Scalar>(gate: &[T], up: &[T]) -> CpuStorage {
            let mut out = unspecified(gate.len());
            kernels::swiglu(simd::level(), gate, up, &mut out);
            T::to_cpu_storage_owned(out)
        }
        let out = with_dtype!(self.name(), s1.dtype(), T => run::<T>(slice(s1, l1)?, slice(s2, l2)?));
        Ok((out, l1.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (dgate, dup) = with_dtype!(self.name(), gate.dtype(), T => swiglu_backward::<T>(gate, up, &dy))?;
        Ok((gate.track_op().then_some(dgate), up.track_op().then_some(dup)))
    }
}

fn swiglu_backward<T: Scalar>(gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let ((gs, gl), (us, ul), (ds, dl)) = (gate.storage_and_layout(), up.storage_and_layout(), dy.storage_and_layout());
    let (mut dgate, mut dup) = (unspecified(gate.elem_count()), unspecified(gate.elem_count()));
    let (g, u, d) = (view::<T>(&gs, gl)?, view(&us, ul)?, view(&ds, dl)?);
    kernels::swiglu_backward(simd::level(), g, u, d, &mut dgate, &mut dup);
    Ok((Tensor::from_vec(dgate, gate.shape(), gate.device())?, Tensor::from_vec(dup, gate.shape(), gate.device())?))
}
