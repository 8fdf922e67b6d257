//! [`linear`]: the matrix product of a layer, its weight gradient summed straight into a flat bucket.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use tallow_kernels::reduce;

use crate::operand::{Scalar, accumulate, check_dtype, composed, on_cpu, operand, slice, view, with_dtype};
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
        let bias = bias.map(composed).transpose()?;
        return reference::linear(x, &composed(weight)?, bias.as_ref());
    }
    let x = x.contiguous()?;
    let op = Linear { weight: weight.clone(), bias: bias.cloned(), dims };
    let bias = bias.map_or_else(|| x.detach(), |b| operand(b).clone());
    x.apply_op3(operand(weight), &bias, op)
}

/// Rows with a bias that are in f32 at once.
const ROWS: usize = 512;

/// Rows, inputs and outputs.
#[derive(Clone, Copy)]
struct Dims {
    n: usize,
    c: usize,
    o: usize,
}

fn check(x: &Tensor, weight: &Weight, bias: Option<&Weight>) -> Result<Dims> {
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

struct Linear {
    weight: Weight,
    bias: Option<Weight>,
    dims: Dims,
}

impl Linear {
    fn forward<T: Scalar>(&self, x: &[T]) -> Result<CpuStorage> {
        let Dims { n, c, o } = self.dims;
        let weight = self.weight.value().detach().contiguous()?;
        let (ws, wl) = weight.storage_and_layout();
        let w = view::<T>(&ws, wl)?;
        let mut y = vec![T::ZERO; n * o];
        let Some(bias) = &self.bias else {
            T::nt(n, o, c, x, w, &mut y);
            return Ok(T::to_cpu_storage_owned(y));
        };
        let bias = bias.value().detach().contiguous()?;
        let (bs, bl) = bias.storage_and_layout();
        let bias = view::<T>(&bs, bl)?;
        // The bias is added before the only rounding, some rows at a time.
        let mut sums = vec![0f32; n.min(ROWS) * o];
        for (x, y) in x.chunks(ROWS * c).zip(y.chunks_mut(ROWS * o)) {
            let sums = &mut sums[..y.len()];
            T::nt_f32(y.len() / o, o, c, x, w, sums);
            reduce::add_to_rows(sums, bias, y);
        }
        Ok(T::to_cpu_storage_owned(y))
    }

    fn backward<T: Scalar>(&self, [x, w, b]: [&Tensor; 3], dy: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let Dims { n, c, o } = self.dims;
        let (ds, dl) = dy.storage_and_layout();
        let dy = view::<T>(&ds, dl)?;
        let dx = match x.track_op() {
            true => {
                let weight = self.weight.value().detach().contiguous()?;
                let (ws, wl) = weight.storage_and_layout();
                let mut dx = vec![T::ZERO; n * c];
                T::nn(n, c, o, dy, view(&ws, wl)?, &mut dx);
                Some(Tensor::from_vec(dx, x.shape(), x.device())?)
            }
            false => None,
        };
        let (xs, xl) = x.storage_and_layout();
        let x = view::<T>(&xs, xl)?;
        let dw = accumulate(&self.weight, w, |sum| T::tn_add(o, c, n, dy, x, sum))?;
        let db = match &self.bias {
            Some(bias) => accumulate(bias, b, |sum| reduce::add_rows(dy, sum))?,
            None => None,
        };
        Ok([dx, dw, db])
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = with_dtype!(self.name(), storage.dtype(), T => self.forward::<T>(slice(storage, layout)?))?;
        let mut dims = layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.dims.o;
        }
        Ok((y, Shape::from(dims)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let [dx, dw, db] = with_dtype!(self.name(), x.dtype(), T => self.backward::<T>([x, weight, bias], &dy))?;
        Ok((dx, dw, db))
    }
}
