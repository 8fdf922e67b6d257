//! [`embedding`]: rows of a table, by id.

use candle_core::{CpuStorage, DType, Result, Tensor, bail};
use tallow_kernels::embedding as kernels;
use tallow_kernels::memory::unspecified;

use crate::gradients::{Backward, Gradients, Saved, Saves};
use crate::operand::{Scalar, check_dtype, composed, on_cpu, view, with_dtype};
use crate::tape::{composed_of, finish};
use crate::trace::{self, Cost};
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
        return composed_of("embedding", &[], |_| reference::embedding(ids, &composed(weight)?));
    }
    let _span = trace::op("embedding", || Cost::bytes(2 * flat.len() * c * weight.dtype().size_in_bytes()));
    let op = Embedding { weight: weight.clone(), ids: flat, c };
    let y = with_dtype!("embedding", weight.dtype(), T => op.forward::<T>())?;
    let mut shape = ids.dims().to_vec();
    shape.push(c);
    finish(op, &[], y, shape)
}

struct Embedding {
    weight: Weight,
    ids: Vec<u32>,
    c: usize,
}

impl Embedding {
    fn forward<T: Scalar>(&self) -> Result<CpuStorage> {
        let mut y = unspecified(self.ids.len() * self.c);
        if self.weight.packed_matrix().is_some() {
            for (id, y) in self.ids.iter().zip(y.chunks_exact_mut(self.c)) {
                let row = self.weight.rows(*id as usize..*id as usize + 1)?;
                let (rs, rl) = row.storage_and_layout();
                y.copy_from_slice(view::<T>(&rs, rl)?);
            }
            return Ok(T::into_storage(y));
        }
        let weight = self.weight.value()?.detach().contiguous()?;
        let (ws, wl) = weight.storage_and_layout();
        kernels::gather(view::<T>(&ws, wl)?, self.c, &self.ids, &mut y);
        Ok(T::into_storage(y))
    }
}

impl Backward for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn weights(&self) -> Vec<&Weight> {
        vec![&self.weight]
    }

    fn saves(&self) -> Saves {
        Saves::Nothing
    }

    fn cost(&self) -> Cost {
        let n = self.ids.len() * self.c;
        Cost::bytes(n * (self.weight.dtype().size_in_bytes() + 8))
    }

    fn backward(&self, _: Saved<'_>, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        with_dtype!(self.name(), dy.dtype(), T => {
            let (ds, dl) = dy.storage_and_layout();
            let dy = view::<T>(&ds, dl)?;
            grads.weight(0, |sum| kernels::scatter_add(sum, self.c, &self.ids, dy))
        })
    }
}
