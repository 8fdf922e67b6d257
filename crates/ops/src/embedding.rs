//! [`embedding`]: rows of a table, by id.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use tallow_kernels::embedding as kernels;
use tallow_kernels::memory::unspecified;

use crate::operand::{Scalar, accumulate, check_dtype, composed, on_cpu, operand, view, with_dtype};
use crate::{Weight, reference};

/// `y[i] = weight[ids[i]]`: `ids [..]` u32, `weight [v, c]` f32 or bf16; returns `[.., c]`.
///
/// Gradient: `dweight[ids[i]] += dy[i]`, added in the order of `i` whatever the number of threads.
///
/// # Errors
/// If an id is not below `v` (candle's own lookup takes `u32::MAX` for a row of zeros), or shapes, dtypes or devices do
/// not fit.
pub fn embedding(ids: &Tensor, weight: &Weight) -> Result<Tensor> {
    let ws = weight.shape();
    let (&[v, c], DType::U32) = (ws.dims(), ids.dtype()) else {
        bail!("embedding: expected u32 ids and a table [v, c], got {:?} and {ws:?}", ids.dtype())
    };
    if v == 0 || c == 0 || !ids.device().same_device(weight.device()) {
        bail!("embedding: ids and a table {ws:?} must not be empty and lie on one device")
    }
    check_dtype("embedding", weight.dtype())?;
    let flat = ids.flatten_all()?.to_vec1::<u32>()?;
    if let Some(at) = flat.iter().position(|&id| id as usize >= v) {
        bail!("embedding: id {} at index {at} is not below the {v} rows of the table", flat[at])
    }
    if !on_cpu(ids) {
        return reference::embedding(ids, &composed(weight)?);
    }
    ids.contiguous()?.apply_op2(operand(weight), Embedding { weight: weight.clone(), ids: flat, c })
}

struct Embedding {
    weight: Weight,
    ids: Vec<u32>,
    c: usize,
}

impl Embedding {
    fn forward<T: Scalar>(&self) -> Result<CpuStorage> {
        let weight = self.weight.value().detach().contiguous()?;
        let (ws, wl) = weight.storage_and_layout();
        let mut y = unspecified(self.ids.len() * self.c);
        kernels::gather(view(&ws, wl)?, self.c, &self.ids, &mut y);
        Ok(T::to_cpu_storage_owned(y))
    }

    fn backward<T: Scalar>(&self, weight: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (ds, dl) = dy.storage_and_layout();
        let dy = view::<T>(&ds, dl)?;
        accumulate(&self.weight, weight, |sum| kernels::scatter_add(sum, self.c, &self.ids, dy))
    }
}

impl CustomOp2 for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, _: &CpuStorage, ids: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = with_dtype!(self.name(), self.weight.dtype(), T => self.forward::<T>())?;
        let mut dims = ids.dims().to_vec();
        dims.push(self.c);
        Ok((y, Shape::from(dims)))
    }

    fn bwd(&self, _: &Tensor, weight: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let dw = with_dtype!(self.name(), dy.dtype(), T => self.backward::<T>(weight, &dy))?;
        Ok((None, dw))
    }
}
