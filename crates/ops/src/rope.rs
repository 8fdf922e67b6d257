//! [`rope`]: rotary position embedding, and its [`RopeTable`].

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use tallow_kernels::memory::unspecified;
use tallow_kernels::rope::{self as kernels, Pairs, Rotation};
use tallow_kernels::simd;

use crate::operand::{Scalar, on_cpu, slice, with_dtype};
use crate::reference;

/// Which channels of a head form the pairs that are turned together, `r` of them rotated in all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// `(i, i + r / 2)`: `rotate_half` of Hugging Face's Llama, and GPT-NeoX.
    Half,
    /// `(2 i, 2 i + 1)`: the original paper, GPT-J, and Meta's Llama checkpoints.
    Interleaved,
}

/// Cosines and sines of every position, `[max_positions, r / 2]` each, in f32.
#[derive(Clone, Debug)]
pub struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
    max_positions: usize,
}

impl RopeTable {
    /// `cos[p, i] = attention_scaling cos(p inv_freq[i])`, and so for `sin`. `inv_freq` has `r / 2` values in radians a
    /// position; `attention_scaling` is 1 except for YaRN and LongRoPE. Angles are products in f32, as in Hugging Face's
    /// models, and their cosines are taken in f64.
    pub fn new(inv_freq: &[f32], max_positions: usize, attention_scaling: f32) -> Self {
        let angles = (0..max_positions).flat_map(|p| inv_freq.iter().map(move |f| f64::from(p as f32 * f)));
        let (cos, sin) = angles
            .map(|angle| {
                let (sin, cos) = angle.sin_cos();
                ((cos * f64::from(attention_scaling)) as f32, (sin * f64::from(attention_scaling)) as f32)
            })
            .unzip();
        Self { cos, sin, half: inv_freq.len(), max_positions }
    }

    /// Rotated channels of a head, `r`.
    pub fn rotary_dim(&self) -> usize {
        2 * self.half
    }

    /// Positions in the table.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// Cosines, `[max_positions, r / 2]`.
    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// Sines, `[max_positions, r / 2]`.
    pub fn sin(&self) -> &[f32] {
        &self.sin
    }
}

/// Turns pairs of channels of `x [b, t, h, d]` (f32 or bf16) by the angle of each token's position (RoPE, Su et al.
/// 2021). `positions` has `b * t` values, row by row. Channels past the table's `r` pass unchanged. The gradient is the
/// rotation back.
///
/// # Errors
/// If `x` is not of rank 4, `d < r`, the number of positions is not `b * t`, or a position is past the table.
pub fn rope(x: &Tensor, table: &Arc<RopeTable>, positions: &Arc<Vec<u32>>, layout: RopeLayout) -> Result<Tensor> {
    let (b, t, _, d) = x.dims4()?;
    if positions.len() != b * t {
        bail!("rope: {} positions for x {:?}, which has {} tokens", positions.len(), x.shape(), b * t)
    }
    if table.rotary_dim() > d {
        bail!("rope: the table turns {} channels but heads have {d}", table.rotary_dim())
    }
    if let Some(position) = positions.iter().find(|&&p| p as usize >= table.max_positions) {
        let max = table.max_positions;
        bail!("rope: position {position} is past the table of {max}: raise its max_positions or shorten the context")
    }
    if !on_cpu(x) {
        return reference::rope(x, table, positions, layout);
    }
    x.contiguous()?.apply_op1(Rope { table: table.clone(), positions: positions.clone(), layout, inverse: false })
}

struct Rope {
    table: Arc<RopeTable>,
    positions: Arc<Vec<u32>>,
    layout: RopeLayout,
    inverse: bool,
}

impl Rope {
    fn run<T: Scalar>(&self, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
        let x = slice::<T>(storage, layout)?;
        let (_, _, heads, d) = layout.shape().dims4()?;
        let mut out = unspecified(x.len());
        if !out.is_empty() {
            let rotation = Rotation {
                cos: &self.table.cos,
                sin: &self.table.sin,
                half: self.table.half,
                positions: &self.positions,
                pairs: match self.layout {
                    RopeLayout::Half => Pairs::Half,
                    RopeLayout::Interleaved => Pairs::Interleaved,
                },
                inverse: self.inverse,
            };
            kernels::rope(simd::level(), x, heads, d, rotation, &mut out);
        }
        Ok(T::to_cpu_storage_owned(out))
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = with_dtype!(self.name(), storage.dtype(), T => self.run::<T>(storage, layout))?;
        Ok((out, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let back = Rope {
            table: self.table.clone(),
            positions: self.positions.clone(),
            layout: self.layout,
            inverse: !self.inverse,
        };
        dy.contiguous()?.apply_op1_no_bwd(&back).map(Some)
    }
}
