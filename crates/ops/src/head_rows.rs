//! The head as the loss needs it: whole, or, where it is packed, some rows of the vocabulary at a time.

use candle_core::{Result, Tensor};
use rayon::prelude::*;
use tallow_kernels::memory::unspecified;

use crate::operand::{Scalar, view};
use crate::{Table, Weight};

/// Elements of a packed head that are unpacked at once.
const UNPACKED: usize = 1 << 21;

/// Rows of a packed head of `c` columns that are unpacked at once.
pub(crate) fn unpacked_rows(v: usize, c: usize) -> usize {
    (UNPACKED / c.max(1)).next_multiple_of(64).min(v)
}

/// A head `[v, c]`.
pub(crate) struct HeadRows<'a, T> {
    matrix: Matrix<'a, T>,
    replaced: Option<Replaced<'a, T>>,
}

enum Matrix<'a, T> {
    Whole(&'a [T]),
    Packed(&'a Weight),
}

/// Rows that stand in for the matrix's, and their tokens.
struct Replaced<'a, T> {
    rows: &'a [T],
    ids: &'a [u32],
}

/// The gradient of the logits of the tokens whose rows stand in for the matrix's, `[rows, n]`.
pub(crate) struct Apart<T>(Vec<T>);

impl<T: Scalar> HeadRows<'_, T> {
    /// Calls `f` with `table`, whose matrix is read or, if it is packed, left as it is.
    pub(crate) fn with<R>(table: Table, f: impl FnOnce(&HeadRows<T>) -> Result<R>) -> Result<R> {
        let rows = table.replaced.map(|replaced| replaced.rows().value()?.detach().contiguous()).transpose()?;
        let rows = rows.as_ref().map(Tensor::storage_and_layout);
        let replaced = match (&rows, table.replaced) {
            (Some((storage, layout)), Some(of)) => Some(Replaced { rows: view::<T>(storage, layout)?, ids: of.ids() }),
            _ => None,
        };
        if table.weight.packed_matrix().is_some() {
            return f(&HeadRows { matrix: Matrix::Packed(table.weight), replaced });
        }
        let value = table.weight.value()?.detach().contiguous()?;
        let (storage, layout) = value.storage_and_layout();
        f(&HeadRows { matrix: Matrix::Whole(view::<T>(&storage, layout)?), replaced })
    }

    /// Logits `[rows, v]` of `x [rows, c]`, f32.
    pub(crate) fn logits(&self, (rows, c, v): (usize, usize, usize), x: &[T], logits: &mut [f32]) -> Result<()> {
        self.matrix.logits((rows, c, v), x, logits)?;
        if let Some(Replaced { rows: weights, ids }) = &self.replaced {
            let mut theirs = unspecified::<f32>(rows * ids.len());
            T::nt_f32(rows, ids.len(), c, x, weights, &mut theirs);
            logits.par_chunks_mut(v).zip(theirs.par_chunks(ids.len())).for_each(|(row, theirs)| {
                ids.iter().zip(theirs).for_each(|(id, logit)| row[*id as usize] = *logit);
            });
        }
        Ok(())
    }

    /// Takes from the gradient `g` of the logits, whose rows are `pitch` apart, what does not belong to the matrix, and leaves
    /// zeros there.
    pub(crate) fn take_apart(&self, g: &mut [T], pitch: usize) -> Option<Apart<T>> {
        let Replaced { ids, .. } = self.replaced.as_ref()?;
        let mut apart = Vec::with_capacity(g.len() / pitch * ids.len());
        for row in g.chunks_exact_mut(pitch) {
            apart.extend(ids.iter().map(|id| std::mem::replace(&mut row[*id as usize], T::from_f32(0.0))));
        }
        Some(Apart(apart))
    }

    /// `dx [rows, c] = g w` for the gradient `g [rows, v]` of the logits, whose rows are the given number of elements apart and
    /// of which `apart` was taken.
    pub(crate) fn input_gradient(
        &self,
        (rows, c, v): (usize, usize, usize),
        g: (&[T], usize),
        apart: Option<&Apart<T>>,
        dx: &mut [T],
    ) -> Result<()> {
        self.matrix.input_gradient((rows, c, v), g, dx)?;
        if let (Some(Replaced { rows: weights, ids }), Some(Apart(apart))) = (&self.replaced, apart) {
            T::nn(rows, c, ids.len(), apart, weights, dx, true);
        }
        Ok(())
    }

    /// Adds the gradient of the rows that stand in for the matrix's, `[n, c]`, to `sum`.
    pub(crate) fn rows_gradient(&self, (rows, c): (usize, usize), apart: &Apart<T>, x: &[T], sum: &mut [f32]) {
        if let Some(Replaced { ids, .. }) = &self.replaced {
            T::tn_add(ids.len(), c, rows, &apart.0, x, sum);
        }
    }
}

impl<T: Scalar> Matrix<'_, T> {
    fn logits(&self, (rows, c, v): (usize, usize, usize), x: &[T], logits: &mut [f32]) -> Result<()> {
        let weight = match self {
            Matrix::Whole(w) => {
                T::nt_f32(rows, v, c, x, w, logits);
                return Ok(());
            }
            Matrix::Packed(weight) => weight,
        };
        let most = unpacked_rows(v, c);
        let mut some = unspecified::<f32>(rows * most);
        each_part(weight, v, most, &mut |start, len, w| {
            let some = &mut some[..rows * len];
            T::nt_f32(rows, len, c, x, w, some);
            logits.par_chunks_mut(v).zip(some.par_chunks(len)).for_each(|(row, some)| {
                row[start..start + len].copy_from_slice(some);
            });
            Ok(())
        })
    }

    /// Summed in f32 and rounded once.
    fn input_gradient(
        &self,
        (rows, c, v): (usize, usize, usize),
        (g, pitch): (&[T], usize),
        dx: &mut [T],
    ) -> Result<()> {
        let weight = match self {
            Matrix::Whole(w) => {
                T::nn_pitched(rows, c, v, (g, pitch), w, dx, false);
                return Ok(());
            }
            Matrix::Packed(weight) => weight,
        };
        let most = unpacked_rows(v, c);
        let mut sum = vec![0f32; rows * c];
        let mut turned = unspecified::<T>(rows * most);
        each_part(weight, v, most, &mut |start, len, w| {
            let turned = &mut turned[..rows * len];
            turned.par_chunks_mut(rows).enumerate().for_each(|(j, column)| {
                for (i, x) in column.iter_mut().enumerate() {
                    *x = g[i * pitch + start + j];
                }
            });
            T::tn_add(rows, c, len, turned, w, &mut sum);
            Ok(())
        })?;
        dx.par_iter_mut().zip(sum.par_iter()).for_each(|(x, sum)| *x = T::from_f32(*sum));
        Ok(())
    }
}

/// First row, number of rows, and their values.
type Part<'a, T> = &'a mut dyn FnMut(usize, usize, &[T]) -> Result<()>;

fn each_part<T: Scalar>(weight: &Weight, v: usize, most: usize, f: Part<T>) -> Result<()> {
    for start in (0..v).step_by(most.max(1)) {
        let len = most.min(v - start);
        let rows: Tensor = weight.rows(start..start + len)?;
        let (storage, layout) = rows.storage_and_layout();
        f(start, len, view::<T>(&storage, layout)?)?;
    }
    Ok(())
}
