//! [`rope`]: rotary position embedding, and its [`RopeTable`].

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};
use tallow_kernels::memory::unspecified;
use tallow_kernels::rope::{self as kernels, Pairs, Rotation};
use tallow_kernels::simd;

use crate::gradients::{Backward, Gradients, Saved, Saves, size};
use crate::operand::{Scalar, on_cpu, view, with_dtype};
use crate::reference;
use crate::tape::{composed_of, dense, finish};
use crate::trace::{self, Cost};

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
        return composed_of("rope", &[x], |x| reference::rope(&x[0], table, positions, layout));
    }
    let x = dense(x)?;
    let op = Rope { table: table.clone(), positions: positions.clone(), layout, size: size(&x) };
    let _span = trace::op("rope", || Cost::bytes(2 * op.size));
    let y = with_dtype!("rope", x.dtype(), T => T::into_storage(op.run::<T>(&x, false)?));
    finish(op, &[&x], y, x.shape().clone())
}

struct Rope {
    table: Arc<RopeTable>,
    positions: Arc<Vec<u32>>,
    layout: RopeLayout,
    /// Bytes of the input.
    size: usize,
}

impl Rope {
    fn run<T: Scalar>(&self, x: &Tensor, inverse: bool) -> Result<Vec<T>> {
        let (_, _, heads, d) = x.dims4()?;
        let (xs, xl) = x.storage_and_layout();
        let x = view::<T>(&xs, xl)?;
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
                inverse,
            };
            kernels::rope(simd::level(), x, heads, d, rotation, &mut out);
        }
        Ok(out)
    }
}

impl Backward for Rope {
    fn name(&self) -> &'static str {
        "rope"
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
        with_dtype!(self.name(), dy.dtype(), T => grads.give(0, self.run::<T>(dy, true)?, dy.shape()))
    }
}
