use candle_core::{DType, Result, Tensor};

use crate::KeyRanges;

/// [`attention`](crate::attention()) composed of candle ops; keeps `tq x tk` tensors. Same shapes, dtypes and errors.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, ranges: &KeyRanges, scale: f64) -> Result<Tensor> {
    let ((b, tq, h, d), (_, tk, g, _)) = (q.dims4()?, k.dims4()?);
    let (group, dtype) = (h / g, q.dtype());
    let seen: Vec<u8> = ranges
        .lo()
        .iter()
        .zip(ranges.hi())
        .flat_map(|(&lo, &hi)| (0..tk as u32).map(move |j| u8::from(lo <= j && j < hi)))
        .collect();
    let seen = Tensor::from_vec(seen, (b, 1, tq, tk), q.device())?.broadcast_as((b, h, tq, tk))?;
    let wide = |x: &Tensor| x.to_dtype(DType::F32);
    let q = wide(q)?.transpose(1, 2)?.contiguous()?;
    let over_group = |x: &Tensor| -> Result<Tensor> {
        wide(x)?.transpose(1, 2)?.unsqueeze(2)?.broadcast_as((b, g, group, tk, d))?.reshape((b, h, tk, d))
    };
    let (k, v) = (over_group(k)?, over_group(v)?);
    let logits = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? * scale)?;
    let hidden = Tensor::full(-1e30f32, logits.shape(), logits.device())?;
    let weights = candle_nn::ops::softmax(&seen.where_cond(&logits, &hidden)?, 3)?;
    // A row without keys comes out uniform: it is zeroed with the rest of what is not seen.
    let weights = seen.where_cond(&weights, &weights.zeros_like()?)?;
    let out = weights.matmul(&v)?.transpose(1, 2)?.contiguous()?;
    out.to_dtype(dtype)
}
