use candle_core::{DType, Result, Tensor};
use tallow_kernels::activation::Activation;

/// [`silu`](crate::silu), [`gelu`](crate::gelu()) and [`relu`](crate::relu) composed of candle ops, computed in f32.
pub fn activation(x: &Tensor, f: Activation) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    match f {
        Activation::Silu => silu(&wide)?,
        Activation::GeluExact => wide.gelu_erf()?,
        Activation::GeluTanh => {
            let cubic = ((&wide * &wide)? * &wide)?;
            let inner = ((&wide + (cubic * 0.044715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
            (wide * 0.5)?.mul(&(inner.tanh()? + 1.0)?)?
        }
        Activation::Relu => wide.relu()?,
    }
    .to_dtype(x.dtype())
}

/// [`swiglu`](crate::swiglu) composed of candle ops, computed in f32.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    silu(&gate.to_dtype(DType::F32)?)?.mul(&up.to_dtype(DType::F32)?)?.to_dtype(gate.dtype())
}

fn silu(x: &Tensor) -> Result<Tensor> {
    x / (x.neg()?.exp()? + 1.0)?
}
