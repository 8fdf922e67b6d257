//! [`embedding`]: rows of a table, by id.

use candle_core::{CpuStorage, DType, Result, Tensor, bail};
use tallow_kernels::embedding as kernels;
use tallow_kernels::memory::unspecified;

use crate::gradients::{Backward, Gradients, Saved, Saves};
use crate::operand::{Scalar, check_dtype, on_cpu, view, with_dtype};
use crate::tape::{composed_of, finish};
use crate::trace::{self, Cost};
use crate::{ReplacedRows, Table, Weight, reference};

/// `y[i] = table[ids[i]]`: `ids [..]` u32, `table [v, c]` f32 or bf16; returns `[.., c]`.
///
/// Gradient: `dtable[ids[i]] += dy[i]`, added in the order of `i` whatever the number of threads.
///
/// # Errors
/// If an id is not below `v` (candle's own lookup takes `u32::MAX` for a row of zeros), or shapes, dtypes or devices do
/// not fit.
pub fn embedding<'a>(ids: &Tensor, table: impl Into<Table<'a>>) -> Result<Tensor> {
    let table = table.into();
    let weight = table.weight;
    let ws = weight.shape();
    let (&[v, c], DType::U32) = (ws.dims(), ids.dtype()) else {
        bail!("embedding: expected u32 ids and a table [v, c], got {:?} and {ws:?}", ids.dtype())
    };
    if v == 0 || c == 0 || !ids.device().same_device(weight.device()) {
        bail!("embedding: ids and a table {ws:?} must not be empty and lie on one device")
    }
    check_dtype("embedding", weight.dtype())?;
    table.check("embedding")?;
    let flat = ids.flatten_all()?.to_vec1::<u32>()?;
    if let Some(at) = flat.iter().position(|&id| id as usize >= v) {
        bail!("embedding: id {} at index {at} is not below the {v} rows of the table", flat[at])
    }
    if !on_cpu(ids) {
        return composed_of("embedding", &[], |_| reference::embedding(ids, &table.composed()?));
    }
    let _span = trace::op("embedding", || Cost::bytes(2 * flat.len() * c * weight.dtype().size_in_bytes()));
    let op = Embedding {
        weights: table.weights().cloned().collect(),
        parts: Parts::new(&flat, table.replaced),
        ids: flat,
        c,
    };
    let y = with_dtype!("embedding", weight.dtype(), T => op.forward::<T>())?;
    let mut shape = ids.dims().to_vec();
    shape.push(c);
    finish(op, &[], y, shape)
}

/// Where rows stand in for some of the table's: what is looked up in which, positions and rows.
struct Parts {
    at: [Vec<usize>; 2],
    rows: [Vec<u32>; 2],
}

impl Parts {
    fn new(ids: &[u32], replaced: Option<&ReplacedRows>) -> Option<Self> {
        let replaced = replaced?;
        let mut parts = Self { at: [vec![], vec![]], rows: [vec![], vec![]] };
        for (at, &id) in ids.iter().enumerate() {
            let (part, row) = replaced.row_of(id).map_or((0, id), |row| (1, row));
            parts.at[part].push(at);
            parts.rows[part].push(row);
        }
        Some(parts)
    }
}

struct Embedding {
    /// The matrix, and the rows that stand in for some of its.
    weights: Vec<Weight>,
    parts: Option<Parts>,
    ids: Vec<u32>,
    c: usize,
}

impl Embedding {
    fn forward<T: Scalar>(&self) -> Result<CpuStorage> {
        let c = self.c;
        let mut y = unspecified(self.ids.len() * c);
        look_up::<T>(&self.weights[0], &self.ids, c, &mut y)?;
        if let Some(Parts { at: [_, at], rows: [_, rows] }) = &self.parts {
            let mut values = unspecified::<T>(rows.len() * c);
            look_up::<T>(&self.weights[1], rows, c, &mut values)?;
            at.iter().zip(values.chunks_exact(c)).for_each(|(at, row)| y[at * c..][..c].copy_from_slice(row));
        }
        Ok(T::into_storage(y))
    }
}

fn look_up<T: Scalar>(weight: &Weight, ids: &[u32], c: usize, y: &mut [T]) -> Result<()> {
    if weight.packed_matrix().is_some() {
        for (id, y) in ids.iter().zip(y.chunks_exact_mut(c)) {
            let row = weight.rows(*id as usize..*id as usize + 1)?;
            let (rs, rl) = row.storage_and_layout();
            y.copy_from_slice(view::<T>(&rs, rl)?);
        }
        return Ok(());
    }
    let weight = weight.value()?.detach().contiguous()?;
    let (ws, wl) = weight.storage_and_layout();
    kernels::gather(view::<T>(&ws, wl)?, c, ids, y);
    Ok(())
}

impl Backward for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn weights(&self) -> Vec<&Weight> {
        self.weights.iter().collect()
    }

    fn saves(&self) -> Saves {
        Saves::Nothing
    }

    fn cost(&self) -> Cost {
        let n = self.ids.len() * self.c;
        Cost::bytes(n * (self.weights[0].dtype().size_in_bytes() + 8))
    }

    fn backward(&self, _: Saved<'_>, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        with_dtype!(self.name(), dy.dtype(), T => {
            let (ds, dl) = dy.storage_and_layout();
            let dy = view::<T>(&ds, dl)?;
            let Some(parts) = &self.parts else {
                return grads.weight(0, |sum| kernels::scatter_add(sum, self.c, &self.ids, dy));
            };
            for (i, (at, rows)) in parts.at.iter().zip(&parts.rows).enumerate() {
                if grads.wants_weight(i) {
                    let dy: Vec<T> = at.iter().flat_map(|at| &dy[at * self.c..][..self.c]).copied().collect();
                    grads.weight(i, |sum| kernels::scatter_add(sum, self.c, rows, &dy))?;
                }
            }
            Ok(())
        })
    }
}
