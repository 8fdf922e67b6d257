//! NEFTune (Jain et al. 2023): uniform noise on the embeddings while training.

use candle_core::Tensor;
use tallow_nn::{ForwardContext, Result};
use tallow_ops::{constant, fill_uniform, residual_add};

/// Draws of this purpose, apart from weights and dropout.
const STREAM: u64 = 0x6e65_6674_756e_6500;

/// `x [b, t, c]` plus noise uniform in `alpha / sqrt(t c)`, a function of the context's seed and step; `x` itself for an
/// `alpha` of 0 or outside training. `t` counts padding, as all rows of a run are equally long.
pub(crate) fn add_noise(x: Tensor, cx: &ForwardContext, alpha: f64) -> Result<Tensor> {
    let Some(dropout) = cx.dropout.filter(|_| alpha > 0.0) else { return Ok(x) };
    let (_, t, c) = x.dims3()?;
    let most = (alpha / ((t * c) as f64).sqrt()) as f32;
    let mut noise = vec![0f32; x.elem_count()];
    fill_uniform(&mut noise, dropout.seed ^ STREAM, dropout.step, -most, most);
    let noise = Tensor::from_vec(noise, x.shape(), x.device())?.to_dtype(x.dtype())?;
    Ok(residual_add(&x, &constant(&noise)?)?)
}
