//! [`linear`]: the matrix product of a layer, its weight gradient summed straight into a flat bucket.

use candle_core::{CpuStorage, Result, Shape, Tensor, bail};
use tallow_kernels::memory::unspecified;
use tallow_kernels::reduce;

use crate::gradients::{Backward, Gradients, Saved, Saves};
use crate::operand::{Scalar, check_dtype, composed, on_cpu, view, with_dtype};
use crate::tape::{composed_of, dense, finish};
use crate::trace::{self, Cost};
use crate::{Weight, reference};

/// `y = x W^T + b`. `x [.., c]`, `weight [o, c]`, `bias [o]` of one dtype, f32 or bf16; sums are in f32. Returns `[.., o]`.
///
/// Gradients: `dx = dy W`, `dW = dy^T x`, `db = sum of dy`. That of a frozen weight, or of an input that nobody asks
/// about, is never computed.
///
/// # Errors
/// If shapes, dtypes or devices do not fit.
pub fn linear(x: &Tensor, weight: &Weight, bias: Option<&Weight>) -> Result<Tensor> {
    let dims = check(x, weight, bias)?;
    if !on_cpu(x) {
        return composed_of("linear", &[x], |x| {
            reference::linear(&x[0], &composed(weight)?, bias.map(composed).transpose()?.as_ref())
        });
    }
    let x = dense(x)?;
    let _span = trace::op("linear", || dims.forward_cost(x.dtype().size_in_bytes()));
    let op = Linear::new(weight, bias, dims, x.shape().clone());
    let y = with_dtype!("linear", x.dtype(), T => op.forward::<T>(&x))?;
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = dims.o;
    }
    finish(op, &[&x], y, shape)
}

/// Rows with a bias that are in f32 at once.
const ROWS: usize = 512;

/// Rows, inputs and outputs.
#[derive(Clone, Copy)]
pub(crate) struct Dims {
    pub(crate) n: usize,
    pub(crate) c: usize,
    pub(crate) o: usize,
}

impl Dims {
    pub(crate) fn forward_cost(self, size: usize) -> Cost {
        let Dims { n, c, o } = self;
        Cost { flops: (2 * n * c * o) as f64, bytes: (size * (n * c + o * c + n * o)) as f64 }
    }
}

pub(crate) fn check(x: &Tensor, weight: &Weight, bias: Option<&Weight>) -> Result<Dims> {
    let (xs, ws) = (x.shape(), weight.shape());
    let (Some(&c), &[o, width]) = (x.dims().last(), ws.dims()) else {
        bail!("linear: x {xs:?} and weight {ws:?}: expected x [.., c] and a weight [o, c]")
    };
    if c != width || c == 0 || o == 0 {
        bail!("linear: x {xs:?} and weight {ws:?}: expected x [.., c] and a weight [o, c]")
    }
    check_dtype("linear", x.dtype())?;
    for (name, held) in [("weight", Some(weight)), ("bias", bias)] {
        let Some(held) = held else { continue };
        if held.dtype() != x.dtype() || !held.device().same_device(x.device()) {
            bail!("linear: x is {:?} and {name} {:?}: they must share dtype and device", x.dtype(), held.dtype())
        }
    }
    if let Some(bias) = bias
        && bias.shape().dims() != [o]
    {
        bail!("linear: weight {ws:?} needs a bias of [{o}], got {:?}", bias.shape())
    }
    Ok(Dims { n: x.elem_count() / c, c, o })
}

pub(crate) struct Linear {
    pub(crate) weight: Weight,
    pub(crate) bias: Option<Weight>,
    pub(crate) dims: Dims,
    /// Of the input.
    shape: Shape,
    /// The input is kept: the weight's gradient is made of it.
    pub(crate) trained: bool,
}

impl Linear {
    pub(crate) fn new(weight: &Weight, bias: Option<&Weight>, dims: Dims, shape: Shape) -> Self {
        Self { weight: weight.clone(), bias: bias.cloned(), dims, shape, trained: weight.needs_grad() }
    }

    pub(crate) fn forward<T: Scalar>(&self, x: &Tensor) -> Result<CpuStorage> {
        let Dims { n, c, o } = self.dims;
        let weight = self.weight.value()?.detach().contiguous()?;
        let ((xs, xl), (ws, wl)) = (x.storage_and_layout(), weight.storage_and_layout());
        let (x, w) = (view::<T>(&xs, xl)?, view::<T>(&ws, wl)?);
        let mut y = unspecified(n * o);
        let Some(bias) = &self.bias else {
            T::nt(n, o, c, x, w, &mut y);
            return Ok(T::into_storage(y));
        };
        let bias = bias.value()?.detach().contiguous()?;
        let (bs, bl) = bias.storage_and_layout();
        let bias = view::<T>(&bs, bl)?;
        // The bias is added before the only rounding, some rows at a time.
        let mut sums = unspecified(n.min(ROWS) * o);
        for (x, y) in x.chunks(ROWS * c).zip(y.chunks_mut(ROWS * o)) {
            let sums = &mut sums[..y.len()];
            T::nt_f32(y.len() / o, o, c, x, w, sums);
            reduce::add_to_rows(sums, bias, y);
        }
        Ok(T::into_storage(y))
    }

    /// `x` is needed where the weight is trained.
    pub(crate) fn gradients<T: Scalar>(
        &self,
        x: Option<&Tensor>,
        dy: &Tensor,
        grads: &mut Gradients<'_>,
    ) -> Result<()> {
        let Dims { n, c, o } = self.dims;
        let (ds, dl) = dy.storage_and_layout();
        let dy = view::<T>(&ds, dl)?;
        grads.write(0, &self.shape, |dx: &mut [T], add| {
            let weight = self.weight.value()?.detach().contiguous()?;
            let (ws, wl) = weight.storage_and_layout();
            T::nn(n, c, o, dy, view(&ws, wl)?, dx, add);
            Ok(())
        })?;
        if grads.wants_weight(0) {
            let Some(x) = x else { bail!("linear: its weight is trained, but its input was not kept") };
            let (xs, xl) = x.storage_and_layout();
            let x = view::<T>(&xs, xl)?;
            grads.weight(0, |sum| T::tn_add(o, c, n, dy, x, sum))?;
        }
        if self.bias.is_some() {
            grads.weight(1, |sum| reduce::add_rows(dy, sum))?;
        }
        Ok(())
    }
}

impl Backward for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn weights(&self) -> Vec<&Weight> {
        [Some(&self.weight), self.bias.as_ref()].into_iter().flatten().collect()
    }

    fn saves(&self) -> Saves {
        if self.trained { Saves::Inputs } else { Saves::Nothing }
    }

    fn cost(&self) -> Cost {
        let (Dims { n, c, o }, size) = (self.dims, self.weight.dtype().size_in_bytes());
        match self.trained {
            true => Cost {
                flops: (4 * n * c * o) as f64,
                bytes: (size * (2 * n * o + 2 * n * c + o * c) + 8 * o * c) as f64,
            },
            false => Cost { flops: (2 * n * c * o) as f64, bytes: (size * (n * o + n * c + o * c)) as f64 },
        }
    }

    fn backward(&self, saved: Saved<'_>, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        with_dtype!(self.name(), dy.dtype(), T => self.gradients::<T>(saved.inputs.first(), dy, grads))
    }
}
