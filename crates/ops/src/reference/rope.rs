use candle_core::{D, DType, Result, Tensor};

use crate::{RopeLayout, RopeTable};

/// [`rope`](crate::rope()) composed of candle ops, computed in f32. Positions must be within the table.
pub fn rope(x: &Tensor, table: &RopeTable, positions: &[u32], layout: RopeLayout) -> Result<Tensor> {
    let (b, t, h, d) = x.dims4()?;
    let (r, half) = (table.rotary_dim(), table.rotary_dim() / 2);
    let rows = |values: &[f32]| -> Result<Tensor> {
        let rows = positions.iter().flat_map(|&p| &values[p as usize * half..(p as usize + 1) * half]);
        Tensor::from_vec(rows.copied().collect(), (b, t, 1, half), x.device())
    };
    let (cos, sin) = (rows(table.cos())?, rows(table.sin())?);
    let wide = x.to_dtype(DType::F32)?;
    let turned = wide.narrow(D::Minus1, 0, r)?;
    let (x0, x1) = match layout {
        RopeLayout::Half => (turned.narrow(3, 0, half)?, turned.narrow(3, half, half)?),
        RopeLayout::Interleaved => {
            let pairs = turned.reshape((b, t, h, half, 2))?;
            (pairs.narrow(4, 0, 1)?.squeeze(4)?, pairs.narrow(4, 1, 1)?.squeeze(4)?)
        }
    };
    let y0 = (x0.broadcast_mul(&cos)? - x1.broadcast_mul(&sin)?)?;
    let y1 = (x1.broadcast_mul(&cos)? + x0.broadcast_mul(&sin)?)?;
    let turned = match layout {
        RopeLayout::Half => Tensor::cat(&[y0, y1], 3)?,
        RopeLayout::Interleaved => Tensor::stack(&[y0, y1], 4)?.reshape((b, t, h, r))?,
    };
    let y = if r == d { turned } else { Tensor::cat(&[turned, wide.narrow(3, r, d - r)?], 3)? };
    y.to_dtype(x.dtype())
}
