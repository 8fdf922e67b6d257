use candle_core::{DType, Result, Tensor};

use crate::{CrossEntropy, CrossEntropyOptions, Targets};

/// [`linear`](crate::linear()) composed of candle ops, computed in f32.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (o, c) = weight.dims2()?;
    let rows = x.to_dtype(DType::F32)?.reshape(((), c))?;
    let y = rows.matmul(&weight.to_dtype(DType::F32)?.t()?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(&bias.to_dtype(DType::F32)?)?,
        None => y,
    };
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = o;
    }
    y.reshape(dims)?.to_dtype(x.dtype())
}

/// [`lora_linear`](crate::lora_linear) composed of candle ops, computed in f32; `x` is `x'` where nothing is dropped.
pub fn lora_linear(
    x: &Tensor,
    dropped: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    (a, b, scale): (&Tensor, &Tensor, f64),
) -> Result<Tensor> {
    let wide = |x: &Tensor| x.to_dtype(DType::F32);
    let y = linear(&wide(x)?, weight, bias)?;
    let z = linear(&linear(&wide(dropped)?, a, None)?, b, None)?;
    (y + (z * scale)?)?.to_dtype(x.dtype())
}

/// [`scale_outputs`](crate::scale_outputs) composed of candle ops, computed in f32.
pub fn scale_outputs(x: &Tensor, magnitude: &Tensor, norm: &[f32], bias: Option<&Tensor>) -> Result<Tensor> {
    let norm = Tensor::from_slice(norm, norm.len(), x.device())?;
    let factor = (magnitude.to_dtype(DType::F32)? / norm)?;
    let y = x.to_dtype(DType::F32)?.broadcast_mul(&factor)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(&bias.to_dtype(DType::F32)?)?,
        None => y,
    };
    y.to_dtype(x.dtype())
}

/// [`embedding`](crate::embedding()) composed of candle ops.
pub fn embedding(ids: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let mut dims = ids.dims().to_vec();
    dims.push(weight.dim(1)?);
    weight.index_select(&ids.flatten_all()?, 0)?.reshape(dims)
}

/// [`linear_cross_entropy`](crate::linear_cross_entropy) composed of candle ops, with all logits at once.
pub fn linear_cross_entropy<'a>(
    x: &Tensor,
    weight: &Tensor,
    targets: impl Into<Targets<'a>>,
    options: &CrossEntropyOptions,
) -> Result<CrossEntropy> {
    let targets = targets.into();
    let logits = linear(&x.to_dtype(DType::F32)?, weight, None)?;
    let ids = targets.ids.to_vec1::<u32>()?;
    let weight_of = |i: usize| targets.weights.map_or(1.0, |weights| weights[i]);
    let kept = |(i, &t): (usize, &u32)| if t == options.ignore_index { 0.0 } else { weight_of(i) };
    let counts: Vec<f32> = ids.iter().enumerate().map(kept).collect();
    let weight_sum = counts.iter().map(|&w| f64::from(w)).sum();
    let valid: Vec<u32> = ids.iter().map(|&t| if t == options.ignore_index { 0 } else { t }).collect();
    let (n, num_targets) = (ids.len(), ids.iter().filter(|&&t| t != options.ignore_index).count());
    let counts = Tensor::from_vec(counts, n, x.device())?;
    let valid = Tensor::from_vec(valid, (n, 1), x.device())?;
    let largest = logits.max_keepdim(1)?.detach();
    let lse = (logits.broadcast_sub(&largest)?.exp()?.sum(1)?.log()? + largest.squeeze(1)?)?;
    let nll = ((&lse - logits.gather(&valid, 1)?.squeeze(1)?)? * &counts)?;
    let penalty = ((lse.sqr()? * &counts)? * options.z_loss)?;
    let spread = ((&lse - logits.mean(1)?)? * &counts)?;
    let smoothed = ((&nll * (1.0 - options.label_smoothing))? + (spread * options.label_smoothing)?)?;
    let loss = ((smoothed + penalty)?.sum_all()? * options.scale)?;
    let nll_sum = nll.detach().to_vec1::<f32>()?.iter().map(|&x| f64::from(x)).sum();
    Ok(CrossEntropy { loss, nll_sum, weight_sum, num_targets })
}
