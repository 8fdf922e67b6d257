use candle_core::{DType, Result, Tensor};

use crate::{CrossEntropy, CrossEntropyOptions};

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

/// [`embedding`](crate::embedding()) composed of candle ops.
pub fn embedding(ids: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let mut dims = ids.dims().to_vec();
    dims.push(weight.dim(1)?);
    weight.index_select(&ids.flatten_all()?, 0)?.reshape(dims)
}

/// [`linear_cross_entropy`](crate::linear_cross_entropy) composed of candle ops, with all logits at once.
pub fn linear_cross_entropy(
    x: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    options: &CrossEntropyOptions,
) -> Result<CrossEntropy> {
    let logits = linear(&x.to_dtype(DType::F32)?, weight, None)?;
    let ids = targets.to_vec1::<u32>()?;
    let counts: Vec<f32> = ids.iter().map(|&t| f32::from(u8::from(t != options.ignore_index))).collect();
    let valid: Vec<u32> = ids.iter().map(|&t| if t == options.ignore_index { 0 } else { t }).collect();
    let (n, num_targets) = (ids.len(), counts.iter().filter(|c| **c == 1.0).count());
    let counts = Tensor::from_vec(counts, n, x.device())?;
    let valid = Tensor::from_vec(valid, (n, 1), x.device())?;
    let largest = logits.max_keepdim(1)?.detach();
    let lse = (logits.broadcast_sub(&largest)?.exp()?.sum(1)?.log()? + largest.squeeze(1)?)?;
    let nll = ((&lse - logits.gather(&valid, 1)?.squeeze(1)?)? * &counts)?;
    let penalty = ((lse.sqr()? * &counts)? * options.z_loss)?;
    let loss = ((&nll + penalty)?.sum_all()? * options.scale)?;
    let nll_sum = nll.detach().to_vec1::<f32>()?.iter().map(|&x| f64::from(x)).sum();
    Ok(CrossEntropy { loss, nll_sum, num_targets })
}
